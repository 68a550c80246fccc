"""Units, told from the names of modules. All name matching is here."""

import re
from typing import Literal

Granularity = Literal["layer", "module"]

# The first number that follows a named component is the decoder layer: `model.layers.3.mlp.experts.7.w1` is in
# layer 3, not in expert 7. PEFT's `layers_to_transform` reads names the same way.
_DECODER_LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?[^.\d][^.]*)\.(?P<index>\d+)(?=\.|$)")


_LONGEST = 1000  # characters of a name; real models use about 100


def check_name(name: object) -> None:
    """Check that a value from outside can be the name of a module or parameter."""
    if not isinstance(name, str):
        raise TypeError(f"The name of a module must be a string, got {type(name).__name__}.")
    if not name.isprintable() or not all(name.split(".")) or len(name) > _LONGEST:
        raise ValueError(f"{name[:80]!r} cannot be the name of a module, such as 'model.layers.3.mlp.up_proj'.")


def split_layer(name: str) -> tuple[str, int] | None:
    """Split a module name into its stack and layer index.

    Args:
        name: A module or unit name, such as `"model.layers.3.mlp.up_proj"`.

    Returns:
        `("model.layers", 3)` for that name, `None` for a name outside every stack, such as `"lm_head"`.
    """
    match = _DECODER_LAYER.match(name)
    return (match["stack"], int(match["index"])) if match else None


def unit_of(name: str, granularity: Granularity) -> str:
    """Name the unit of a target module.

    Args:
        name: The module's name in the base model.
        granularity: `"module"` makes each module a unit (the paper's choice), `"layer"` each decoder layer. Modules
            outside every stack of layers are separate units at both granularities.

    Returns:
        For example `"model.layers.3"` or `"model.layers.3.mlp.up_proj"`.
    """
    if granularity == "layer" and (layer := split_layer(name)):
        return f"{layer[0]}.{layer[1]}"
    return name
