"""Attribution: the worth of each gate at the base model, and when the ranking has settled."""

import math
from typing import Any

import torch

from ..ranking.comparison import SURE
from ..ranking.importance import LayerImportance
from .measurement import Measurement, Step

# The minimum number of steps, and the number of steps between checks of the ranking.
ROUND = 4


class Attribution:
    """
    −∂L/∂γ of each gate at γ = 0, or (α/r)·‖∂L/∂B‖₁ of a fresh adapter with `untrained`, see [`learn_gates`].

    The first is the Taylor criterion of Molchanov et al. (2019, https://arxiv.org/abs/1906.10771), taken at the base
    model: at the fine-tuned model, the loss is flat in every gate. After the first step of stage 1, it would find the
    second: from B = 0, Adam moves each entry of B by its learning rate against the sign of its gradient.
    """

    def __init__(self, units: int, steps: int, min_agreement: float | None, untrained: bool) -> None:
        self._steps = steps
        self._min_agreement = min_agreement
        self._untrained = untrained
        self._samples = torch.empty(0, units)
        self._agreeing = 0

    def step(self, measurement: Measurement, step: Step) -> float:
        """Measure the worth of each unit on one step's batches, and return their loss."""
        if self._untrained:
            worth, loss = measurement.gradient_norms(step)
        else:
            gradient, loss = measurement.gradient(step)
            worth = -gradient
        self._samples = torch.cat([self._samples, worth[None]])
        if self._min_agreement is not None and self.taken >= 2 * ROUND and self.taken % ROUND == 0:
            self._agreeing = self._agreeing + 1 if self._agreement() >= self._min_agreement else 0
        return loss

    def _agreement(self) -> float:
        """The agreement of the ranking from the first half of the steps with the ranking from all, at most 1."""
        names = [str(unit) for unit in range(self._samples.shape[1])]
        part, whole = (
            LayerImportance(names, rows.mean(0).tolist()) for rows in (self._samples[: self.taken // 2], self._samples)
        )
        return min(part.overlap(whole, 0.3), part.overlap(whole, 0.75), part.spearman(whole))

    @property
    def taken(self) -> int:
        """The number of samples."""
        return len(self._samples)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, or the ranking has settled."""
        return self.taken >= self._steps or self._agreeing == 3

    def result(self) -> tuple[list[float], list[float], dict[str, Any]]:
        """Scores, their standard errors (none for fewer than 8 samples), and figures for the metadata."""
        if self.taken < ROUND:
            raise ValueError(
                f"Stage 2 measured {self.taken} batches, but needs {ROUND}: the training data ended too soon. "
                "A one-pass stream must hold batches for both stages."
            )
        worth, error = self._samples.mean(0), self._samples.std(0) / math.sqrt(self.taken)
        attributed = worth.sum().item()
        if not attributed > 0:
            raise ValueError(
                "All gradients of the adapter are 0: no unit affects the loss. Check the targets."
                if self._untrained
                else "The adapter lowers the loss, but to first order it raises the loss: the attributions add up to "
                f"{attributed:.4f}. Fine-tune with a lower learning rate, or take more steps."
            )
        mean = attributed / len(worth)
        spread = (error / mean).tolist() if self.taken >= SURE else []
        facts = {"min_agreement": self._min_agreement} | ({} if self._untrained else {"attributed": attributed})
        return (worth / mean - 1).tolist(), spread, facts
