"""peft-ila: which layers does fine-tuning change? Importing it registers the method ILA with PEFT."""

import os
import sys
from itertools import pairwise
from typing import Any

from .version import __version__


def _is_command_line() -> bool:
    """
    Whether this process is `peft-ila` or `python -m peft_ila.cli`.

    PEFT and torch take seconds to import, and several commands need neither. So there, and only there, this module
    imports nothing: the commands import what they need, and importing `tuner` registers ILA.
    """
    program = (getattr(sys, "argv", None) or [""])[0]
    if program == "-m":  # the module that is run is being looked for
        return ("-m", "peft_ila.cli") in pairwise(sys.orig_argv)
    return os.path.basename(program) in ("peft-ila", "peft-ila.exe") and not os.path.isdir(program)


if not _is_command_line():
    from .api import EpsilonStability, FrozenPrefix, ILAConfig, ILAModel, LayerImportance, learn_gates
    from .tuner.registration import register

    register(ILAConfig, ILAModel)  # `tuner` has done it; once more after `importlib.reload`

__all__ = [
    "EpsilonStability",
    "FrozenPrefix",
    "ILAConfig",
    "ILAModel",
    "LayerImportance",
    "__version__",
    "learn_gates",
]


def __getattr__(name: str) -> Any:
    """A public name that the command line has not imported (PEP 562), such as for code that a model brings along."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)
