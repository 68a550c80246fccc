"""
The command line parses arguments and prints text; `workflows` does the work. Settings are dataclasses as in TRL's
scripts, so each works as a flag and from YAML (`--config`). The commands import slow libraries themselves.

    peft-ila rank --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara --output_dir OUT
    peft-ila tune --importance OUT/importance.json --top_p 0.3 --model_name_or_path Qwen/Qwen2.5-0.5B \
        --dataset_name trl-lib/Capybara --output_dir TUNED
"""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from .choices import Format
from .files import lock_directory
from .ranking.importance import LayerImportance
from .ranking.table import comparison_rows, comparison_table, plot_overlaps, ranking_rows, ranking_table
from .terminal import EXIT_CODES, TRL_OPTIONS, HelpFormatter, silence_others, versions
from .workflows.arguments import (
    LORA_R,
    BudgetArguments,
    PruneArguments,
    RankArguments,
    SelectionArguments,
    StepArguments,
    TuneArguments,
    given,
    required,
)


@dataclass
class ConvertArguments(StepArguments, BudgetArguments):
    """Arguments of `peft-ila convert`. Only `memory_budget` uses the training step."""

    output_dir: str | None = field(default=None, metadata={"help": "Where to write the file."})
    format: Format = field(
        default="peft",
        metadata={
            "help": "'peft' writes `adapter_config.json`; 'axolotl', 'llamafactory' and 'trl' write YAML for LoRA in "
            "that program; 'axolotl-full' writes `unfrozen_parameters` for full fine-tuning."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The ranked model, to check the result by injection. By default, the one named in the ranking."
        },
    )
    lora_r: int = field(default=LORA_R, metadata={"help": "LoRA's rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA's dropout."})

    def step(self) -> dict[str, Any]:
        """Arguments of [`select_within`]."""
        unused = given(self, "|".join(one.name for one in fields(StepArguments)))
        if unused and self.memory_budget is None:
            raise ValueError(f"Only `--memory_budget` uses a training step: pass it, or leave out {unused}.")
        return super().step()

    def lora(self) -> dict[str, Any]:
        """Arguments of [`LayerImportance.to_lora_config`]."""
        if self.format == "axolotl-full" and (unused := given(self, "lora_.*")):
            raise ValueError(f"`--format axolotl-full` trains no LoRA: leave out {unused}.")
        if self.lora_r < 1:
            raise ValueError(f"`--lora_r` must be at least 1, got {self.lora_r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`--lora_dropout` must be in [0, 1), got {self.lora_dropout}.")
        return {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}


@dataclass
class ExportArguments:
    """Arguments of `peft-ila export`."""

    output_dir: str | None = field(default=None, metadata={"help": "Where to write the adapter."})


@dataclass
class CompareArguments:
    """Arguments of `peft-ila compare`."""

    output: str | None = field(default=None, metadata={"help": "Draw the overlaps to this picture."})
    mean: str | None = field(
        default=None, metadata={"help": "Write the mean ranking, by standardised scores, to this file."}
    )


@dataclass
class PlotArguments(SelectionArguments):
    """Arguments of `peft-ila plot`, which outlines the selection, if any."""

    output: str = field(default="importance.png", metadata={"help": "The picture to write."})


@dataclass
class PlanArguments(StepArguments):
    """Arguments of `peft-ila plan`."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The model; its configuration is enough."})
    importance: str | None = field(
        default=None, metadata={"help": "A ranking. Without it, the first layers are tuned."}
    )
    lora_r: int = field(default=LORA_R, metadata={"help": "LoRA's rank."})


@dataclass
class DemoArguments:
    """Arguments of `peft-ila demo`."""

    output_dir: str | None = field(default=None, metadata={"help": "Where to write all results."})


def rank(
    script_args: Any, training_args: Any, model_args: Any, rank_args: RankArguments, others: argparse.Namespace
) -> str | None:
    """
    Rank the layers of a model. Write OUT/importance.json, OUT/importance.png and OUT/adapter.

    By default, nothing is trained: a fresh adapter is measured, to choose what to tune. `--method attribution` first
    fine-tunes the adapter until stable, to see what fine-tuning changes.

    `--push_to_hub` uploads the adapter with a model card that shows the ranking.

    `--resume_from_checkpoint True` resumes the run in OUT, in either stage.
    """
    from accelerate import PartialState

    from .workflows.sft import rank_by_sft

    importance, url = rank_by_sft(script_args, training_args, model_args, rank_args)
    if not PartialState().is_main_process:
        return None
    output = training_args.output_dir
    picture = f"{output}/importance.png"
    pictures = [picture] if os.path.exists(picture) else []  # none without matplotlib
    written = [f"{output}/importance.json", *pictures, f"{output}/adapter"]
    if others.json:
        facts = {"stage_1": importance.metadata["stage_1"], "learn_gates": importance.metadata["learn_gates"]}
        return _as_json({"written": written, "url": url, **facts, "units": ranking_rows(importance)})
    ranking = ["--importance", written[0], "--top_p", "0.3"]
    tune = ["peft-ila", "tune", *ranking, *_passed_on(others.given)]
    lines = [
        *_energy(importance.metadata["stage_1"]),
        ranking_table(importance),
        *([UNTRAINED] if importance.metadata["learn_gates"]["method"] == "untrained" else []),
        f"Wrote {output}/importance.json{', importance.png' if pictures else ''} and adapter/.",
        *([url] if url else []),
        f"Next: {shlex.join([*tune, '--output_dir', 'TUNED'])}",
        f"  or: {shlex.join(['peft-ila', 'convert', written[0], '--top_p', '0.3', '--output_dir', 'LORA'])}",
    ]
    return "\n".join(lines)


# settings of this run, or decided by the ranking, that `tune` must not get; `hub_token` is a secret
_NOT_PASSED_ON = re.compile("output_dir|resume_from_checkpoint|run_name|push_to_hub|hub_.*|lora_target_modules|json")


def _passed_on(settings: dict[str, Any]) -> list[str]:
    """The settings passed to `rank` as flags for `tune`, but those that only YAML can express (`max_length: null`)."""
    of_rank = {option.name for option in fields(RankArguments)} - {option.name for option in fields(TuneArguments)}
    flags = []
    for name, value in settings.items():
        if name not in of_rank and value is not None and not _NOT_PASSED_ON.fullmatch(name):
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [f"--{name}", *map(str, values)]
    return flags


def _energy(facts: dict[str, Any]) -> list[str]:
    """The share of a fully fine-tuned model's delta that was ranked, if any."""
    if "energy_kept" not in facts:
        return []
    return [
        f"The adapter holds {facts['energy_kept']:.1%} of the squared norm of the target modules' deltas; "
        f"{facts['energy_outside']:.1%} of the total is outside the target modules."
    ]


def tune(
    script_args: Any, training_args: Any, model_args: Any, tune_args: TuneArguments, others: argparse.Namespace
) -> str | None:
    """Fine-tune the selected units by LoRA or in full. Write the adapter or the model to TUNED."""
    from .workflows.tune import tune as tune_selection

    trainer = tune_selection(script_args, training_args, model_args, tune_args)
    if not trainer.is_world_process_zero():
        return None
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    output = training_args.output_dir
    if tune_args.full:
        trainable, total = model.num_parameters(only_trainable=True), model.num_parameters()
    else:
        trainable, total = model.get_nb_trainable_parameters()
    if others.json:
        counts = {"trainable": trainable, "total": total, "steps": trainer.state.global_step}
        return _as_json({"written": [output], **counts})
    if tune_args.full:
        loading = f"Next, in Python: AutoModelForCausalLM.from_pretrained({output!r})"
        return f"Wrote a model to {output}; {trainable:,} of its {total:,} parameters were trained.\n{loading}"
    return f"Wrote a LoRA adapter to {output}; it has {trainable:,} of {total:,} parameters.\n{_loading(output)}"


def _loading(adapter: str | None) -> str:
    return f"Next, in Python: PeftModel.from_pretrained(base_model, {adapter!r})"


def convert(args: ConvertArguments, others: argparse.Namespace) -> str:
    """
    Write the LoraConfig of the selected units to LORA/adapter_config.json, or a file for another program.

    The file has no weights. To turn a trained ILA adapter into a plain LoRA, use `peft-ila export`.

    Batch size, length, 4 bits and checkpointing describe the training step for `--memory_budget`.
    """
    importance = LayerImportance.load(others.importance)
    output_dir = Path(required(args.output_dir, "output_dir"))
    selection, step, lora = args.selection(), args.step(), args.lora()
    from .workflows.convert import convert as write_conversion
    from .workflows.models import model_name

    model = model_name(args.model_name_or_path) if args.model_name_or_path else None
    with lock_directory(output_dir):
        path, units = write_conversion(
            importance, output_dir, args.format, selection, model, args.memory_budget, step, **lora
        )
    if others.json:
        return _as_json({"written": [str(path)], "format": args.format, "units": units})
    return f"Wrote {path}.\n{_using(path, args.format)}"


def _using(path: Path, program: Format) -> str:
    """How to use a converted selection."""
    if program == "peft":
        return f"Next, in Python: get_peft_model(base_model, LoraConfig.from_pretrained({str(path.parent)!r}))"
    if program == "trl":
        trl = ["trl", "sft", "--config", str(path)]
        return f"Next: {shlex.join(trl)} --model_name_or_path MODEL --dataset_name DATA --output_dir TUNED"
    command = "llamafactory-cli train" if program == "llamafactory" else "axolotl train"
    return f"Next: copy its lines into YOUR.yaml, then {command} YOUR.yaml"


def export(args: ExportArguments, others: argparse.Namespace) -> str:
    """
    Write an ILA adapter as a plain LoRA adapter: gates are multiplied into B, closed units are left out.

    To make the configuration of a new LoRA from a ranking, use `peft-ila convert`.
    """
    from .export.plain import export_adapter
    from .tuner.config import ILAConfig  # noqa: F401  registers ILA, whose adapters are read

    with lock_directory(required(args.output_dir, "output_dir")):
        export_adapter(others.adapter, str(args.output_dir))
    names = ("adapter_config.json", "adapter_model.safetensors")
    if others.json:
        return _as_json({"written": [f"{args.output_dir}/{name}" for name in names]})
    return f"Wrote {args.output_dir}/{' and '.join(names)}.\n{_loading(args.output_dir)}"


def prune(
    script_args: Any, training_args: Any, model_args: Any, prune_args: PruneArguments, others: argparse.Namespace
) -> str | None:
    """
    Keep the directions of a trained LoRA that matter, and write a smaller plain LoRA to SMALL.

    Held-out data (`--eval_dataset_name`) decide how much to keep.
    """
    from accelerate import PartialState

    from .workflows.prune import FILES, pruning_table
    from .workflows.sft import prune_by_sft

    pruning, url = prune_by_sft(script_args, training_args, model_args, prune_args, others.adapter)
    if not PartialState().is_main_process:
        return None
    output = training_args.output_dir
    written = [f"{output}/{name}" for name in FILES if os.path.exists(f"{output}/{name}")]
    if others.json:
        facts = {name: value for name, value in asdict(pruning).items() if name not in ("directions", "importance")}
        return _as_json({"written": written, "url": url, **facts})
    lines = [
        pruning_table(pruning),
        f"Wrote {', '.join(written)}.",
        *([url] if url else []),
        _loading(output),
    ]
    return "\n".join(lines)


def compare(args: CompareArguments, others: argparse.Namespace) -> str:
    """
    Print the overlap and rank correlation of each pair of rankings.

    `--output` also draws the overlaps; `--mean` writes the mean ranking.
    """
    if len(others.importance) < 2:
        raise ValueError("`compare` needs at least two rankings.")
    rankings = [(path, LayerImportance.load(path)) for path in others.importance]
    rows = comparison_rows(rankings)
    written = [path for path in (args.output, args.mean) if path is not None]
    if args.mean is not None:
        taken = map(os.path.abspath, [*others.importance, args.output or ""])
        if os.path.abspath(required(args.mean, "mean")) in taken:
            raise ValueError(f"`--mean {args.mean}` would overwrite a ranking or the picture; name another file.")
        mean = LayerImportance.mean(
            importance for _, importance in rankings
        )  # may fail, so before any file is written
    if args.output:
        plot_overlaps(rankings, args.output)
    if args.mean is not None:
        mean.save(args.mean)
    if not others.json:
        return "\n".join([comparison_table(rows), *(f"Wrote {path}." for path in written)])
    for row in rows:
        row["spearman"] = None if math.isnan(row["spearman"]) else row["spearman"]
    return _as_json({**({"written": written} if written else {}), "pairs": rows})


def plot(args: PlotArguments, others: argparse.Namespace) -> str:
    """Draw a ranking as a heatmap and outline the selection, if any."""
    LayerImportance.load(others.importance).plot(args.output, **args.selection())
    return _as_json({"written": [args.output]}) if others.json else f"Wrote {args.output}."


def plan(args: PlanArguments, others: argparse.Namespace) -> str:
    """Print the GPU memory for tuning all units or a share of them, and for ranking them."""
    from .workflows.models import model_config, model_name
    from .workflows.plan import plan as plan_memory
    from .workflows.plan import table

    name = model_name(args.model_name_or_path)
    needed = plan_memory(
        model_config(name, trust_remote_code=False),
        LayerImportance.load(args.importance) if args.importance else None,
        **args.step(),
        r=args.lora_r,
    )
    if others.json:
        return _as_json({row: {**vars(memory), "total": memory.total} for row, memory in needed.items()})
    return table(needed)


def demo(args: DemoArguments) -> None:
    """Run the whole method on the embedded model and data."""
    from .workflows.demo import demo as run

    run(Path(required(args.output_dir, "output_dir")))


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False)


UNTRAINED = (
    "Nothing was trained: use the ranking to choose what to tune. The adapter is fresh. To see what fine-tuning "
    "changes, pass --method attribution."
)
TRACEBACK = "PEFT_ILA_TRACEBACK"  # environment variable: raise errors unchanged


class _Command(NamedTuple):
    run: Callable[..., str | None]
    arguments: Any  # a dataclass
    trains: bool = False  # takes all of TRL's arguments too
    usage: str | None = None  # where argparse's is too long or too wide


_COMMANDS = {
    "rank": _Command(
        rank,
        RankArguments,
        trains=True,
        usage="--model_name_or_path MODEL --dataset_name DATA\n    --output_dir OUT [OPTIONS]",
    ),
    "convert": _Command(convert, ConvertArguments, usage="RANKING --top_p SHARE --output_dir LORA [OPTIONS]"),
    "tune": _Command(
        tune,
        TuneArguments,
        trains=True,
        usage="--importance RANKING --top_p SHARE\n"
        "    --model_name_or_path MODEL --dataset_name DATA --output_dir TUNED [OPTIONS]",
    ),
    "export": _Command(export, ExportArguments),
    "prune": _Command(
        prune,
        PruneArguments,
        trains=True,
        usage="ADAPTER --model_name_or_path MODEL --dataset_name DATA\n"
        "    --eval_dataset_name HELD_OUT --output_dir SMALL [OPTIONS]",
    ),
    "compare": _Command(compare, CompareArguments),
    "plot": _Command(plot, PlotArguments),
    "plan": _Command(plan, PlanArguments),
    "demo": _Command(demo, DemoArguments),
}


def _trl() -> Any:
    try:
        import trl
    except ImportError as error:
        raise ImportError("The command line needs TRL: pip install trl") from error
    return trl


def _parser(command: str, dataclasses: list[Any]) -> Any:
    run, _, trains, usage = _COMMANDS[command]
    parser = _trl().TrlParser(
        dataclasses,
        prog=f"peft-ila {command}",
        usage=usage and f"peft-ila {command} {usage}",
        description=run.__doc__,
        epilog=EXIT_CODES,
        formatter_class=HelpFormatter,
    )
    if command in ("convert", "plot"):
        parser.add_argument("importance", help="A ranking written by `rank`, or the name of a published one.")
    if command == "prune":
        parser.add_argument("adapter", help="The directory, or the repository, of a trained LoRA or ILA adapter.")
    if command == "export":
        parser.add_argument("adapter", help="The directory of an ILA adapter, such as OUT/adapter.")
    if command == "compare":
        parser.add_argument("importance", nargs="+", help="Rankings written by `rank`, or names of published ones.")
    if command != "demo":
        text = "Print only JSON to stdout."
        parser.add_argument("--json", type=_truth, nargs="?", const=True, default=False, help=text)
    if trains:
        parser.add_argument("--help_all", action="help", help="Show all options, including TRL's, and exit.")
    return parser


def _help(command: str) -> str:
    """The text of `--help`, without importing TRL's trainers."""
    parser = _parser(command, [_COMMANDS[command].arguments])
    parser.add_argument("--config", metavar="FILE", help="A YAML file with any of the settings.")
    if _COMMANDS[command].trains:
        group = parser.add_argument_group("TRL settings that most runs need (`--help_all` shows all)")
        for name, text in TRL_OPTIONS.items():
            group.add_argument(f"--{name}", metavar="", default=argparse.SUPPRESS, help=text)
    return parser.format_help()


def _training_parser(command: str) -> Any:
    from transformers.utils import is_torch_bf16_gpu_available

    trl, own = _trl(), _COMMANDS[command].arguments
    parser = _parser(command, [trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, own])
    # SFTConfig's bf16 fails without a GPU; its learning rate is set after parsing
    parser.set_defaults(learning_rate=None, bf16=is_torch_bf16_gpu_available())
    return parser


# the values that TRL takes for a flag
_TRUTH = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


def _truth(text: str) -> bool:
    if text.lower() not in _TRUTH:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return _TRUTH[text.lower()]


def _with_values(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Add `True` after each flag without a value, so that the flag does not take the next argument."""
    flags = {name for action in parser._actions if action.const is True for name in action.option_strings}
    said = []
    for arg, following in zip(argv, [*argv[1:], ""]):
        said += [arg, "True"] if arg in flags and following.lower() not in _TRUTH else [arg]
    return said


def _config_first(argv: list[str]) -> tuple[list[str], list[str]]:
    """`--config FILE`, if passed, with `~` expanded; and the other arguments."""
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in argv:
        return [], argv
    position = argv.index("--config")
    path = Path(argv[position + 1]).expanduser() if position + 1 < len(argv) else None
    if path is None or not path.is_file():
        raise ValueError(f"`--config` needs the path of a YAML file, got {path}.")
    return ["--config", str(path)], argv[:position] + argv[position + 2 :]


def _parse(command: str, argv: list[str]) -> tuple[Any, ...]:
    """The arguments of the command's function."""
    import yaml

    if "-h" in argv or "--help" in argv:
        print(_help(command), end="")
        raise SystemExit(0)
    own, trains = _COMMANDS[command].arguments, _COMMANDS[command].trains
    parser = _training_parser(command) if trains else _parser(command, [own])
    config, argv = _config_first(argv)
    argv = _with_values(parser, argv)
    defaults = vars(parser.parse_known_args([])[0]) if command == "rank" else {}  # before YAML changes them
    try:
        *arguments, unknown_keys, unknown = parser.parse_args_and_config(
            config + argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except yaml.YAMLError as error:
        raise ValueError(f"The `--config` file is not YAML: {error}") from error
    if unknown_keys:
        raise ValueError(f"The `--config` file has unknown settings: {unknown_keys}.")
    if unknown:
        parser.error(f"unrecognized arguments: {unknown}")
    if trains:
        training = arguments[1]
        if training.learning_rate is None:
            # SFTConfig's default is for full fine-tuning; TRL advises 2e-4 for LoRA
            training.learning_rate = type(training).learning_rate if getattr(arguments[3], "full", False) else 2e-4
    if command == "rank":
        found = vars(parser.parse_known_args(argv)[0])
        arguments[-1].given = {name: value for name, value in found.items() if value != defaults[name]}
    return tuple(arguments)


# settings that may hold a path: `~` is the user's home
_PATHS = (
    "output_dir",
    "output",
    "mean",
    "importance",
    "adapter",
    "tuned_model",
    "model_name_or_path",
    "dataset_name",
    "eval_dataset_name",
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
        resume = str(getattr(group, "resume_from_checkpoint", None)).lower()
        if resume in ("true", "false", "none"):
            group.resume_from_checkpoint = resume == "true" or None  # transformers takes the text for a path


def _top_parser() -> argparse.ArgumentParser:
    first = {name: (command.run.__doc__ or "").strip().splitlines()[0] for name, command in _COMMANDS.items()}
    lines = [f"  {name:<9}{line}" for name, line in first.items()]
    parser = argparse.ArgumentParser(
        prog="peft-ila",
        description="Rank the layers of a model and tune the important ones.",
        epilog="\n".join(["commands:", *lines, "", EXIT_CODES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_COMMANDS, help="`peft-ila COMMAND --help` lists its options")
    parser.add_argument(
        "--version", action="version", version=versions(), help="show the versions of peft-ila and its libraries"
    )
    return parser


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "does not work with lora_dropout" in text:  # PEFT's message for fused experts
        text += " Pass `--lora_dropout 0`."
    if not isinstance(error, (OSError, ValueError, TypeError, ImportError)):
        text = f"{type(error).__name__}: {text} (`{TRACEBACK}=1` shows where)"
    # it may quote a file: keep control sequences from the terminal
    return "".join(character if character.isprintable() else "?" for character in text)


def main(argv: list[str] | None = None) -> None:
    """Run a command. An error prints one line to stderr and exits with 1; Ctrl-C exits with 130."""
    argv = sys.argv[1:] if argv is None else argv
    command = _top_parser().parse_args(argv[:1]).command
    logging.basicConfig(format="%(message)s")
    logging.getLogger("peft_ila").setLevel(logging.INFO)
    silence_others()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # some encodings lack bars, such as a pipe's on Windows
    try:
        arguments = _parse(command, argv[1:])
        _expand_paths(arguments)
        as_json = any(getattr(group, "json", False) for group in arguments)
        # trainers print their logs to stdout
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            text = _COMMANDS[command].run(*arguments)
        if text is not None:
            print(text)
    except KeyboardInterrupt:
        print(f"peft-ila {command}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if TRACEBACK in os.environ:
            raise
        raise SystemExit(f"peft-ila {command}: error: {_one_line(error)}") from error


if __name__ == "__main__":
    main()
