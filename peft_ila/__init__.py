"""peft-ila prunes adapters and ranks what fine-tuning changed. Importing it registers the method ILA with PEFT."""

import sys
from typing import TYPE_CHECKING

from .version import __version__

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

if TYPE_CHECKING or "peft_ila_command" not in sys.modules:  # the commands of `peft-ila` import what they need
    from .export.freezing import FrozenPrefix
    from .ranking.importance import LayerImportance
    from .search.gates import learn_gates
    from .search.stability import EpsilonStability
    from .tuner import registration
    from .tuner.config import ILAConfig
    from .tuner.model import ILAModel
    from .workflows.prune import prune
    from .workflows.rank import rank

    registration.register(ILAConfig, ILAModel)  # once more after `importlib.reload`
