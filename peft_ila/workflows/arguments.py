"""The settings of the workflows as dataclasses, for the command line and YAML, besides TRL's own."""

import re
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from ..choices import Method, PruneGranularity
from ..units import Granularity

# ruff: noqa: RUF009  `option` makes a new field on each call
LORA_R = 16  # TRL's default


def option(help: str, default: Any = None) -> Any:
    """A field with its help, where parsers look for it."""
    return field(default=default, metadata={"help": help})


def given(arguments: Any, names: str = ".*") -> str:
    """The flags that differ from their default, for a message; `names` is a pattern."""
    changed = [
        one.name
        for one in fields(arguments)
        if re.fullmatch(names, one.name) and getattr(arguments, one.name) != one.default
    ]
    return " and ".join(f"`--{name}`" for name in changed)


@dataclass
class EvaluationArguments:
    """The held-out data."""

    eval_dataset_name: str | None = option(
        "Held-out data for `eval_strategy`: a `.jsonl` file, or a name on the hub. By default `dataset_test_split` of "
        "the training data."
    )


@dataclass
class RankArguments(EvaluationArguments):
    """
    Arguments of `peft-ila rank`, see [`learn_gates`], [`EpsilonStability`] and [`ILAConfig`].

    Raises:
        ValueError: Arguments contradict each other.
    """

    granularity: Granularity = option("One gate per decoder 'layer' or per 'module'.", "layer")
    epsilon: float | None = option(
        "Stage 1 is stable when the smoothed loss changes by less than this (0.02 by default)."
    )
    window: int | None = option("The number of logged losses to average (5 by default).")
    patience: int | None = option("The number of stable comparisons in a row (3 by default).")
    adapter: str | None = option("A LoRA or ILA adapter to rank as it is, without stage 1.")
    tuned_model: str | None = option("A fully fine-tuned version of the model, to rank as it is, without stage 1.")
    tuned_rank: int | None = option("Truncate the deltas of `tuned_model` to this rank; by default, keep them whole.")
    method: Method | None = option(
        "'untrained' (default) measures a fresh adapter, without training, to choose what to tune. 'attribution' "
        "fine-tunes until stable (stage 1), then measures the worth of each delta, to see what fine-tuning changes; "
        "the default with `adapter`, `tuned_model` or a setting of stage 1. 'descent' learns the scores after stage "
        "1, as in the paper."
    )
    gate_steps: int | None = option(
        "The maximum number of steps of stage 2; by default 32 (attribution), 16 (untrained) or 128 (descent)."
    )
    min_agreement: float = option(
        "End the search when the rankings from half and all of its steps agree this well; 0: never.", 0.8
    )
    initial_score: float | None = option("Descent: the initial score (4.0 by default).")
    gate_learning_rate: float | None = option("Descent: the learning rate of the scores (0.1 by default).")
    # text on the command line, where 1.0 is a share and 1 a number
    budget: float | str | None = option(
        "Descent: the units to keep, as a share such as 0.3 or 1.0, or a number such as 8."
    )

    def __post_init__(self) -> None:
        if self.adapter and self.tuned_model:
            raise ValueError("Pass `--adapter` or `--tuned_model`, not both.")
        if self.tuned_rank is not None and not self.tuned_model:
            raise ValueError("`--tuned_rank` needs `--tuned_model`.")
        if self.method != "untrained":
            return
        if self.adapter or self.tuned_model:
            raise ValueError(
                "`--method untrained` ranks by a fresh adapter: leave out `--adapter` and `--tuned_model`."
            )
        if stability := self.stability_settings():
            raise ValueError(
                f"`--{next(iter(stability))}` ends stage 1, which `--method untrained` does not have. To fine-tune "
                "until stable, pass `--method attribution`."
            )

    def stability_settings(self) -> dict[str, Any]:
        """Arguments of [`EpsilonStability`]."""
        settings = {"epsilon": self.epsilon, "window": self.window, "patience": self.patience}
        return {name: value for name, value in settings.items() if value is not None}

    def gate_settings(self) -> dict[str, Any]:
        """Arguments of [`learn_gates`]."""
        learned = self.adapter or self.tuned_model or self.stability_settings()
        return {
            "method": self.method or ("attribution" if learned else "untrained"),
            "steps": self.gate_steps,
            "min_agreement": self.min_agreement or None,
            "initial_score": self.initial_score,
            "learning_rate": self.gate_learning_rate,
            "budget": yaml.safe_load(self.budget) if isinstance(self.budget, str) else self.budget,
        }


@dataclass
class PruneArguments:
    """Arguments of `peft-ila prune`, see [`prune`]."""

    eval_dataset_name: str | None = option(
        "Held-out data: a `.jsonl` file, or a name on the hub. They decide how much is kept; without them, nothing is "
        "checked."
    )
    top_p: float | None = option("The share of the adapter's parameters to keep, in (0, 1].")
    min_kept: float | None = option(
        "Keep the smallest share that keeps this part of the gain in held-out loss, in (0, 1]."
    )
    granularity: PruneGranularity = option(
        "What is kept as a whole: a 'component' (one rank-1 direction), a 'module' or a 'layer'.", "component"
    )
    measure_steps: int = option("The number of training steps to measure on, in each round.", 16)
    rounds: int = option("The number of rounds to select in.", 3)
    gate_steps: int = option("The number of training steps to learn the gates on; 0: gates stay at 1.", 24)
    gate_learning_rate: float = option("Adam's learning rate for the gates.", 0.05)
    uniform_rank: bool = option("Write all modules with one rank, padded with zeros, not with their own.", False)

    def settings(self) -> dict[str, Any]:
        """As [`prune`] takes them."""
        settings = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "eval_dataset_name"}
        return {"steps": settings.pop("measure_steps"), **settings}


@dataclass
class SelectionArguments:
    """The selection: exactly one of the first three, see [`LayerImportance.select`]."""

    top_p: float | None = option("The share of units to select, in (0, 1].")
    top_k: int | None = option("The number of units to select.")
    threshold: float | None = option("The minimum gate of a selected unit, in [0, 1].")
    min_probability: float | None = option(
        "Keep only units that belong to the share or number with at least this probability."
    )

    def selection(self) -> dict[str, Any]:
        """Arguments of [`LayerImportance.select`]."""
        return {one.name: getattr(self, one.name) for one in fields(SelectionArguments)}


@dataclass
class BudgetArguments(SelectionArguments):
    """The selection, or a memory budget that decides it, see [`select_within`]."""

    memory_budget: str | None = option(
        "Select the most important units that fit into a size such as '24GB' or '24GiB'. Leave room for the GPU's "
        "context, the kernels' workspaces and the allocator."
    )

    def selection(self) -> dict[str, Any]:
        """Arguments of [`LayerImportance.select`], none with a memory budget."""
        if self.memory_budget is None:
            return super().selection()
        if others := given(self, "top_p|top_k|threshold|min_probability"):
            raise ValueError(f"`--memory_budget` decides the selection: leave out {others}.")
        return {}


@dataclass
class StepArguments:
    """The training step whose memory is counted, see [`plan`], with TRL's defaults."""

    per_device_train_batch_size: int = option("The number of examples per step.", 8)
    max_length: int = option("The number of tokens per example.", 1024)
    load_in_4bit: bool = option("Quantise the linear layers to NF4.", False)
    gradient_checkpointing: bool = option("Whether to recompute activations in the backward pass, as TRL does.", True)

    def step(self) -> dict[str, Any]:
        """Arguments of [`plan`]."""
        return {
            "batch_size": self.per_device_train_batch_size,
            "max_length": self.max_length,
            "load_in_4bit": self.load_in_4bit,
            "gradient_checkpointing": self.gradient_checkpointing,
        }


@dataclass
class LoraArguments:
    """LoRA's options in a configuration file."""

    lora_r: int = option("LoRA's rank.", LORA_R)
    lora_alpha: int = option("LoRA's alpha.", 32)
    lora_dropout: float = option("LoRA's dropout.", 0.0)

    def lora(self) -> dict[str, Any]:
        """Arguments of [`LayerImportance.to_lora_config`]."""
        if self.lora_r < 1:
            raise ValueError(f"`--lora_r` must be at least 1, got {self.lora_r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`--lora_dropout` must be in [0, 1), got {self.lora_dropout}.")
        return {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}


@dataclass
class TuneArguments(EvaluationArguments, BudgetArguments):
    """Arguments of `peft-ila tune`."""

    importance: str | None = option("A ranking written by `rank`, or the name of a published one.")
    full: bool = option("Train the selected units' own weights instead of a LoRA, and freeze all others.", False)


def required(value: str | None, flag: str) -> str:
    if not value:
        raise ValueError(f"`--{flag}` is required.")
    return value


def short(value: object) -> str:
    """A value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
