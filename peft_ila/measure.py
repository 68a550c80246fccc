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
    return sum(size for size, _ in saved_tensors(model, forward))


def saved_tensors(model: nn.Module, forward: Callable[[], Any]) -> list[tuple[int, tuple[int, ...]]]:
    """
    What autograd keeps for the backward pass of `forward()`: of each storage its bytes, and the shape of a tensor in
    it. For the arguments see [`saved_tensor_bytes`].
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    # the storage is held until the count is done, so that no other takes its place
    kept: dict[int, tuple[torch.UntypedStorage, tuple[int, ...]]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage, tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return [(storage.nbytes(), shape) for storage, shape in kept.values()]
