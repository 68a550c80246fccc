"""The memory of a training step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Saved:
    """The storages that autograd has kept so far, each with the shape of a tensor in it."""

    def __init__(self) -> None:
        # holds the storages until the end, so that no other takes their place
        self.kept: dict[int, tuple[torch.UntypedStorage, tuple[int, ...]]] = {}

    def bytes(self, last: int | None = None) -> int:
        """All bytes, or only those of tensors with the last dimension `last`."""
        return sum(s.nbytes() for s, shape in self.kept.values() if last is None or shape[-1:] == (last,))


@contextmanager
def saved_tensors(model: nn.Module) -> Iterator[Saved]:
    """Record what autograd keeps for the block's backward pass, except the model's parameters and buffers."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved = Saved()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved.kept[storage._cdata] = storage, tuple(tensor.shape)
        return tensor.detach()  # else an output keeps its own graph alive for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
