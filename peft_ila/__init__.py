"""peft-ila: which layers does fine-tuning change? Importing it registers the method ILA with PEFT."""

import os
import sys

from .version import __version__


def _is_command_line() -> bool:
    """
    Whether this process is `peft-ila` or `python -m peft_ila.cli`.

    PEFT and torch take seconds to import, and several commands need neither. So there, and only there, this module
    imports nothing: the commands import what they need, and importing `tuner` registers ILA.
    """
    program = getattr(sys, "argv", None) or [""]
    by_name = os.path.basename(program[0]) in ("peft-ila", "peft-ila.exe")
    return by_name or (program[0] == "-m" and "peft_ila.cli" in sys.orig_argv)


if not _is_command_line():
    from .export.freezing import FrozenPrefix
    from .ranking.importance import LayerImportance
    from .search.gates import learn_gates
    from .search.stability import EpsilonStability
    from .tuner.config import ILAConfig
    from .tuner.model import ILAModel
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
