"""A LoRA adapter without the directions that compute nothing: each module gets the rank that is left of it."""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from ..choices import Ranks
from .adapters import split_key
from .plain import is_lora_b, target_names, to_plain_lora


def to_reduced_lora(
    state_dict: dict[str, torch.Tensor], config: Any, lookalikes: Sequence[str] = (), ranks: Ranks = "mixed"
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """
    Turn an ILA adapter with open gates into a plain LoRA adapter without the directions whose column of B is 0.

    It computes the same. α/r is folded into B, so that it is 1 everywhere: a program that reads `r` and `lora_alpha`
    alone scales right too. Modules of which nothing is left are no targets.

    Args:
        state_dict, config, lookalikes: See [`to_plain_lora`]. Linear modules and embeddings only.
        ranks: `"mixed"`: each module has its own rank, by `rank_pattern`. `"uniform"`: all have the greatest, padded
            with zeros, for programs that take one rank only.

    Returns:
        Tensors and configuration, ready to be written.

    Raises:
        ValueError: The adapter is one of DoRA, of experts or of convolutions.
    """
    names = target_names(state_dict, config)
    check_reducible(config, ((names[split_key(key)[0]], b) for key, b in state_dict.items() if is_lora_b(key)))
    kept = {  # by the path of a LoRA layer, which rows of A and columns of B
        split_key(key)[0]: tensor.any(0).nonzero().flatten() for key, tensor in state_dict.items() if is_lora_b(key)
    }
    sizes: dict[str, int] = {}  # by target, since all layers of `MultiheadAttention` have one rank
    for path, columns in kept.items():
        if len(columns):
            sizes[names[path]] = max(len(columns), sizes.get(names[path], 0))
    masked = copy.copy(config)  # with a mask of the modules of which something is left
    masked.granularity, masked.gate_mode, masked.gate_mask = "module", "hard", list(sizes)
    tensors, lora = to_plain_lora(state_dict, masked, lookalikes)

    most = max(sizes.values()) if ranks == "uniform" else Counter(sizes.values()).most_common(1)[0][0]
    for key, tensor in tensors.items():
        path, is_lora, part = split_key(key)
        if not is_lora:
            continue
        name = names[path]
        length = most if ranks == "uniform" else sizes[name]
        if is_lora_b(key):
            scaled = (tensor.float() * _scaling(name, tensor.shape[1], config)).to(tensor.dtype)
            tensors[key] = _padded(scaled[:, kept[path]], 1, length)
        elif part.startswith(("A", "embedding_A")):
            tensors[key] = _padded(tensor[kept[path]], 0, length)
    # PEFT reads the keys as regular expressions for the end of a name
    own = {f"^{re.escape(name)}": size for name, size in sizes.items() if ranks == "mixed" and size != most}
    lora.r = lora.lora_alpha = most
    lora.rank_pattern, lora.alpha_pattern = own, dict(own)
    lora.use_rslora = False
    return tensors, lora


def check_reducible(config: Any, layers: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse an adapter without directions of its own. `layers` has the module and a factor of each LoRA layer."""
    if config.use_dora:
        reason = "of DoRA, whose magnitudes belong to the whole delta"
    elif config.gated_parameters:
        reason = f"of experts ({min(config.gated_parameters.values())}), which share one rank"
    elif convolution := next((module for module, factor in layers if factor.dim() != 2), None):
        reason = f"of a convolution ({convolution})"
    else:
        return
    raise ValueError(f"This adapter cannot be pruned: it is {reason}.")


def _scaling(name: str, rank: int, config: Any) -> float:
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _padded(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    missing = max(0, length - tensor.shape[dim])
    return torch.nn.functional.pad(tensor, (0, 0, 0, missing) if dim == 0 else (0, missing)).contiguous()
