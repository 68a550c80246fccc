"""The settings of the workflows as dataclasses, for the command line and YAML, besides TRL's own."""

import re
from dataclasses import dataclass, field, fields
from typing import Any

from ..choices import Method, PruneGranularity
from ..units import Granularity


def given(arguments: Any, names: str) -> str:
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

    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Held-out data for `eval_strategy`: a `.jsonl` file, or a name on the hub. By default "
            "`dataset_test_split` of the training data."
        },
    )


@dataclass
class RankArguments(EvaluationArguments):
    """
    Arguments of `peft-ila rank`.

    Args:
        eval_dataset_name (`str`): Held-out data for stage 1.
        granularity (`str`): See [`ILAConfig`].
        adapter (`str`): A LoRA or ILA adapter to rank as it is, without stage 1.
        tuned_model, tuned_rank: A fully fine-tuned model to rank as it is, see [`extract_lora`].
        epsilon, window, patience: See [`EpsilonStability`], with its defaults.
        method, gate_steps, min_agreement, initial_score, gate_learning_rate, budget: See [`learn_gates`].
    """

    granularity: Granularity = field(
        default="layer", metadata={"help": "One gate per decoder 'layer' or per 'module'."}
    )
    epsilon: float | None = field(
        default=None,
        metadata={"help": "Stage 1 is stable when the smoothed loss changes by less than this (0.02 by default)."},
    )
    window: int | None = field(
        default=None, metadata={"help": "The number of logged losses to average (5 by default)."}
    )
    patience: int | None = field(
        default=None, metadata={"help": "The number of stable comparisons in a row (3 by default)."}
    )
    adapter: str | None = field(
        default=None, metadata={"help": "A LoRA or ILA adapter to rank as it is, without stage 1."}
    )
    tuned_model: str | None = field(
        default=None,
        metadata={"help": "A fully fine-tuned version of the model, to rank as it is, without stage 1."},
    )
    tuned_rank: int | None = field(
        default=None,
        metadata={"help": "Truncate the deltas of `tuned_model` to this rank; by default, keep them whole."},
    )
    method: Method | None = field(
        default=None,
        metadata={
            "help": "'untrained' (default) measures a fresh adapter, without training, to choose what to tune. "
            "'attribution' fine-tunes until stable (stage 1), then measures the worth of each delta, to see what "
            "fine-tuning changes; the default with `adapter`, `tuned_model` or a setting of stage 1. 'descent' learns "
            "the scores after stage 1, as in the paper."
        },
    )
    gate_steps: int | None = field(
        default=None,
        metadata={
            "help": "The maximum number of steps of stage 2; by default 32 (attribution), 16 "
            "(untrained) or 128 (descent)."
        },
    )
    min_agreement: float = field(
        default=0.8,
        metadata={
            "help": "End the search when the rankings from half and all of its steps agree this well; 0: never."
        },
    )
    initial_score: float | None = field(
        default=None, metadata={"help": "Descent: the initial score (4.0 by default)."}
    )
    gate_learning_rate: float | None = field(
        default=None, metadata={"help": "Descent: the learning rate of the scores (0.1 by default)."}
    )
    budget: float | str | None = field(  # text on the command line, where 1.0 is a share and 1 a number
        default=None,
        metadata={"help": "Descent: the units to keep, as a share such as 0.3 or 1.0, or a number such as 8."},
    )

    def stability_settings(self) -> dict[str, Any]:
        """Arguments of [`EpsilonStability`]."""
        settings = {"epsilon": self.epsilon, "window": self.window, "patience": self.patience}
        given = {name: value for name, value in settings.items() if value is not None}
        if given and self.method == "untrained":
            raise ValueError(
                f"`--{next(iter(given))}` ends stage 1, which `--method untrained` does not have. To fine-tune until "
                "stable, pass `--method attribution`."
            )
        return given

    def _method(self) -> Method:
        learned = self.adapter or self.tuned_model or self.stability_settings()
        return self.method or ("attribution" if learned else "untrained")

    def gate_settings(self) -> dict[str, Any]:
        """Arguments of [`learn_gates`]."""
        return {
            "method": self._method(),
            "steps": self.gate_steps,
            "min_agreement": self.min_agreement or None,
            "initial_score": self.initial_score,
            "learning_rate": self.gate_learning_rate,
            "budget": self._budget(),
        }

    def _budget(self) -> float | None:
        if not isinstance(self.budget, str):
            return self.budget
        try:
            return int(self.budget) if self.budget.isdecimal() else float(self.budget)
        except ValueError:
            message = f"`--budget` must be a number of units or a share of them, got {short(self.budget)}."
            raise ValueError(message) from None


@dataclass
class PruneArguments(EvaluationArguments):
    """Arguments of `peft-ila prune`, see [`prune`]."""

    top_p: float | None = field(
        default=None, metadata={"help": "The share of the adapter's parameters to keep, in (0, 1]."}
    )
    min_kept: float | None = field(
        default=None,
        metadata={"help": "Keep the smallest share that keeps this part of the gain in held-out loss, in (0, 1]."},
    )
    granularity: PruneGranularity = field(
        default="component",
        metadata={"help": "What is kept as a whole: a 'component' (one rank-1 direction), a 'module' or a 'layer'."},
    )
    measure_steps: int = field(
        default=16, metadata={"help": "The number of training steps to measure on, in each round."}
    )
    rounds: int = field(default=3, metadata={"help": "The number of rounds to select in."})
    gate_steps: int = field(
        default=24, metadata={"help": "The number of training steps to learn the gates on; 0: gates stay at 1."}
    )
    gate_learning_rate: float = field(default=0.05, metadata={"help": "Adam's learning rate for the gates."})
    uniform_rank: bool = field(
        default=False, metadata={"help": "Write all modules with one rank, padded with zeros, not with their own."}
    )

    def settings(self) -> dict[str, Any]:
        """As [`prune`] takes them."""
        settings = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "eval_dataset_name"}
        return {"steps": settings.pop("measure_steps"), **settings}


@dataclass
class SelectionArguments:
    """The selection: exactly one of the first three, see [`LayerImportance.select`]."""

    top_p: float | None = field(default=None, metadata={"help": "The share of units to select, in (0, 1]."})
    top_k: int | None = field(default=None, metadata={"help": "The number of units to select."})
    threshold: float | None = field(default=None, metadata={"help": "The minimum gate of a selected unit, in [0, 1]."})
    min_probability: float | None = field(
        default=None,
        metadata={"help": "Keep only units that belong to the share or number with at least this probability."},
    )

    def selection(self) -> dict[str, Any]:
        """Arguments of [`LayerImportance.select`]."""
        return {name: getattr(self, name) for name in ("top_p", "top_k", "threshold", "min_probability")}


@dataclass
class BudgetArguments(SelectionArguments):
    """The selection, or a memory budget that decides it, see [`select_within`]."""

    memory_budget: str | None = field(
        default=None,
        metadata={
            "help": "Select the most important units that fit into a size such as '24GB' or '24GiB'. Leave room for "
            "the GPU's context, the kernels' workspaces and the allocator."
        },
    )

    def selection(self) -> dict[str, Any]:
        """Arguments of [`LayerImportance.select`], none with a memory budget."""
        selection = super().selection()
        if self.memory_budget is None:
            return selection
        if others := [f"`--{name}`" for name, value in selection.items() if value is not None]:
            raise ValueError(f"`--memory_budget` decides the selection: leave out {' and '.join(others)}.")
        return {}


LORA_R = 16  # TRL's default


@dataclass
class StepArguments:
    """The training step whose memory is counted, see [`plan`], with TRL's defaults."""

    per_device_train_batch_size: int = field(default=8, metadata={"help": "The number of examples per step."})
    max_length: int = field(default=1024, metadata={"help": "The number of tokens per example."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the linear layers to NF4."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Whether to recompute activations in the backward pass, as TRL does."}
    )

    def step(self) -> dict[str, Any]:
        """Arguments of [`plan`]."""
        return {
            "batch_size": self.per_device_train_batch_size,
            "max_length": self.max_length,
            "load_in_4bit": self.load_in_4bit,
            "gradient_checkpointing": self.gradient_checkpointing,
        }


@dataclass
class TuneArguments(EvaluationArguments, BudgetArguments):
    """Arguments of `peft-ila tune`."""

    importance: str | None = field(
        default=None, metadata={"help": "A ranking written by `rank`, or the name of a published one."}
    )
    full: bool = field(
        default=False,
        metadata={"help": "Train the selected units' own weights instead of a LoRA, and freeze all others."},
    )


def required(value: str | None, flag: str) -> str:
    if not value:
        raise ValueError(f"`--{flag}` is required.")
    return value


def short(value: object) -> str:
    """A value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
