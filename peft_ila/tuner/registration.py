"""Registers ILA with PEFT, in memory. The only place that touches PEFT's type enum, tables and LoRA-FA."""

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.optimizers import lorafa
from peft.utils import register_peft_method
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

_NAME = "ILA"


class LoraFAOptimizer(lorafa.LoraFAOptimizer):
    """
    PEFT's optimizer for `create_lorafa_optimizer`. It takes parameters with "lora" in their names as pairs of A and B,
    so the scores are renamed here. They train with AdamW, like all other parameters.
    """

    def __init__(self, params: Any, **kwargs: Any) -> None:
        for group in params:
            group["names"] = [name.replace(".lora_gate.", ".gate.") for name in group["names"]]
        super().__init__(params, **kwargs)


def add_peft_type() -> None:
    """Add the member `ILA` to [`~peft.PeftType`], unless it is there.

    `register_peft_method` accepts only members of this enum, and an enum with members cannot be subclassed. So this
    extends the enum's own tables: attribute, iteration, lookup by name and by value.
    """
    if _NAME in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, _NAME)
    member._name_ = member._value_ = _NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, _NAME, member)
    PeftType._member_names_.append(_NAME)
    PeftType._member_map_[_NAME] = member
    PeftType._value2member_map_[_NAME] = member


def register(config_cls: type, model_cls: type) -> None:
    """Enter ILA's classes into PEFT's tables. A second call, after `importlib.reload`, replaces them."""
    peft_type = PeftType(_NAME)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is None:
        register_peft_method(name=_NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="lora_")
    elif known.__module__ == config_cls.__module__:
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    else:
        raise ImportError(
            f"The installed PEFT already has a method named ILA ({known.__module__}.{known.__qualname__}). Use that "
            "one, or install an older PEFT to use peft-ila."
        )
    # hot-swapped adapters must agree in these options
    CONFIG_KEYS_TO_CHECK[peft_type] = [
        *CONFIG_KEYS_TO_CHECK[PeftType.LORA],
        "granularity",
        "gate_mode",
        "gate_mask",
    ]
    lorafa.LoraFAOptimizer = LoraFAOptimizer  # type: ignore[assignment, misc]
