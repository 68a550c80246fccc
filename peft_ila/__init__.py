"""peft-ila: which layers does fine-tuning change? Importing it registers the method ILA with PEFT."""

import importlib
import sys
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


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "peft_ila_command" not in sys.modules:  # the program `peft-ila`, whose commands import what they need
    from . import tuner

    tuner.registration.register(tuner.config.ILAConfig, tuner.model.ILAModel)  # once more after `importlib.reload`
