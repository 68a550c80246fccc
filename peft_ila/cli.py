"""
The command line parses arguments and prints text; `workflows` does the work. The commands import slow libraries
themselves. `rank`, `tune` and `prune` take all arguments of TRL's scripts too, as flags or from YAML (`--config`).
"""

import argparse
import contextlib
import importlib.metadata
import inspect
import io
import json
import logging
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .choices import Format
from .files import lock_directory
from .ranking.importance import LayerImportance
from .ranking.table import comparison_rows, comparison_table, plot_overlaps, ranking_rows, ranking_table
from .version import __version__
from .workflows.arguments import (
    LORA_R,
    BudgetArguments,
    LoraArguments,
    PruneArguments,
    RankArguments,
    SelectionArguments,
    StepArguments,
    TuneArguments,
    given,
    required,
)

Result = tuple[dict[str, Any], str]  # for `--json`, and for people
TRAINING: dict[str, Any] = {"rank": RankArguments, "tune": TuneArguments, "prune": PruneArguments}
TRACEBACK = "PEFT_ILA_TRACEBACK"  # environment variable: raise errors unchanged


def rank(
    script_args: Any, training_args: Any, model_args: Any, rank_args: RankArguments, others: argparse.Namespace
) -> Result:
    """
    Rank the layers of a model. Write OUT/importance.json, OUT/importance.png and OUT/adapter.

    By default, nothing is trained: a fresh adapter is measured, to choose what to tune. `--method attribution` first
    fine-tunes the adapter until stable, to see what fine-tuning changes.

    `--push_to_hub` uploads the adapter with a model card that shows the ranking.

    `--resume_from_checkpoint True` resumes the run in OUT, in either stage.
    """
    from .workflows.sft import rank_by_sft

    importance, url = rank_by_sft(script_args, training_args, model_args, rank_args)
    output = training_args.output_dir
    ranking, picture = f"{output}/importance.json", f"{output}/importance.png"
    pictures = [picture] if os.path.exists(picture) else []  # none without matplotlib
    stage_1, search = importance.metadata["stage_1"], importance.metadata["learn_gates"]
    facts = {
        "written": [ranking, *pictures, f"{output}/adapter"],
        "url": url,
        "stage_1": stage_1,
        "learn_gates": search,
        "units": ranking_rows(importance),
    }
    lines = [ranking_table(importance)]
    if "energy_kept" in stage_1:
        lines.append(
            f"The adapter holds {stage_1['energy_kept']:.1%} of the squared norm of the target modules' deltas; "
            f"{stage_1['energy_outside']:.1%} of the total is outside the target modules."
        )
    if search["method"] == "untrained":
        lines.append(
            "Nothing was trained: use the ranking to choose what to tune. The adapter is fresh. To see what "
            "fine-tuning changes, pass --method attribution."
        )
    lines.append(f"Wrote {ranking}{', importance.png' if pictures else ''} and adapter/.")
    lines += [url] if url else []
    tune = ["tune", "--importance", ranking, "--top_p", "0.3", *_passed_on(others.given), "--output_dir", "TUNED"]
    lines.append(f"Next: {shlex.join(['peft-ila', *tune])}")
    lines.append(f"  or: {shlex.join(['peft-ila', 'convert', ranking, '--top_p', '0.3', '--output_dir', 'LORA'])}")
    return facts, "\n".join(lines)


# settings of this run, or decided by the ranking, that `tune` must not get; `hub_token` is a secret
_NOT_PASSED_ON = "config|json|output_dir|resume_from_checkpoint|run_name|push_to_hub|hub_.*|lora_target_.*"


def _passed_on(settings: dict[str, Any]) -> list[str]:
    """The settings passed to `rank` as flags for `tune`, but those that only YAML can express (`max_length: null`)."""
    of_rank = {option.name for option in fields(RankArguments)} - {option.name for option in fields(TuneArguments)}
    flags = []
    for name, value in settings.items():
        if name not in of_rank and value is not None and not re.fullmatch(_NOT_PASSED_ON, name):
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [f"--{name}", *map(str, values)]
    return flags


def tune(
    script_args: Any, training_args: Any, model_args: Any, tune_args: TuneArguments, others: argparse.Namespace
) -> Result:
    """Fine-tune the selected units by LoRA or in full. Write the adapter or the model to TUNED."""
    from .workflows.tune import tune as tune_selection

    trainer = tune_selection(script_args, training_args, model_args, tune_args)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    output = training_args.output_dir
    if tune_args.full:
        trainable, total = model.num_parameters(only_trainable=True), model.num_parameters()
        text = (
            f"Wrote a model to {output}; {trainable:,} of its {total:,} parameters were trained.\n"
            f"Next, in Python: AutoModelForCausalLM.from_pretrained({output!r})"
        )
    else:
        trainable, total = model.get_nb_trainable_parameters()
        text = f"Wrote a LoRA adapter to {output}; it has {trainable:,} of {total:,} parameters.\n{_loading(output)}"
    if held_out := [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]:
        text = f"The last held-out loss was {held_out[-1]:.4f}.\n{text}"
    return {"written": [output], "trainable": trainable, "total": total, "steps": trainer.state.global_step}, text


def _loading(adapter: str) -> str:
    return f"Next, in Python: PeftModel.from_pretrained(base_model, {adapter!r})"


def prune(
    script_args: Any, training_args: Any, model_args: Any, prune_args: PruneArguments, others: argparse.Namespace
) -> Result:
    """
    Keep the directions of a trained LoRA that matter, and write a smaller plain LoRA to SMALL.

    Held-out data (`--eval_dataset_name`) decide how much to keep.
    """
    from .workflows.prune import FILES, pruning_table
    from .workflows.sft import prune_by_sft

    pruning, url = prune_by_sft(script_args, training_args, model_args, prune_args, others.adapter)
    output = training_args.output_dir
    written = [path for name in FILES if os.path.exists(path := f"{output}/{name}")]
    facts = {name: value for name, value in asdict(pruning).items() if name not in ("directions", "importance")}
    lines = [pruning_table(pruning), f"Wrote {', '.join(written)}.", *([url] if url else []), _loading(output)]
    return {"written": written, "url": url, **facts}, "\n".join(lines)


def convert(args: argparse.Namespace) -> Result:
    """
    Write the LoraConfig of the selected units to LORA/adapter_config.json, or a file for another program.

    The file has no weights. To turn a trained ILA adapter into a plain LoRA, use `peft-ila export`.

    Batch size, length, 4 bits and checkpointing describe the training step for `--memory_budget`.
    """
    importance = LayerImportance.load(args.importance)
    output_dir = Path(required(args.output_dir, "output_dir"))
    selection, step, lora = (_group(one, args) for one in (BudgetArguments, StepArguments, LoraArguments))
    if args.memory_budget is None and (unused := given(step)):
        raise ValueError(f"Only `--memory_budget` uses a training step: pass it, or leave out {unused}.")
    if args.format == "axolotl-full" and (unused := given(lora)):
        raise ValueError(f"`--format axolotl-full` trains no LoRA: leave out {unused}.")
    chosen, options = selection.selection(), lora.lora()
    from .workflows.convert import convert as write_conversion

    model, budget = args.model_name_or_path, args.memory_budget
    with lock_directory(output_dir):
        path, units = write_conversion(
            importance, output_dir, args.format, chosen, model, budget, step.step(), **options
        )
    return {
        "written": [str(path)],
        "format": args.format,
        "units": units,
    }, f"Wrote {path}.\n{_using(path, args.format)}"


def _using(path: Path, program: Format) -> str:
    """How to use a converted selection."""
    if program == "peft":
        return f"Next, in Python: get_peft_model(base_model, LoraConfig.from_pretrained({str(path.parent)!r}))"
    if program == "trl":
        trl = ["trl", "sft", "--config", str(path)]
        return f"Next: {shlex.join(trl)} --model_name_or_path MODEL --dataset_name DATA --output_dir TUNED"
    command = "llamafactory-cli train" if program == "llamafactory" else "axolotl train"
    return f"Next: copy its lines into YOUR.yaml, then {command} YOUR.yaml"


def export(args: argparse.Namespace) -> Result:
    """
    Write an ILA adapter as a plain LoRA adapter: gates are multiplied into B, closed units are left out.

    To make the configuration of a new LoRA from a ranking, use `peft-ila convert`.
    """
    output = required(args.output_dir, "output_dir")
    from .export.plain import export_adapter
    from .tuner.config import ILAConfig  # noqa: F401  registers ILA, whose adapters are read

    with lock_directory(output):
        export_adapter(args.adapter, output)
    names = ("adapter_config.json", "adapter_model.safetensors")
    written = [f"{output}/{name}" for name in names]
    return {"written": written}, f"Wrote {output}/{' and '.join(names)}.\n{_loading(output)}"


def compare(args: argparse.Namespace) -> Result:
    """
    Print the overlap and rank correlation of each pair of rankings.

    `--output` also draws the overlaps; `--mean` writes the mean ranking.
    """
    if len(args.importance) < 2:
        raise ValueError("`compare` needs at least two rankings.")
    rankings = [(path, LayerImportance.load(path)) for path in args.importance]
    rows = comparison_rows(rankings)
    written = [path for path in (args.output, args.mean) if path is not None]
    if args.mean is not None:
        taken = map(os.path.abspath, [*args.importance, args.output or ""])
        if os.path.abspath(required(args.mean, "mean")) in taken:
            raise ValueError(f"`--mean {args.mean}` would overwrite a ranking or the picture; name another file.")
        # it may fail, so before any file is written
        mean = LayerImportance.mean(importance for _, importance in rankings)
    if args.output:
        plot_overlaps(rankings, args.output)
    if args.mean is not None:
        mean.save(args.mean)
    text = "\n".join([comparison_table(rows), *(f"Wrote {path}." for path in written)])
    # JSON has no NaN
    pairs = [{name: None if value != value else value for name, value in row.items()} for row in rows]
    return {**({"written": written} if written else {}), "pairs": pairs}, text


def plot(args: argparse.Namespace) -> Result:
    """Draw a ranking as a heatmap and outline the selection, if any."""
    LayerImportance.load(args.importance).plot(args.output, **_group(SelectionArguments, args).selection())
    return {"written": [args.output]}, f"Wrote {args.output}."


def plan(args: argparse.Namespace) -> Result:
    """Print the GPU memory for tuning all units or a share of them, and for ranking them."""
    name = required(args.model_name_or_path, "model_name_or_path")
    importance = LayerImportance.load(args.importance) if args.importance else None
    from .workflows.models import model_config
    from .workflows.plan import plan as plan_memory
    from .workflows.plan import table

    config = model_config(name, trust_remote_code=False)
    needed = plan_memory(config, importance, **_group(StepArguments, args).step(), r=args.lora_r)
    return {row: {**vars(memory), "total": memory.total} for row, memory in needed.items()}, table(needed)


def demo(args: argparse.Namespace) -> None:
    """Run the whole method on the embedded model and data."""
    output_dir, start = Path(required(args.output_dir, "output_dir")), time.perf_counter()
    from .workflows.demo import demo_commands

    for headline, command in demo_commands(output_dir):
        print(f"\n=== {headline} ===\n\n$ {shlex.join(['peft-ila', *command])}\n", flush=True)
        run(command)
    pictures = ", ".join(map(str, sorted(output_dir.glob("*/*.png"))))
    print(f"\nPictures: {pictures}. The whole demo took {time.perf_counter() - start:.0f} s.")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------

_EXIT_CODES = "Exit codes: 0 done; 1 an error, one line on stderr; 2 a wrong command line; 130 Ctrl-C."
_TRL_SETTINGS = (
    "TRL's settings are accepted too (--help_all). The most common: --per_device_train_batch_size, --max_length, "
    "--load_in_4bit, --gradient_checkpointing, --seed."
)
_TO_TRAIN = (
    "For training: --learning_rate (2e-4 by default, 2e-5 with `tune --full`), --max_steps, --num_train_epochs, "
    "--eval_strategy, --lora_r, --lora_alpha, --lora_dropout, --report_to, --resume_from_checkpoint."
)
_RANKING = "A ranking written by `rank`, or the name of a published one."
_ADAPTER = "The directory, or the repository, of a trained LoRA or ILA adapter."


def _parser() -> argparse.ArgumentParser:
    """The parser of the command line, which knows our own arguments, not TRL's."""
    top = argparse.ArgumentParser(
        prog="peft-ila",
        description="Prune a trained LoRA adapter, and measure which layers fine-tuning changed.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "show the versions of peft-ila and its libraries"
    top.add_argument("--version", action="version", version=_versions(), help=text)
    commands = top.add_subparsers(
        title="commands",
        dest="command",
        required=True,
        metavar="COMMAND",
        description="COMMAND --help lists its options",
    )
    data = "--model_name_or_path MODEL --dataset_name DATA"
    _add(commands, rank, f"{data}\n    --output_dir OUT")
    parser = _add(commands, convert, "RANKING --top_p SHARE --output_dir LORA")
    parser.add_argument("importance", help=_RANKING)
    parser.add_argument("--output_dir", help="Where to write the file.")
    text = "The ranked model, to check the result by injection. By default, the one named in the ranking."
    parser.add_argument("--model_name_or_path", help=text)
    text = (
        "'peft' (default) writes `adapter_config.json`; 'axolotl', 'llamafactory' and 'trl' write YAML for LoRA in "
        "that program; 'axolotl-full' writes `unfrozen_parameters` for full fine-tuning."
    )
    parser.add_argument("--format", choices=get_args(Format), default="peft", help=text)
    _add_options(parser, BudgetArguments, LoraArguments, StepArguments)
    _add(commands, tune, f"--importance RANKING --top_p SHARE\n    {data} --output_dir TUNED")
    parser = _add(commands, export, "ADAPTER --output_dir PLAIN")
    parser.add_argument("adapter", help="The directory of an ILA adapter, such as OUT/adapter.")
    parser.add_argument("--output_dir", help="Where to write the adapter.")
    parser = _add(commands, prune, f"ADAPTER {data}\n    --eval_dataset_name HELD_OUT --output_dir SMALL")
    parser.add_argument("adapter", help=_ADAPTER)
    parser = _add(commands, compare, "RANKING RANKING")
    parser.add_argument("importance", nargs="+", help=_RANKING)
    parser.add_argument("--output", help="Draw the overlaps to this picture.")
    parser.add_argument("--mean", help="Write the mean ranking, by standardised scores, to this file.")
    parser = _add(commands, plot, "RANKING")
    parser.add_argument("importance", help=_RANKING)
    parser.add_argument("--output", default="importance.png", help="The picture to write (default: importance.png).")
    _add_options(parser, SelectionArguments)
    parser = _add(commands, plan, "--model_name_or_path MODEL")
    parser.add_argument("--model_name_or_path", help="The model; its configuration is enough.")
    text = "A ranking. Without it, the first layers are tuned."
    parser.add_argument("--importance", help=text)
    parser.add_argument("--lora_r", type=int, default=LORA_R, help=f"LoRA's rank (default: {LORA_R}).")
    _add_options(parser, StepArguments)
    parser = _add(commands, demo, "--output_dir OUT")
    parser.add_argument("--output_dir", help="Where to write all results.")
    return top


def _add(commands: Any, run: Callable[..., Any], usage: str) -> argparse.ArgumentParser:
    """Add a command with its function's name and description, and the arguments that it shares with others."""
    name, text = run.__name__, inspect.getdoc(run) or ""
    trl = [] if name not in TRAINING else [_TRL_SETTINGS] if name == "prune" else [_TRL_SETTINGS, _TO_TRAIN]
    parser = commands.add_parser(
        name,
        help=text.splitlines()[0],
        description=text,
        usage=f"peft-ila {name} {usage} [OPTIONS]",
        epilog=" ".join([*trl, _EXIT_CODES]),
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("--config", metavar="FILE", help="A YAML file with any of the settings.")
    if name != "demo":
        parser.add_argument("--json", action="store_true", help="Print only JSON to stdout.")
    if name in TRAINING:
        parser.add_argument("--help_all", action="store_true", help="Show all options, including TRL's, and exit.")
        parser.add_argument("--model_name_or_path", help="The model: a directory, or a name on the hub.")
        text = "The data: a `.jsonl` file in one of TRL's formats, or a name on the hub."
        parser.add_argument("--dataset_name", help=text)
        parser.add_argument("--output_dir", help="Where to write all results.")
        _add_options(parser, TRAINING[name])
    return parser


def _add_options(parser: argparse.ArgumentParser, *groups: Any) -> None:
    """Add the fields of dataclasses as options, as TRL's parser does."""
    for group in groups:
        kinds = get_type_hints(group)
        for one in fields(group):
            kind = kinds[one.name]
            while get_args(kind) and get_origin(kind) is not Literal:
                kind = get_args(kind)[-2]  # the last one before None
            how: dict[str, Any] = {"type": kind}
            if kind is bool:
                how = {"type": _truth, "nargs": "?", "const": True}
            elif get_origin(kind) is Literal:
                how = {"choices": get_args(kind)}
            default = "" if one.default in (None, False) else f" (default: {one.default})"
            parser.add_argument(f"--{one.name}", default=one.default, help=one.metadata["help"] + default, **how)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text.lower() in ("true", "yes", "1")


def _group(group: Any, args: argparse.Namespace) -> Any:
    """The options of a dataclass, as its instance."""
    return group(**{one.name: getattr(args, one.name) for one in fields(group)})


def _versions() -> str:
    """The versions of peft-ila and the libraries that its results depend on, without importing them."""
    lines = [f"peft-ila {__version__}"]
    for name in ("peft", "torch", "transformers", "trl"):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join(lines)


def _normalised(arg: str) -> str:
    """`--top-p` is `--top_p`, as in TRL's parser. The shell leaves `~` in `--output_dir=~/OUT`."""
    if not arg.startswith("--"):
        return os.path.expanduser(arg)
    flag, equals, value = arg.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{os.path.expanduser(value)}"


def parse(argv: list[str]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A command's function and its arguments, the last of which holds what is in no dataclass of TRL or ours."""
    argv = [_normalised(arg) for arg in argv]
    if argv and argv[0] in TRAINING and "--help_all" in argv:
        _trl_parser(argv[0]).print_help()
        raise SystemExit(0)
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    settings = _read_settings(args.config) if args.config else {}
    others = settings.keys() - vars(args).keys()
    args.parser.set_defaults(**{name: value for name, value in settings.items() if name not in others})
    args, unknown = parser.parse_known_args(argv)
    if args.command in TRAINING:
        _check_early(args)
        return args.run, _parse_with_trl(args.command, argv[1:], settings)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if others:
        raise ValueError(f"The `--config` file has unknown settings: {', '.join(sorted(others))}.")
    return args.run, (args,)


def _read_settings(path: str) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"The `--config` file is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"The `--config` file {path} must map settings to values.")
    return {name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in settings.items()}


def _check_early(args: argparse.Namespace) -> None:
    """Check what needs neither torch nor TRL, whose imports take seconds."""
    own = _group(TRAINING[args.command], args)
    if args.command == "tune":
        importance, selection = LayerImportance.load(required(own.importance, "importance")), own.selection()
        if selection:
            importance.select(**selection)
    required(args.model_name_or_path, "model_name_or_path")
    required(args.dataset_name, "dataset_name")


def _trl_parser(command: str) -> Any:
    """The parser of all arguments of a command, TRL's and our own."""
    try:
        from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser
    except ImportError as error:
        raise ImportError("The command line needs TRL: pip install trl") from error
    groups: list[Any] = [ScriptArguments, SFTConfig, ModelConfig, TRAINING[command]]
    parser = TrlParser(groups, prog=f"peft-ila {command}")
    if command == "prune":
        parser.add_argument("adapter", help=_ADAPTER)
    parser.add_argument("--json", action="store_true", help="Print only JSON to stdout.")
    parser.add_argument("--config", metavar="FILE", help="A YAML file with any of the settings.")
    return parser


def _parse_with_trl(command: str, argv: list[str], settings: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a command, in TRL's dataclasses and ours; `settings` are from YAML."""
    from transformers.utils import is_torch_bf16_gpu_available

    parser = _trl_parser(command)
    # SFTConfig's bf16 fails without a GPU, and at `None` it is on unless fp16 is. Its learning rate is for full
    # fine-tuning; TRL advises 2e-4 for LoRA.
    parser.set_defaults(learning_rate=None, bf16=None if is_torch_bf16_gpu_available() else False)
    defaults = vars(parser.parse_known_args([])[0]) if command == "rank" else {}  # before YAML changes them
    os.environ.update({name: str(value) for name, value in settings.pop("env", {}).items()})  # as TRL's scripts do
    if unknown := parser.set_defaults_with_config(**settings):
        raise ValueError(f"The `--config` file has unknown settings: {' '.join(unknown)}.")
    *arguments, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    _, training, _, own, others = arguments
    if training.learning_rate is None:
        training.learning_rate = type(training).learning_rate if getattr(own, "full", False) else 2e-4
    resume = str(training.resume_from_checkpoint).lower()
    if resume in ("true", "false", "none"):  # transformers takes the text for a path
        training.resume_from_checkpoint = resume == "true" or None
    if command == "rank":
        found = vars(parser.parse_args(argv))
        others.given = {name: value for name, value in found.items() if value != defaults[name]}
    return tuple(arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Entry
# ---------------------------------------------------------------------------------------------------------------------


def run(argv: list[str]) -> None:
    """Run a command and print its result."""
    command, arguments = parse(argv)
    as_json = getattr(arguments[-1], "json", False)
    # trainers print their logs to stdout
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = command(*arguments)
    if argv[0] in TRAINING:
        from accelerate import PartialState

        if not PartialState().is_main_process:
            return
    if result is not None:
        facts, text = result
        print(json.dumps(facts, indent=1, allow_nan=False) if as_json else text)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (OSError, ValueError, TypeError, ImportError)):
        text = f"{type(error).__name__}: {text} (`{TRACEBACK}=1` shows where)"
    # it may quote a file: keep control sequences from the terminal
    return "".join(character if character.isprintable() else "?" for character in text)


def main(argv: list[str] | None = None) -> None:
    """Run a command. An error prints one line to stderr and exits with 1; Ctrl-C exits with 130."""
    argv = sys.argv[1:] if argv is None else argv
    program = " ".join(["peft-ila", *argv[:1]])
    logging.basicConfig(format="%(message)s")
    logging.getLogger("peft_ila").setLevel(logging.INFO)
    # what other libraries say on each start, and what only their authors can act on
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # some encodings lack bars, such as a pipe's on Windows
    try:
        run(argv)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if TRACEBACK in os.environ:
            raise
        raise SystemExit(f"{program}: error: {_one_line(error)}") from error


if __name__ == "__main__":
    main()
