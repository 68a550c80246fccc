"""Gated LoRA as a PEFT method. Importing this package or a module in it registers the method with PEFT."""

from .registration import add_peft_type, register

add_peft_type()

from .config import ILAConfig  # noqa: E402
from .model import ILAModel  # noqa: E402

register(ILAConfig, ILAModel)
