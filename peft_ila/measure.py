"""What a training step costs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def saved_tensor_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """
    The bytes that autograd keeps for the backward pass of `forward()`, an exact and repeatable count.

    Args:
        model: The model; its parameters and buffers, which exist anyway, are not counted.
        forward: Computes the loss. Its result is dropped.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # held until the count is done, so that no storage is used twice
    del result
    return sum(kept.values())
