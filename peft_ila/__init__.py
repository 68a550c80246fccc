"""peft-ila: which layers does fine-tuning change? Importing it registers the method ILA with PEFT."""

from .tuner.registration import add_peft_type, register

add_peft_type()

from .export.freezing import FrozenPrefix  # noqa: E402
from .ranking.importance import LayerImportance  # noqa: E402
from .search.gates import learn_gates  # noqa: E402
from .search.stability import EpsilonStability  # noqa: E402
from .tuner.config import ILAConfig  # noqa: E402
from .tuner.model import ILAModel  # noqa: E402
from .version import __version__  # noqa: E402

register(ILAConfig, ILAModel)

__all__ = [
    "EpsilonStability",
    "FrozenPrefix",
    "ILAConfig",
    "ILAModel",
    "LayerImportance",
    "__version__",
    "learn_gates",
]
