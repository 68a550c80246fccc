"""peft-ila: which layers does fine-tuning change? Importing it registers the method ILA with PEFT."""

import importlib
import os
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .export.freezing import FrozenPrefix
    from .ranking.importance import LayerImportance
    from .search.gates import learn_gates
    from .search.stability import EpsilonStability
    from .tuner.config import ILAConfig
    from .tuner.model import ILAModel
    from .workflows.prune import prune
    from .workflows.rank import rank

_HOMES = {
    "EpsilonStability": "search.stability",
    "FrozenPrefix": "export.freezing",
    "ILAConfig": "tuner.config",
    "ILAModel": "tuner.model",
    "LayerImportance": "ranking.importance",
    "learn_gates": "search.gates",
    "prune": "workflows.prune",
    "rank": "workflows.rank",
}

__all__ = [
    "EpsilonStability",
    "FrozenPrefix",
    "ILAConfig",
    "ILAModel",
    "LayerImportance",
    "__version__",
    "learn_gates",
    "prune",
    "rank",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """
    Whether this process is `peft-ila`, `python -m peft_ila` or `python -m peft_ila.cli`.

    PEFT and torch take seconds to import, and several commands need neither. So on the command line, only an import
    of `tuner` registers the method.
    """
    program = (getattr(sys, "argv", None) or [""])[0]
    if program == "-m":  # Python is still looking for the module
        module = next((value for flag, value in pairwise(sys.orig_argv) if flag == "-m"), None)
        return module in ("peft_ila", "peft_ila.cli")
    return os.path.basename(program) in ("peft-ila", "peft-ila.exe") and not os.path.isdir(program)


if not _is_command_line():
    from . import tuner

    tuner.registration.register(tuner.config.ILAConfig, tuner.model.ILAModel)  # once more after `importlib.reload`
