"""The public names of the package, all that it takes to use ILA from Python. Importing it registers ILA with PEFT."""

from .export.freezing import FrozenPrefix
from .ranking.importance import LayerImportance
from .search.gates import learn_gates
from .search.stability import EpsilonStability
from .tuner.config import ILAConfig
from .tuner.model import ILAModel

__all__ = ["EpsilonStability", "FrozenPrefix", "ILAConfig", "ILAModel", "LayerImportance", "learn_gates"]
