"""Pruning a trained adapter: which directions of its deltas to keep, and the smaller adapter on disk."""

import json
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import Trainer

from ..choices import PruneGranularity, Ranks
from ..files import whole_directory
from ..ranking.card import add_section
from ..ranking.importance import LayerImportance
from ..ranking.plotting import FONT, heatmap, new_figure, title_of, write
from ..ranking.validation import is_integer
from ..search.gates import check_trained, rankable
from ..search.measurement import FACTORS, measuring
from ..search.pruning import Found, Kept, Search
from ..tuner.model import ILAModel

logger = logging.getLogger(__name__)

RESULT = "pruning.json"
PICTURES = {"ranks.png": "Kept rank of each module", "kept.png": "Kept gain by share of the parameters"}
FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RESULT, "importance.json", *PICTURES, "README.md")


@dataclass
class Pruning:
    """
    What [`prune`] has kept of an adapter.

    Args:
        share: The share of the adapter's parameters that is kept.
        ranks: The rank that is kept of each module, in the order of the model; 0 where nothing is.
        full_ranks: The ranks before.
        directions: All directions, the most valuable first, each with its `module`, `singular_value`, `attribution`,
            `parameters`, and its `gate`, which is 0 if the direction is not kept.
        importance: The modules, ranked by the sums of their directions' attributions.
        curve: What each share keeps after one round, with gates of 1. Empty without held-out data.
        result: What the pruned adapter keeps. `None` without held-out data.
        base_loss: The held-out loss without the deltas, but with `modules_to_save` and biases. `None` without held-out
            data.
        settings: The settings of [`prune`].
    """

    share: float
    ranks: dict[str, int]
    full_ranks: dict[str, int]
    directions: list[dict[str, Any]]
    importance: LayerImportance
    curve: list[Kept]
    result: Kept | None
    base_loss: float | None
    settings: dict[str, Any]


def prune(
    trainer: Trainer,
    output_dir: str | os.PathLike[str] | None = None,
    top_p: float | None = None,
    min_kept: float | None = None,
    granularity: PruneGranularity = "component",
    steps: int = 16,
    rounds: int = 3,
    gate_steps: int = 24,
    gate_learning_rate: float = 0.05,
    uniform_rank: bool = False,
    seed: int | None = None,
) -> Pruning:
    """
    Keep the part of a trained adapter that matters, by the trainer's own data and loss.

    The weight delta of each module is split into its singular directions. The attribution −∂L/∂γ of each direction is
    measured on training batches, at γ = 0 for all. The directions with the most attribution per parameter are kept.
    This is done in rounds: a part of the share is switched on, and the rest is measured again. Then one real gate γ is
    learned for each kept direction, with A and B frozen, and multiplied into B. With held-out data, a step that raises
    the held-out loss is taken back.

    Afterwards the trainer's model is pruned, with open gates. After an error the adapter is as before.

    ```py
    >>> model = ILAModel.from_lora(PeftModel.from_pretrained(base_model, "my_lora"))
    >>> trainer = SFTTrainer(model, train_dataset=train, eval_dataset=held_out)
    >>> pruning = prune(trainer, "my_small_lora")  # writes a plain LoRA adapter
    ```

    Args:
        trainer ([`~transformers.Trainer`]):
            Any trainer whose model has one active, trained ILA adapter. Its `eval_dataset` is the held-out data.
        output_dir (`str`, *optional*):
            Where to write the pruned adapter as a plain LoRA adapter, with `pruning.json`, `importance.json`, pictures
            of the kept ranks and of the curve, and a model card.
        top_p (`float`, *optional*): The share of the adapter's parameters to keep, in (0, 1].
        min_kept (`float`, *optional*):
            Keep the smallest share that keeps at least this part of the gain in held-out loss, in (0, 1]. Without
            `top_p` and `min_kept`, held-out data decide: the smallest share whose loss is at most one standard error
            of the paired differences above the best loss. Without held-out data a quarter is kept.
        granularity (`str`): What is kept as a whole: `"component"` (one direction), `"module"` or `"layer"`.
        steps (`int`): How many training steps to measure on in each round.
        rounds (`int`): How many rounds to select in.
        gate_steps (`int`): How many training steps to learn the gates on; 0 leaves the gates at 1.
        gate_learning_rate (`float`): Adam's learning rate for the gates; it falls to 0.
        uniform_rank (`bool`): Write all modules with one rank, padded with zeros, for programs that take no other.
        seed (`int`, *optional*): For the order of the data, by default the trainer's.

    Raises:
        OSError: A file cannot be written.
        TypeError: The trainer's model is not an ILA model.
        ValueError: A setting is out of range; the adapter is untrained, masked or merged, one of DoRA, of experts or
            of convolutions, is sharded by FSDP2, or does not lower the loss; or `output_dir` holds another adapter.
    """
    settings: dict[str, Any] = {"top_p": top_p, "min_kept": min_kept, "granularity": granularity, "steps": steps}
    settings |= {"rounds": rounds, "gate_steps": gate_steps, "gate_learning_rate": gate_learning_rate}
    settings = {name: value.item() if hasattr(value, "item") else value for name, value in settings.items()}  # NumPy's
    check_prune_settings(**settings)
    if trainer.accelerator.is_fsdp2:
        raise ValueError(
            "FSDP2 shards the directions of an adapter. Save it by `trainer.save_model(path)`, and prune it in one "
            "process or under DDP."
        )
    ila = rankable(trainer)
    check_trained(ila.is_trained(), "attribution")
    if min_kept is not None and trainer.eval_dataset is None:
        raise ValueError("`min_kept` needs held-out data: give the trainer an `eval_dataset`, or pass `top_p`.")
    if isinstance(trainer.eval_dataset, dict):
        raise ValueError("The trainer's `eval_dataset` is a dict of data sets; give it one of them to prune by.")
    if output_dir is not None:
        check_pruned_output(output_dir)
    options = dict(settings)
    settings["seed"] = trainer.args.seed if seed is None else int(seed)
    with measuring(trainer, ila, seed, FACTORS) as measurement:
        found = Search(trainer, ila, measurement, options.pop("granularity")).run(**options)
        pruning = summarised(ila, found, settings)
        if output_dir is not None and trainer.is_world_process_zero():  # within: what cannot be written is not lost
            _save(ila, pruning, Path(output_dir), "uniform" if uniform_rank else "mixed")
    return pruning


def check_prune_settings(
    top_p: float | None,
    min_kept: float | None,
    granularity: str,
    steps: int,
    rounds: int,
    gate_steps: int,
    gate_learning_rate: float,
    uniform_rank: bool = False,
) -> None:
    """Check arguments of [`prune`], for callers that have other work to do before."""
    if top_p is not None and min_kept is not None:
        raise ValueError("Pass `top_p` or `min_kept`, not both.")
    for name, share in (("top_p", top_p), ("min_kept", min_kept)):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"`{name}` must be in (0, 1], got {share}.")
    if granularity not in get_args(PruneGranularity):
        raise ValueError(f"`granularity` must be one of {get_args(PruneGranularity)}, got {granularity!r}.")
    for name, number, least in (("steps", steps, 1), ("rounds", rounds, 1), ("gate_steps", gate_steps, 0)):
        if not is_integer(number) or number < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {number}.")
    if not 0 < gate_learning_rate < math.inf:
        raise ValueError(f"`gate_learning_rate` must be greater than 0, got {gate_learning_rate}.")


def check_pruned_output(output_dir: str | os.PathLike[str], adapter: Path | None = None) -> None:
    """Check, before any work, that no other adapter would be replaced, nor the one that is pruned."""
    directory = Path(output_dir)
    other = (directory / CONFIG_NAME).exists() and not (directory / RESULT).exists()
    if other or (adapter and adapter.resolve() == directory.resolve()):
        raise ValueError(f"{directory} holds an adapter that would be replaced; choose another `output_dir`.")


def summarised(ila: ILAModel, found: Found, settings: dict[str, Any]) -> Pruning:
    """What was found, by direction and by module."""
    directions = found.directions
    columns = (directions.singular_values, found.worth, directions.sizes, found.gates)
    names = ("module", "singular_value", "attribution", "parameters", "gate")
    rows = [dict(zip(names, row)) for row in zip(directions.modules, *(column.tolist() for column in columns))]
    by_module: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_module.setdefault(row["module"], []).append(row)
    worth = [sum(row["attribution"] for row in own) for own in by_module.values()]
    mean = sum(worth) / len(worth)
    ranking = ila.layer_importance()
    facts = {"granularity": "module", "learn_gates": {"method": "attribution"}, "prune": settings}
    return Pruning(
        share=float(directions.sizes[found.gates != 0].sum() / directions.sizes.sum()),
        ranks={module: sum(row["gate"] != 0 for row in own) for module, own in by_module.items()},
        full_ranks={module: len(own) for module, own in by_module.items()},
        directions=sorted(rows, key=lambda row: -row["attribution"] / row["parameters"]),
        importance=LayerImportance(
            units=list(by_module),
            scores=[value / mean - 1 for value in worth],
            metadata=ranking.metadata | facts,
            lookalikes=ranking.lookalikes,
        ),
        curve=found.held_out.curve() if found.held_out else [],
        result=found.result,
        base_loss=found.held_out.base if found.held_out else None,
        settings=settings,
    )


def _save(ila: ILAModel, pruning: Pruning, directory: Path, ranks: Ranks) -> None:
    """Write the pruned adapter and what is known of it, whole or not at all."""
    with whole_directory(directory, last=CONFIG_NAME) as temporary:
        ila.to_lora(temporary, ranks=ranks)
        pruning.importance.save(temporary / "importance.json")
        content = {key: value for key, value in asdict(pruning).items() if key != "importance"}
        (temporary / RESULT).write_text(json.dumps(content, indent=1), encoding="utf-8")
        try:
            draw(pruning, temporary)
        except ImportError as error:
            logger.warning(f"The pictures are left out. {error}")
        add_section(temporary, "Pruning", _card(pruning, temporary))
        stale = [name for name in PICTURES if not (temporary / name).exists()]
    for name in stale:  # of an earlier call
        (directory / name).unlink(missing_ok=True)


def draw(pruning: Pruning, directory: Path) -> None:
    """Draw the kept rank of each module, and with held-out data what each share keeps."""
    title = title_of("kept rank of the modules", pruning.importance.metadata["model"])
    heatmap(pruning.ranks, "kept rank", title, directory / "ranks.png")
    if pruning.result is None:
        return
    path = directory / "kept.png"
    figure = new_figure(path)
    from matplotlib.ticker import PercentFormatter

    figure.set_size_inches(6, 3.4)
    axes = figure.subplots()
    shares, gains = zip(*((point.share, point.gain) for point in pruning.curve))
    axes.plot(shares, gains, marker="o", ms=4, label="one round, gates of 1")
    axes.plot(pruning.share, pruning.result.gain, "k*", ms=11, label="the pruned adapter")
    axes.set_xlabel("share of the adapter's parameters", fontsize=FONT)
    axes.set_ylabel("share of the gain kept", fontsize=FONT)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(labelsize=FONT)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=FONT, frameon=False, loc="lower right")
    write(figure, path)


def pruning_table(pruning: Pruning) -> str:
    """The curve, a line for each share, and the summary."""
    rows = [f"{point.share:>9.0%}  {point.loss:>13.4f}  {point.gain:>9.3f}" for point in pruning.curve]
    return "\n".join([*(["    share  held-out loss  kept gain", *rows] if rows else []), _summary(pruning)])


def _summary(pruning: Pruning) -> str:
    modules = sum(rank > 0 for rank in pruning.ranks.values())
    text = f"Kept {pruning.share:.1%} of the adapter's parameters, in {modules} of {len(pruning.ranks)} modules."
    if pruning.result is None:
        return f"{text} There was no held-out data, so nothing was checked."
    return (
        f"{text} They keep {pruning.result.gain:.1%} of its gain in held-out loss: {pruning.result.loss:.4f}, "
        f"{pruning.curve[-1].loss:.4f} with the whole adapter, {pruning.base_loss:.4f} without."
    )


def _card(pruning: Pruning, directory: Path) -> str:
    lines = [f"{_summary(pruning)} By [peft-ila](https://huggingface.co/papers/2410.17875); figures: `{RESULT}`.", ""]
    for name, text in PICTURES.items():
        if (directory / name).exists():
            lines += [f"![{text}]({name})", ""]
    if pruning.curve:
        lines += ["| share of the parameters | held-out loss | part of the gain |", "|---|---|---|"]
        lines += [f"| {point.share:.1%} | {point.loss:.4f} | {point.gain:.3f} |" for point in pruning.curve]
    return "\n".join(lines).rstrip() + "\n"
