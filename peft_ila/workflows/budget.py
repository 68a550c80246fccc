"""The most important units that fit into a GPU's memory: `--memory_budget`."""

import functools
import logging
from bisect import bisect_right
from dataclasses import fields
from typing import Any

from accelerate.utils import convert_file_size_to_int
from transformers import PretrainedConfig

from ..export.skeleton import meta_skeleton
from ..ranking.importance import LayerImportance
from .arguments import LORA_R
from .plan import Memory, Step

logger = logging.getLogger(__name__)


def select_within(
    config: PretrainedConfig, importance: LayerImportance, memory_budget: int | str, **step: Any
) -> list[str]:
    """
    The most important units whose tuning fits into a memory budget: as many from the top of the ranking as [`plan`]
    finds to fit.

    Args:
        config ([`~transformers.PretrainedConfig`]): The configuration of the ranked model, a causal language model.
        importance ([`LayerImportance`]): The ranking.
        memory_budget (`int` or `str`):
            Bytes, or a size such as `"24GB"` (10⁹ bytes) or `"24GiB"`. Leave room for the memory that is not counted,
            see [`Memory`].
        **step:
            `batch_size`, `max_length`, `load_in_4bit`, `gradient_checkpointing`, `dtype`, and options of
            [`~peft.LoraConfig`] such as `r`, as for [`plan`]. With checkpointing, the inputs of all layers count, also
            those below the lowest unit, which the callback [`FrozenPrefix`] avoids.

    Returns:
        `list[str]`: The `units` for [`LayerImportance.to_lora_config`], most important first.
    """
    budget = size_in_bytes(memory_budget)
    lora = {"r": LORA_R, **step}
    own = {field.name: lora.pop(field.name) for field in fields(Step) if field.name in lora}
    importance.to_lora_config(top_p=1.0, model=config, **lora)  # checks that the ranking is of this model
    counted = Step(meta_skeleton(config, importance.units), **own)
    ranking = importance.ranking()

    @functools.cache
    def memory(number: int) -> Memory:
        return counted.memory(importance.to_lora_config(units=ranking[:number], **lora))

    number = bisect_right(range(1, len(ranking) + 1), budget, key=lambda number: memory(number).total)
    needed = memory(max(1, number))
    if not number:
        raise ValueError(
            f"A memory budget of {budget / 1e9:.3g} GB is too small: the frozen model takes "
            f"{needed.weights / 1e9:.3g} GB, and tuning one unit ({ranking[0]}) takes {needed.total / 1e9:.3g} GB in "
            "all."
        )
    logger.info(
        f"{number} of {len(ranking)} units fit into {budget / 1e9:.2f} GB: they need {needed.total / 1e9:.2f} GB."
    )
    return ranking[:number]


def size_in_bytes(size: int | str) -> int:
    """Bytes of a number or a string such as `"24GB"`, `"24GiB"` or `"24000000000"`."""
    try:
        text = str(size).strip().upper()  # accelerate takes "24gb" for gigabits
        return convert_file_size_to_int(int(text) if text.isdecimal() else text)
    except (ValueError, OverflowError):
        raise ValueError(
            f"The memory budget must be a size such as '24GB', '24GiB' or a number of bytes, got {str(size)[:80]!r}."
        ) from None
