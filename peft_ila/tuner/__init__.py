"""Gated LoRA as a method of PEFT. Importing this, or a module in it, registers it with PEFT."""

from .registration import add_peft_type, register

add_peft_type()

from .config import ILAConfig  # noqa: E402
from .model import ILAModel  # noqa: E402

register(ILAConfig, ILAModel)
