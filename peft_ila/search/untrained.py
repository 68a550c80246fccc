"""Untrained: ranks the units of a fresh adapter by their gradient on a few batches."""

from typing import Any

import torch

from ..ranking.comparison import SURE
from .attribution import Attribution, attributions
from .measurement import Measurement, Step


class Untrained(Attribution):
    """
    (α/r)·‖∂L/∂B‖₁ of each unit of a fresh LoRA, where B is 0 and the model is the base model.

    [`Attribution`] would find the same after the first step of stage 1: from B = 0, Adam moves each entry of B by its
    learning rate against the sign of its gradient, so the delta is worth rate·(α/r)·‖∂L/∂B‖₁ to first order.
    """

    def measure(self, measurement: Measurement, step: Step) -> tuple[torch.Tensor, float]:
        """The sample for [`step`], and the loss."""
        return measurement.gradient_norms(step)

    def result(self) -> tuple[list[float], list[float], dict[str, Any]]:
        """Scores, their standard errors (none for fewer than 8 samples), and figures for the metadata."""
        self._check_number()
        norms, error = attributions(self._samples)
        mean = norms.mean().item()
        if not mean > 0:
            raise ValueError("All gradients of the adapter are 0: no unit affects the loss. Check the targets.")
        spread = (error / mean).tolist() if self.taken >= SURE else []
        return (norms / mean - 1).tolist(), spread, {"min_agreement": self._min_agreement}
