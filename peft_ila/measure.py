"""What a training step costs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    with saved_tensors(model) as saved:
        result = forward()
        del result
        return saved.bytes()


class Saved:
    """The storages that autograd has kept so far, each with the shape of a tensor in it."""

    def __init__(self) -> None:
        # the storage is held until the count is done, so that no other takes its place
        self.kept: dict[int, tuple[torch.UntypedStorage, tuple[int, ...]]] = {}

    def bytes(self, last: int | None = None) -> int:
        """All bytes, or those of tensors whose last dimension is `last`."""
        return sum(s.nbytes() for s, shape in self.kept.values() if last is None or shape[-1:] == (last,))


@contextmanager
def saved_tensors(model: nn.Module) -> Iterator[Saved]:
    """What autograd keeps for the backward pass of the block, but parameters and buffers of the model."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved = Saved()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved.kept[storage._cdata] = storage, tuple(tensor.shape)
        return tensor.detach()  # else an output keeps its own node alive, and all before it, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
