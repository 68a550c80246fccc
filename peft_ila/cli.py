"""
The command line: arguments in, text out; the work is in `workflows`. Settings come from dataclasses as in TRL's
scripts, so each works as a flag and from YAML (`--config`).

    peft-ila rank --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara --output_dir OUT
    peft-ila tune --importance OUT/importance.json --top_p 0.3 --model_name_or_path Qwen/Qwen2.5-0.5B \
        --dataset_name trl-lib/Capybara --output_dir TUNED
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .export.plain import export_adapter
from .files import locked
from .ranking.importance import LayerImportance
from .ranking.table import comparison_table, ranking_table
from .workflows.arguments import RankArguments, SelectionArguments, StepArguments, TuneArguments, required
from .workflows.convert import Format
from .workflows.convert import convert as write_conversion
from .workflows.models import model_config, model_name


@dataclass
class ConvertArguments(StepArguments, SelectionArguments):
    """Arguments of `peft-ila convert`. Those of a training step are for `memory_budget` alone."""

    output_dir: str | None = field(default=None, metadata={"help": "Where to write the file."})
    format: Format = field(
        default="peft",
        metadata={
            "help": "'peft': `adapter_config.json`; 'axolotl', 'llamafactory', 'trl': YAML that makes that program "
            "tune the selected units by LoRA; 'axolotl-full': in full, by `unfrozen_parameters`."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The ranked model, to check the result by injection; by default where the ranking says."},
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA's rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA's dropout."})


@dataclass
class ExportArguments:
    """Arguments of `peft-ila export`."""

    output_dir: str | None = field(default=None, metadata={"help": "Where to write the adapter."})


@dataclass
class PlotArguments:
    """Arguments of `peft-ila plot`."""

    output: str = field(default="importance.png", metadata={"help": "The picture to write."})


@dataclass
class PlanArguments(StepArguments):
    """Arguments of `peft-ila plan`."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The model; its configuration is enough."})
    importance: str | None = field(
        default=None, metadata={"help": "A ranking; without one, layers are spread evenly from the first one on."}
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA's rank."})
    json: bool = field(default=False, metadata={"help": "Print bytes as JSON instead of a table."})


@dataclass
class DemoArguments:
    """Arguments of `peft-ila demo`."""

    output_dir: str | None = field(default=None, metadata={"help": "Where to write all results."})


def rank(script_args: Any, training_args: Any, model_args: Any, rank_args: RankArguments) -> None:
    """
    Fine-tune until stable, learn the gates, and write OUT/importance.json, OUT/importance.png and OUT/adapter.

    With `--push_to_hub`, the adapter is uploaded with a card that holds the ranking.

    With `--resume_from_checkpoint True`, the same command goes on from what OUT holds, in either stage.
    """
    from accelerate import PartialState

    from .workflows.sft import rank_by_sft

    importance, url = rank_by_sft(script_args, training_args, model_args, rank_args)
    if PartialState().is_main_process:
        print_energy(importance.metadata["stage_1"])
        print(ranking_table(importance))
        print(f"Wrote {training_args.output_dir}/importance.json, importance.png and adapter/.")
        if url:
            print(url)


def print_energy(facts: dict[str, Any]) -> None:
    """Print how much of a fully fine-tuned model's delta was ranked, if it was one."""
    if "energy_kept" in facts:
        print(
            f"The adapter holds {facts['energy_kept']:.1%} of the squared norm of the target modules' deltas; "
            f"{facts['energy_outside']:.1%} of all is outside the target modules."
        )


def tune(script_args: Any, training_args: Any, model_args: Any, tune_args: TuneArguments) -> None:
    """Fine-tune with a plain LoRA on the selected units and write the adapter to TUNED."""
    from .workflows.tune import tune as tune_selection

    trainer = tune_selection(script_args, training_args, model_args, tune_args)
    if trainer.is_world_process_zero():
        trainable, total = trainer.accelerator.unwrap_model(trainer.model).get_nb_trainable_parameters()
        print(f"Wrote a LoRA adapter with {trainable:,} of {total:,} parameters to {training_args.output_dir}.")


def convert(args: ConvertArguments, paths: argparse.Namespace) -> None:
    """Write the LoraConfig of the selected units to LORA/adapter_config.json, or the same for another program."""
    importance = LayerImportance.load(paths.importance)
    output_dir = Path(required(args.output_dir, "output_dir"))
    lora: dict[str, Any] = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    model = model_name(args.model_name_or_path) if args.model_name_or_path else None
    with locked(output_dir):
        path = write_conversion(
            importance, output_dir, args.format, args.selection(), model, args.memory_budget, args.step(), **lora
        )
    print(f"Wrote {path}.")


def export(args: ExportArguments, paths: argparse.Namespace) -> None:
    """Write an ILA adapter as a plain LoRA adapter: gates multiplied into B, closed units absent."""
    with locked(required(args.output_dir, "output_dir")):
        export_adapter(paths.adapter, str(args.output_dir))
    print(f"Wrote {args.output_dir}/adapter_config.json and adapter_model.safetensors.")


def compare(paths: argparse.Namespace) -> None:
    """Print overlap and rank correlation of each pair of rankings."""
    if len(paths.importance) < 2:
        raise ValueError("`compare` needs at least two rankings.")
    print(comparison_table([(path, LayerImportance.load(path)) for path in paths.importance]))


def plot(args: PlotArguments, paths: argparse.Namespace) -> None:
    """Draw the heatmap of a ranking."""
    LayerImportance.load(paths.importance).plot(args.output)
    print(f"Wrote {args.output}.")


def plan(args: PlanArguments) -> None:
    """Print what tuning all units or a share of them, and ranking them, needs of a GPU's memory."""
    from .workflows.plan import plan as plan_memory
    from .workflows.plan import table

    name = model_name(args.model_name_or_path)
    needed = plan_memory(
        model_config(name, trust_remote_code=False),
        LayerImportance.load(args.importance) if args.importance else None,
        **args.step(),
        r=args.lora_r,
    )
    if args.json:
        print(json.dumps({row: {**vars(memory), "total": memory.total} for row, memory in needed.items()}, indent=1))
    else:
        print(table(needed))


def demo(args: DemoArguments) -> None:
    """All of it on the embedded model and data."""
    from .workflows.demo import demo as run

    run(Path(required(args.output_dir, "output_dir")))


TRACEBACK = "PEFT_ILA_TRACEBACK"  # an environment variable: errors are raised as they are
_COMMANDS = ("rank", "convert", "tune", "export", "compare", "plot", "plan", "demo")


def _parse(command: str, argv: list[str]) -> tuple[Callable[..., None], tuple[Any, ...]]:
    import yaml
    from transformers.utils import is_torch_bf16_gpu_available

    try:
        from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser
    except ImportError as error:
        raise ImportError("The command line needs TRL: pip install 'peft-ila[trl]'") from error

    training = [ScriptArguments, SFTConfig, ModelConfig]
    commands: dict[str, tuple[Callable[..., None], list[Any]]] = {
        "rank": (rank, [*training, RankArguments]),
        "convert": (convert, [ConvertArguments]),
        "tune": (tune, [*training, TuneArguments]),
        "export": (export, [ExportArguments]),
        "compare": (compare, []),
        "plot": (plot, [PlotArguments]),
        "plan": (plan, [PlanArguments]),
        "demo": (demo, [DemoArguments]),
    }
    function, dataclasses = commands[command]
    parser = TrlParser(dataclasses, prog=f"peft-ila {command}", description=function.__doc__)
    if command in ("convert", "plot"):
        parser.add_argument("importance", help="A ranking, as `rank` wrote it.")
    if command == "export":
        parser.add_argument("adapter", help="The directory of an ILA adapter, such as OUT/adapter.")
    if command == "compare":
        parser.add_argument("importance", nargs="+", help="Rankings, as `rank` wrote them.")
    if command in ("rank", "tune"):
        # SFTConfig's learning rate is for full tuning (this is TRL's advice for LoRA), its bf16 fails without a GPU.
        parser.set_defaults(learning_rate=2e-4, bf16=is_torch_bf16_gpu_available())
    if "--config" in argv:
        position = argv.index("--config") + 1
        path = Path(argv[position]).expanduser() if position < len(argv) else None
        if path is None or not path.is_file():
            raise ValueError(f"`--config` needs the path of a YAML file, got {path}.")
        argv = [*argv[:position], str(path), *argv[position + 1 :]]
    try:
        arguments: Any = parser.parse_args_and_config(argv)
    except yaml.YAMLError as error:
        raise ValueError(f"The file of `--config` is not YAML: {error}") from error
    return function, arguments


# what holds a path, or may: `~` is the user's home in all of them
_PATHS = (
    "output_dir",
    "output",
    "importance",
    "adapter",
    "tuned_model",
    "model_name_or_path",
    "dataset_name",
    "resume_from_checkpoint",
)


def _expand_paths(arguments: tuple[Any, ...]) -> None:
    for group in arguments:
        for name in _PATHS:
            value = getattr(group, name, None)
            if isinstance(value, str):
                setattr(group, name, os.path.expanduser(value))
            elif isinstance(value, list):
                setattr(group, name, [os.path.expanduser(path) for path in value])
        if str(getattr(group, "resume_from_checkpoint", None)).lower() in ("false", "none"):
            group.resume_from_checkpoint = None  # transformers takes it for a path


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (OSError, ValueError, TypeError, ImportError)):
        text = f"{type(error).__name__}: {text} (`{TRACEBACK}=1` shows where)"
    # from files of others: no control sequences for the terminal
    return "".join(character if character.isprintable() else "?" for character in text)


def main(argv: list[str] | None = None) -> None:
    """Run a command; whatever goes wrong ends it with one line on stderr and exit code 1, Ctrl-C with 130."""
    argv = sys.argv[1:] if argv is None else argv
    top = argparse.ArgumentParser(prog="peft-ila", description="Rank the layers of a model, tune the important ones.")
    top.add_argument("command", choices=_COMMANDS, help="`peft-ila COMMAND --help` lists its options")
    command = top.parse_args(argv[:1]).command
    logging.basicConfig(format="%(message)s")
    logging.getLogger("peft_ila").setLevel(logging.INFO)
    try:
        function, arguments = _parse(command, argv[1:])
        _expand_paths(arguments)
        function(*arguments)
    except KeyboardInterrupt:
        print(f"peft-ila {command}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if TRACEBACK in os.environ:
            raise
        raise SystemExit(f"peft-ila {command}: error: {_one_line(error)}") from error


if __name__ == "__main__":
    main()
