"""The most important units that fit into a GPU's memory: `--memory_budget`."""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import PretrainedConfig

from ..export.skeleton import meta_skeleton
from ..ranking.importance import LayerImportance
from ..units import split_layer
from .arguments import LORA_R, StepArguments
from .plan import ADAMW, Memory, Step

logger = logging.getLogger(__name__)

Peaks = tuple[int, int]  # bytes, see `Memory.peaks`


def select_within(
    config: PretrainedConfig,
    importance: LayerImportance,
    memory_budget: int | str,
    batch_size: int = StepArguments.per_device_train_batch_size,
    max_length: int = StepArguments.max_length,
    load_in_4bit: bool = StepArguments.load_in_4bit,
    gradient_checkpointing: bool = StepArguments.gradient_checkpointing,
    dtype: torch.dtype = torch.bfloat16,
    r: int = LORA_R,
    **lora: Any,
) -> list[str]:
    """
    The units with the greatest total importance whose tuning fits into a memory budget, most important first.

    The lowest selected unit decides how far the backward pass goes, and so how many activations are kept. The search
    tries each unit as the lowest and fills the rest of the budget with units above it, by importance per byte. It
    returns the best selection only if the count of [`plan`] fits; otherwise it corrects its estimate and repeats.
    Units of equal size, such as most decoder layers, get the greatest possible total. Modules, whose sizes differ, can
    miss it. Units without importance are left out.

    The importance adds up and is not negative. For an attribution or a fresh adapter, it is the unit's share of the
    total, score + 1 (in shares of a mean unit), or 0 if the share is negative, since such a delta does harm. For other
    scores, it is the gate σ(score).

    Args:
        config ([`~transformers.PretrainedConfig`]): The configuration of the ranked model, a causal language model.
        importance ([`LayerImportance`]): The ranking.
        memory_budget (`int` or `str`):
            Bytes, or a size such as `"24GB"` (10⁹ bytes) or `"24GiB"`. Leave room for the memory that is not counted,
            see [`Memory`].
        batch_size, max_length, load_in_4bit, gradient_checkpointing, dtype:
            The training step, see [`plan`]. With checkpointing, the inputs of all layers count, also those below the
            lowest unit, which the callback [`FrozenPrefix`] avoids.
        r (`int`): LoRA's rank.
        **lora: Other options of [`~peft.LoraConfig`].

    Returns:
        `list[str]`: The `units` for [`LayerImportance.to_lora_config`].

    Raises:
        ValueError: The budget is not a size or too small for any unit; no unit is important; or see [`plan`].
    """
    budget = size_in_bytes(memory_budget)
    lora["r"] = r
    worth = {unit: value for unit, value in zip(importance.units, additive(importance)) if value > 0}
    if not worth:
        raise ValueError("The ranking has no unit of positive importance, so none can be selected.")
    importance.to_lora_config(top_p=1.0, model=config, **lora)  # checks that the ranking is of this model
    skeleton = meta_skeleton(config, importance.units)
    step = Step(skeleton, batch_size, max_length, load_in_4bit, gradient_checkpointing, dtype)
    counts = _Counts(step, importance, lora)
    selected = list(worth)
    if counts.memory(selected).total > budget:
        selected = _search(counts, worth, budget)
    memory = counts.memory(selected)
    logger.info(
        f"{len(selected)} of {len(importance.units)} units fit into {budget / 1e9:.2f} GB: they need "
        f"{memory.total / 1e9:.2f} GB."
    )
    return importance.select(units=selected)


def size_in_bytes(size: int | str) -> int:
    """Bytes of a number or a string such as `"24GB"`, `"24GiB"` or `"24000000000"`."""
    try:
        text = str(size).strip().upper()  # accelerate takes "24gb" for gigabits
        return convert_file_size_to_int(int(text) if text.isdecimal() else text)
    except (ValueError, OverflowError):
        raise ValueError(
            f"The memory budget must be a size such as '24GB', '24GiB' or a number of bytes, got {str(size)[:80]!r}."
        ) from None


def additive(importance: LayerImportance) -> list[float]:
    """The importance of each unit in values that add up and are not negative, see [`select_within`]."""
    if "mean_of" in importance.metadata:
        least = min(importance.scores)  # standardised scores have no known zero
        return [score - least for score in importance.scores]
    facts = importance.metadata.get("learn_gates")
    if isinstance(facts, dict) and facts.get("method") in ("attribution", "untrained"):
        return [max(0.0, score + 1) for score in importance.scores]
    return importance.gates


class _Counts:
    """The memory of selections: counted exactly, or estimated as a sum."""

    def __init__(self, step: Step, importance: LayerImportance, lora: Mapping[str, Any]) -> None:
        self._step = step
        self._importance = importance
        self._lora = lora
        self._counted: dict[frozenset[str], Memory] = {}

    def memory(self, units: Sequence[str]) -> Memory:
        """The exact count."""
        key = frozenset(units)
        if key not in self._counted:
            self._counted[key] = self._step.memory(self._config(units))
        return self._counted[key]

    def cost_by_unit(self, units: Sequence[str]) -> tuple[dict[str, Peaks], dict[str, Peaks]]:
        """
        The estimated memory of any selection of `units`, as a sum.

        Returns:
            The part of each unit in each of [`Memory.peaks`], in the order of the forward pass; and the memory of the
            rest if this unit is the lowest.
        """
        at: dict[str, list[str]] = {}  # a parameter counts where its module is entered
        for unit in units:
            at.setdefault(unit.rpartition(".")[0] if unit in self._importance.parameters else unit, []).append(unit)
        trained, kept = self._step.memory_by_module(self._config(units), list(at))
        first = next(iter(kept))
        _, without = self._step.memory_by_module(self._config(at[first][:1]), list(at))
        own: dict[str, Peaks] = {}
        rest: dict[str, Peaks] = {}
        layers: dict[Any, tuple[str, str]] = {}
        for place, following in pairwise(kept):
            added = (kept[following] - kept[place]) - (without[following] - without[place])
            held = trained[place] * 4 * (1 + ADAMW) + max(0, added)
            for unit in at[place]:
                own[unit] = (held // len(at[place]), (held + trained[place] * 4) // len(at[place]))
                lowest, start = layers.setdefault(split_layer(unit) or unit, (unit, place))
                # nothing is kept before the lowest unit, not even in its own layer
                spared = without[place] - without[start]
                first_peak, second_peak = _less(self.memory([lowest]).peaks, own[lowest])
                rest[unit] = (first_peak - spared, second_peak - spared)
        return own, rest

    def _config(self, units: Sequence[str]) -> Any:
        return self._importance.to_lora_config(units=units, **self._lora)


def _search(counts: _Counts, worth: Mapping[str, float], budget: int) -> list[str]:
    own, rest = counts.cost_by_unit(list(worth))
    order = list(own)
    least = min(order, key=lambda unit: max(map(sum, zip(rest[unit], own[unit]))))
    memory = counts.memory([least])
    if memory.total > budget:
        raise ValueError(
            f"A memory budget of {budget / 1e9:.3g} GB is too small: the frozen model takes "
            f"{memory.weights / 1e9:.3g} GB, and tuning one unit ({least}) takes {memory.total / 1e9:.3g} GB in all."
        )
    by_value = sorted(order, key=lambda unit: worth[unit] / max(1, *own[unit]), reverse=True)
    while True:
        selected = [least]
        for position in reversed(range(len(order))):
            above = set(order[position + 1 :])
            others = [unit for unit in by_value if unit in above]
            option = _fill(order[position], others, own, _less((budget, budget), rest[order[position]]))
            if sum(worth[unit] for unit in option) > sum(worth[unit] for unit in selected):
                selected = option
        needed = counts.memory(selected)
        if needed.total <= budget:
            return selected
        # the sum is too low for all selections with their lowest unit in this layer
        lowest = selected[0]
        missing = _less(needed.peaks, rest[lowest])
        for unit in selected:
            missing = _less(missing, own[unit])
        for unit in order:
            if (split_layer(unit) or unit) == (split_layer(lowest) or lowest):
                rest[unit] = (rest[unit][0] + max(0, missing[0]), rest[unit][1] + max(0, missing[1]))


def _less(a: Peaks, b: Peaks) -> Peaks:
    return a[0] - b[0], a[1] - b[1]


def _fill(lowest: str, others: Sequence[str], own: Mapping[str, Peaks], room: Peaks) -> list[str]:
    """The lowest unit and those of the others that fit, in their order; none if the lowest does not fit."""
    selected: list[str] = []
    for unit in (lowest, *others):
        left = _less(room, own[unit])
        if min(left) >= 0:
            selected.append(unit)
            room = left
        elif unit == lowest:
            break
    return selected
