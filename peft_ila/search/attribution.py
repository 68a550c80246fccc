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
    −∂L/∂γ of each gate at the base model, γ = 0: the first-order term of the loss gain of its weight delta.

    This is the Taylor criterion of Molchanov et al. (2019, https://arxiv.org/abs/1906.10771), taken at the base model:
    at the fine-tuned model, the loss is flat in every gate.

    With `untrained`, (α/r)·‖∂L/∂B‖₁ of a fresh LoRA, where B is 0 and the model is the base model. Attribution would
    find the same after the first step of stage 1: from B = 0, Adam moves each entry of B by its learning rate against
    the sign of its gradient, so the delta is worth rate·(α/r)·‖∂L/∂B‖₁ to first order.
    """

    def __init__(self, units: int, steps: int, min_agreement: float | None = None, untrained: bool = False) -> None:
        self._steps = steps
        self._min_agreement = min_agreement
        self._untrained = untrained
        self._samples = torch.empty(0, units)

    def measure(self, measurement: Measurement, step: Step) -> tuple[torch.Tensor, float]:
        """The sample for [`step`], and the loss."""
        if self._untrained:
            return measurement.gradient_norms(step)
        gradient, loss = measurement.gradient(step)
        return -gradient, loss

    def step(self, sample: torch.Tensor) -> None:
        """Add the worth of each unit on one step's batches, shape (units,)."""
        self._samples = torch.cat([self._samples, sample[None]])

    @property
    def taken(self) -> int:
        """The number of samples."""
        return len(self._samples)

    @property
    def finished(self) -> bool:
        """Whether there are enough samples: all, or so many that the ranking has settled."""
        if self.taken >= self._steps:
            return True
        if self._min_agreement is None or self.taken % ROUND:
            return False
        return steps_to_settle(self._samples, self._min_agreement) is not None

    def result(self) -> tuple[list[float], list[float], dict[str, Any]]:
        """Scores, their standard errors (none for fewer than 8 samples), and figures for the metadata."""
        if self.taken < ROUND:
            raise ValueError(
                f"Stage 2 measured {self.taken} batches, but needs {ROUND}: the training data ended too soon. "
                "A one-pass stream must hold batches for both stages."
            )
        worth, error = attributions(self._samples)
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


def attributions(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The attribution of each unit and its standard error, by samples of shape (steps, units)."""
    return samples.mean(0), samples.std(0) / math.sqrt(len(samples))


def agreement(samples: torch.Tensor) -> float:
    """The agreement of the ranking from the first half of the samples with the ranking from all, at most 1."""
    names = [str(unit) for unit in range(samples.shape[1])]
    part, whole = (
        LayerImportance(names, attributions(rows)[0].tolist()) for rows in (samples[: len(samples) // 2], samples)
    )
    return min(part.overlap(whole, 0.3), part.overlap(whole, 0.75), part.spearman(whole))


def steps_to_settle(samples: torch.Tensor, bound: float) -> int | None:
    """The first step at which the [`agreement`] was at least `bound` three times in a row, if any."""
    agreeing = 0
    for end in range(2 * ROUND, len(samples) + 1, ROUND):
        agreeing = agreeing + 1 if agreement(samples[:end]) >= bound else 0
        if agreeing == 3:
            return end
    return None
