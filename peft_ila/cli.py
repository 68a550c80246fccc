"""
The command line. Settings come from dataclasses as in TRL's scripts, so each works as a flag and from YAML
(`--config`).

    peft-ila rank --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara --output_dir OUT
    peft-ila tune --importance OUT/importance.json --top_p 0.3 --model_name_or_path Qwen/Qwen2.5-0.5B \
        --dataset_name trl-lib/Capybara --output_dir TUNED
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from .card import TOP_ROWS, upload
from .config import ILAConfig
from .conversion import DECIDED_BY_SELECTION, export_adapter
from .delta import extract_lora
from .files import whole_directory, whole_file
from .importance import LayerImportance
from .recipes import RecipeFormat, recipe, write_recipe
from .training import EpsilonStability, check_settings, learn_gates
from .tuning import FrozenPrefix
from .units import Granularity

_SHARE = 0.3  # the terminal shows how sure it is that a unit belongs to this share


@dataclass
class RankArguments:
    """
    Arguments of `peft-ila rank`.

    Args:
        granularity (`str`): See [`ILAConfig`].
        adapter (`str`): A LoRA or ILA adapter to rank as it is; there is no stage 1 then.
        tuned_model (`str`), tuned_rank (`int`): A fully fine-tuned model to rank as it is, see [`extract_lora`].
        epsilon (`float`), window (`int`), patience (`int`): See [`EpsilonStability`].
        gate_steps (`int`), min_agreement (`float`): See [`learn_gates`].
    """

    granularity: Granularity = field(
        default="layer", metadata={"help": "What one gate stands for: a decoder 'layer' or a 'module'."}
    )
    epsilon: float = field(
        default=0.02, metadata={"help": "Stage 1 is stable when the smoothed loss changes by less than this."}
    )
    window: int = field(default=5, metadata={"help": "The number of logged losses to average."})
    patience: int = field(default=3, metadata={"help": "How many comparisons in a row must be stable."})
    adapter: str | None = field(
        default=None, metadata={"help": "A LoRA or ILA adapter to rank as it is, instead of fine-tuning (stage 1)."}
    )
    tuned_model: str | None = field(
        default=None,
        metadata={"help": "A model that was fully fine-tuned from the given one, to rank instead of fine-tuning."},
    )
    tuned_rank: int | None = field(
        default=None,
        metadata={"help": "Truncate the deltas of `tuned_model` to this rank; by default they are whole."},
    )
    gate_steps: int = field(default=32, metadata={"help": "The greatest number of steps of stage 2."})
    min_agreement: float = field(
        default=0.8,
        metadata={
            "help": "Stage 2 ends when the rankings from half and from all of its steps agree so well; 0: never."
        },
    )


@dataclass
class SelectionArguments:
    """What to select: exactly one of the first three, see [`LayerImportance.select`]."""

    top_p: float | None = field(default=None, metadata={"help": "The share of the units to select, in (0, 1]."})
    top_k: int | None = field(default=None, metadata={"help": "The number of units to select."})
    threshold: float | None = field(default=None, metadata={"help": "The least gate of a selected unit, in [0, 1]."})
    min_probability: float | None = field(
        default=None, metadata={"help": "Of the share or number, only units that belong to it with this probability."}
    )

    def kwargs(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("top_p", "top_k", "threshold", "min_probability")}


@dataclass
class TuneArguments(SelectionArguments):
    """Arguments of `peft-ila tune`."""

    importance: str | None = field(default=None, metadata={"help": "The ranking, as `rank` wrote it."})


@dataclass
class ConvertArguments(SelectionArguments):
    """Arguments of `peft-ila convert`."""

    output_dir: str | None = field(default=None, metadata={"help": "Where to write the file."})
    format: Literal["peft", RecipeFormat] = field(
        default="peft",
        metadata={
            "help": "'peft': `adapter_config.json`; 'axolotl', 'llamafactory', 'trl': YAML that makes that program "
            "tune the selected units by LoRA; 'axolotl-full': in full, by `unfrozen_parameters`."
        },
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
class DemoArguments:
    """Arguments of `peft-ila demo`."""

    output_dir: str | None = field(default=None, metadata={"help": "Where to write all results."})


def print_table(importance: LayerImportance) -> None:
    """Print the ranking, most important unit first, with a bar for each gate and how sure the top 30 % are."""
    gates = dict(zip(importance.units, importance.gates))
    scores = dict(zip(importance.units, importance.scores))
    spread = dict(zip(importance.units, importance.spread))
    probability = importance.probability(top_p=_SHARE) if spread else {}
    ranking = importance.ranking()
    width = max(len(unit) for unit in ranking)
    sure = f"  {'±':>5}  p(top {_SHARE:.0%})" if spread else ""
    print(f"{'rank':>4}  {'unit':<{width}}  {'score':>7}{sure}  {'gate':>5}")
    for rank, unit in enumerate(ranking[:TOP_ROWS], start=1):
        sure = f"  {spread[unit]:>5.2f}  {probability[unit]:>10.2f}" if spread else ""
        bar = "█" * round(30 * gates[unit])
        print(f"{rank:>4}  {unit:<{width}}  {scores[unit]:>7.3f}{sure}  {gates[unit]:>5.3f}  {bar}")
    if len(ranking) > TOP_ROWS:
        print(f"      … and {len(ranking) - TOP_ROWS} more")
    if spread and (open_ones := importance.coin_tosses(top_p=_SHARE)):
        print(f"In the top {_SHARE:.0%} or not by a coin toss: {', '.join(open_ones)}")


def _required(value: str | None, flag: str) -> str:
    if not value:
        raise ValueError(f"`--{flag}` is required.")
    return value


def _model_name(value: str | None, flag: str = "model_name_or_path") -> str:
    name = _required(value, flag)
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"There is no model directory {name}.")
    return name


def _lora_config(model_args: Any) -> Any:
    from trl import get_peft_config

    model_args.use_peft = True
    return get_peft_config(model_args)


def _trainer(script_args: Any, training_args: Any, model_args: Any, peft_config: Any, callbacks: list) -> Any:
    """An SFTTrainer as TRL's own script makes it."""
    from transformers import set_seed
    from trl import SFTTrainer, get_quantization_config

    from .data import load_dataset

    set_seed(training_args.seed)  # the trainer makes LoRA's first weights before it sets its seed
    name = _model_name(model_args.model_name_or_path)
    dataset = _required(script_args.dataset_name, "dataset_name")
    train_dataset = load_dataset(dataset, script_args.dataset_config, script_args.dataset_train_split)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = load_dataset(dataset, script_args.dataset_config, script_args.dataset_test_split)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    return SFTTrainer(
        model=name,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def rank(script_args: Any, training_args: Any, model_args: Any, rank_args: RankArguments) -> None:
    """
    Fine-tune until stable, learn the gates, and write OUT/importance.json, OUT/importance.png and OUT/adapter.

    With `--push_to_hub`, the adapter is uploaded with a card that holds the ranking.

    With `--resume_from_checkpoint True`, the same command goes on from what OUT holds, in either stage.
    """
    import matplotlib  # noqa: F401  better missed now than after the training

    output_dir = Path(training_args.output_dir)
    resume = _is_true(training_args.resume_from_checkpoint)
    stage_1 = output_dir / "adapter" / _STAGE_1
    min_agreement = rank_args.min_agreement or None

    check_settings(rank_args.gate_steps, min_agreement)
    if rank_args.adapter and rank_args.tuned_model:
        raise ValueError("Pass `--adapter` or `--tuned_model`, not both.")
    if rank_args.tuned_rank is not None and not rank_args.tuned_model:
        raise ValueError("`--tuned_rank` is of no use without `--tuned_model`.")
    model_args.lora_target_modules = model_args.lora_target_modules or "all-linear"
    lora_config = _lora_config(model_args)
    adapter = rank_args.adapter
    facts: dict[str, Any] = {"adapter": adapter}
    if rank_args.tuned_model:
        trust = training_args.trust_remote_code
        adapter, facts = _extract_delta(model_args, lora_config, rank_args, output_dir, trust)
    config = (
        _gated_config(adapter, rank_args.granularity)
        if adapter
        else ILAConfig.from_lora(lora_config, granularity=rank_args.granularity, gate_mode="open")
    )
    if not adapter and not training_args.resume_from_checkpoint and not (output_dir / "importance.json").exists():
        left = [stage_1, *output_dir.glob("checkpoint-*")]
        if unfinished := next((path for path in left if path.exists()), None):
            raise ValueError(
                f"{unfinished} is of a run that was not finished; go on with it by `--resume_from_checkpoint True`, "
                "or choose another `--output_dir`."
            )
    # the ranked adapter is pushed at the end, not what the trainer saves on the way
    push, training_args.push_to_hub = training_args.push_to_hub, False
    stability = EpsilonStability(rank_args.epsilon, rank_args.window, rank_args.patience)
    trainer = _trainer(script_args, training_args, model_args, config, [stability])
    is_main = trainer.is_world_process_zero()
    if is_main and not training_args.resume_from_checkpoint:
        _remove_earlier_run(output_dir, keep_adapter=adapter is not None)
    trainer.accelerator.wait_for_everyone()

    def save_adapter(importance: LayerImportance | None = None) -> None:
        # by all processes: under FSDP2 and ZeRO-3 each holds a part of the weights
        # and of the model without torch.compile's wrapper, which gives every weight another name
        model = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
        state_dict = trainer.accelerator.get_state_dict(model)
        if not is_main:
            return
        with whole_directory(output_dir / "adapter") as temporary:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(temporary, state_dict=state_dict)
            (temporary / _STAGE_1).write_text(json.dumps(facts))
            if importance is not None:
                importance.save_card(temporary)

    if adapter:
        try:
            trainer.model.load_adapter(adapter, "default", is_trainable=True)
        except RuntimeError as error:  # of tensors of other sizes
            raise ValueError(f"The adapter {adapter} does not fit {model_args.model_name_or_path}: {error}") from error
    elif resume and stage_1.exists():
        facts = json.loads(stage_1.read_text())
        trainer.model.load_adapter(str(stage_1.parent), "default", is_trainable=True)
        trainer.model.set_gate_mode("open")
    else:
        checkpoint = _checkpoint(training_args)
        if checkpoint and (ended := _ended_at(checkpoint, training_args)):  # the trainer would take a step too many
            trainer.model.load_adapter(checkpoint, "default", is_trainable=True)
            trainer.state = ended
            stability.on_train_begin(training_args, ended, trainer.control)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
        facts = {"steps": trainer.state.global_step, "stable": stability.stopped_at is not None}
        save_adapter()
    importance = learn_gates(
        trainer,
        steps=rank_args.gate_steps,
        min_agreement=min_agreement,
        resume_from_checkpoint=_last_checkpoint(output_dir / "gates") if resume else None,
    )
    importance.metadata |= {"dataset": script_args.dataset_name, "stage_1": facts}
    save_adapter(importance)
    if not is_main:
        return
    importance.save(output_dir / "importance.json")
    importance.plot(output_dir / "importance.png")
    print_table(importance)
    print(f"Wrote {output_dir}/importance.json, importance.png and adapter/.")
    if push:
        name = training_args.hub_model_id or output_dir.resolve().name
        print(upload(output_dir / "adapter", name, training_args.hub_token, training_args.hub_private_repo))


def _gated_config(adapter: str, granularity: Granularity) -> ILAConfig:
    """The configuration that puts gates on an adapter that is there already."""
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, ILAConfig):
        config = ILAConfig.from_lora(config, granularity=granularity, gate_mode="open")
    elif config.granularity != granularity:
        raise ValueError(
            f"The adapter {adapter} has one gate per {config.granularity}: pass `--granularity {config.granularity}`, "
            "or make a plain LoRA of it by `peft-ila export` first."
        )
    config.init_lora_weights = True  # the weights are loaded
    return config


def _extract_delta(
    model_args: Any, config: Any, rank_args: RankArguments, output_dir: Path, trust_remote_code: bool
) -> tuple[str, dict[str, Any]]:
    """Write the delta of a fully fine-tuned model as an adapter, once."""
    delta, report = output_dir / "delta", output_dir / "delta" / "delta.json"
    wanted = {
        "base_model": model_args.model_name_or_path,
        "revision": model_args.model_revision,
        "tuned_model": rank_args.tuned_model,
        "tuned_rank": rank_args.tuned_rank,
        "target_modules": model_args.lora_target_modules,
    }
    with PartialState().main_process_first():
        facts = json.loads(report.read_text()) if report.exists() else {}
        if not facts.items() >= wanted.items():
            with whole_directory(delta) as temporary:
                base = _model_name(model_args.model_name_or_path)
                tuned = _model_name(rank_args.tuned_model, "tuned_model")
                facts = wanted | extract_lora(
                    base,
                    tuned,
                    config,
                    temporary,
                    rank=rank_args.tuned_rank,
                    revision=model_args.model_revision,
                    trust_remote_code=trust_remote_code,
                )
                (temporary / report.name).write_text(json.dumps(facts))
    print(
        f"The adapter holds {facts['energy_kept']:.1%} of the squared norm of the target modules' deltas; "
        f"{facts['energy_outside']:.1%} of all is outside the target modules."
    )
    return str(delta), facts


# written with the adapter when stage 1 is done, so that a resumed run need not repeat it
_STAGE_1 = "stage_1.json"


def _remove_earlier_run(output_dir: Path, keep_adapter: bool) -> None:
    """Remove what an earlier run left in the directory, so that a resumed run cannot go on from it."""
    (output_dir / "importance.json").unlink(missing_ok=True)
    directories = [output_dir / "gates"]
    if (output_dir / "adapter" / _STAGE_1).exists() and not keep_adapter:  # which may be the one to rank
        directories += [output_dir / "adapter", *output_dir.glob("checkpoint-*")]
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def _is_true(value: str | bool | None) -> bool:
    return str(value).lower() == "true"


def _last_checkpoint(directory: Path) -> str | None:
    """The last checkpoint that is whole; the trainer writes `trainer_state.json` at its end."""
    checkpoints = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for checkpoint in reversed(checkpoints):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            return str(checkpoint)
        except (OSError, ValueError):
            continue  # the run was killed while it wrote this one
    return None


def _checkpoint(training_args: Any) -> str | None:
    """The checkpoint to resume from: the one that was named, or for `True` the last one in the output directory."""
    if _is_true(training_args.resume_from_checkpoint):
        return _last_checkpoint(Path(training_args.output_dir))
    return training_args.resume_from_checkpoint


def _ended_at(checkpoint: str, training_args: Any) -> Any:
    """The state of a run that ended with this checkpoint, if the arguments do not ask for more steps than it had."""
    from transformers import TrainerState

    if not (Path(checkpoint) / SAFETENSORS_WEIGHTS_NAME).exists():  # sharded by FSDP2
        return None
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    control: Any = state.stateful_callbacks.get("TrainerControl", {})
    ended = control.get("args", {}).get("should_training_stop", False)
    if training_args.max_steps > 0:
        more = training_args.max_steps > state.max_steps
    else:
        more = training_args.num_train_epochs > state.num_train_epochs
    return state if ended and not more else None


def tune(script_args: Any, training_args: Any, model_args: Any, tune_args: TuneArguments) -> None:
    """Fine-tune with a plain LoRA on the selected units and write the adapter to TUNED."""
    from transformers import AutoConfig

    importance = LayerImportance.load(_required(tune_args.importance, "importance"))
    if model_args.lora_target_modules:
        raise ValueError("`--lora_target_modules` follows from `--importance` and cannot be passed.")
    options = _lora_config(model_args).to_dict()
    for decided in ("peft_type", *DECIDED_BY_SELECTION):
        del options[decided]
    model_config = AutoConfig.from_pretrained(
        _model_name(model_args.model_name_or_path),
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    config = importance.to_lora_config(**tune_args.kwargs(), model=model_config, **options)
    trainer = _trainer(script_args, training_args, model_args, config, [FrozenPrefix()])
    trainer.train(resume_from_checkpoint=_checkpoint(training_args))
    trainer.save_model(training_args.output_dir)
    if trainer.is_world_process_zero():
        trainable, total = trainer.accelerator.unwrap_model(trainer.model).get_nb_trainable_parameters()
        print(f"Wrote a LoRA adapter with {trainable:,} of {total:,} parameters to {training_args.output_dir}.")


def convert(args: ConvertArguments, paths: argparse.Namespace) -> None:
    """Write the LoraConfig of the selected units to LORA/adapter_config.json, or the same for another program."""
    importance = LayerImportance.load(paths.importance)
    output_dir = Path(_required(args.output_dir, "output_dir"))
    lora: dict[str, Any] = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    model_config = _local_config(importance)
    if args.format == "peft":
        name = "adapter_config.json"
        config = importance.to_lora_config(**args.kwargs(), model=model_config, **lora)
        with whole_file(output_dir / name) as temporary:
            config.save_pretrained(str(temporary.parent))
    else:
        name = f"{args.format}.yaml"
        settings = recipe(importance, importance.select(**args.kwargs()), args.format, model_config, **lora)
        write_recipe(settings, output_dir / name)
    print(f"Wrote {output_dir}/{name}.")


def _local_config(importance: LayerImportance) -> Any:
    """The configuration of the ranked model, to check the conversion by injection, where it is at hand."""
    from transformers import AutoConfig

    model = importance.metadata.get("model")
    try:
        # code from the hub is not run for a check, nor asked about on the terminal
        return AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False) if model else None
    except (OSError, ValueError):
        print(f"The configuration of {model!r} is not at hand; the targets are checked by name only.", file=sys.stderr)
        return None


def export(args: ExportArguments, paths: argparse.Namespace) -> None:
    """Write an ILA adapter as a plain LoRA adapter: gates multiplied into B, closed units absent."""
    export_adapter(paths.adapter, _required(args.output_dir, "output_dir"))
    print(f"Wrote {args.output_dir}/adapter_config.json and adapter_model.safetensors.")


def compare(paths: argparse.Namespace) -> None:
    """Print overlap and rank correlation of each pair of rankings."""
    if len(paths.importance) < 2:
        raise ValueError("`compare` needs at least two rankings.")
    rankings = [LayerImportance.load(path) for path in paths.importance]
    width = max(len(str(path)) for path in paths.importance)
    print(f"{'A':<{width}}  {'B':<{width}}  overlap@75%  overlap@30%  Spearman")
    for i, a in enumerate(rankings):
        for j, b in enumerate(rankings[i + 1 :], start=i + 1):
            print(
                f"{paths.importance[i]:<{width}}  {paths.importance[j]:<{width}}  {a.overlap(b, 0.75):>11.2f}  "
                f"{a.overlap(b, 0.3):>11.2f}  {a.spearman(b):>8.2f}"
            )
    print("(by chance: 0.60 and 0.18)")


def plot(args: PlotArguments, paths: argparse.Namespace) -> None:
    """Draw the heatmap of a ranking."""
    LayerImportance.load(paths.importance).plot(args.output)
    print(f"Wrote {args.output}.")


def demo(args: DemoArguments) -> None:
    """All of it on the embedded model and data."""
    from .demo import run

    run(Path(_required(args.output_dir, "output_dir")))


_COMMANDS = ("rank", "convert", "tune", "export", "compare", "plot", "demo")


def _parse(command: str, argv: list[str]) -> tuple[Callable[..., None], tuple[Any, ...]]:
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
    arguments: Any = parser.parse_args_and_config(argv)
    return function, arguments


def main(argv: list[str] | None = None) -> None:
    """Run a command; bad input ends it with one line on stderr and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    top = argparse.ArgumentParser(prog="peft-ila", description="Rank the layers of a model, tune the important ones.")
    top.add_argument("command", choices=_COMMANDS, help="`peft-ila COMMAND --help` lists its options")
    command = top.parse_args(argv[:1]).command
    logging.basicConfig(format="%(message)s")
    logging.getLogger("peft_ila").setLevel(logging.INFO)
    try:
        function, arguments = _parse(command, argv[1:])
        function(*arguments)
    except (OSError, ValueError, TypeError, ImportError) as error:
        message = " ".join(str(error).split())
        raise SystemExit(f"peft-ila {command}: error: {message}") from error


if __name__ == "__main__":
    main()
