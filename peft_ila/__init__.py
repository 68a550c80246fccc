"""peft-ila: which layers does fine-tuning change? Importing it registers the method ILA with PEFT."""

__version__ = "0.1.0"

from .registration import add_peft_type, register

add_peft_type()

from .config import ILAConfig  # noqa: E402
from .importance import LayerImportance  # noqa: E402
from .model import ILAModel  # noqa: E402
from .training import EpsilonStability, learn_gates  # noqa: E402
from .tuning import FrozenPrefix  # noqa: E402

register(ILAConfig, ILAModel)

__all__ = ["EpsilonStability", "FrozenPrefix", "ILAConfig", "ILAModel", "LayerImportance", "learn_gates"]
