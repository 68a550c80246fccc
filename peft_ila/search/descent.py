"""Descent on the scores: the paper's own method, with an optional budget."""

import logging
from typing import Any

import torch

from .measurement import Measurement, Step

logger = logging.getLogger(__name__)

_FEEDBACK = 8.0  # a mean gate 0.1 above its schedule adds 0.8 to the share of units to push down
_REACHED = 0.8  # the schedule reaches the budget after this share of the steps
_MEMORY = 0.9
_TOLERANCE = 0.05


class Descent:
    """
    Adam minimises L(θ₀ + σ(s) ⊙ Δθ) over the scores s alone (section 2 of the paper,
    https://huggingface.co/papers/2410.17875; its optimiser and learning rate are not known).

    The paper's constraint ‖γ‖₀ ≤ H is relaxed to a pressure λ·Σγ, added to the loss. λ is the price at which the
    budget's share of units is worth keeping, by the running mean of −∂L/∂γ. It is higher while the mean gate is above
    a linear schedule from its initial value to the budget, and lower while it is below.
    """

    def __init__(
        self,
        units: int,
        steps: int,
        initial_score: float = 4.0,
        learning_rate: float = 0.1,
        budget: float | None = None,
    ) -> None:
        self._settings = {"initial_score": initial_score, "learning_rate": learning_rate, "budget": budget}
        self._share = budget / units if isinstance(budget, int) else budget
        self._steps = steps
        self.taken = 0
        self._parameter = torch.nn.Parameter(torch.full((units,), float(initial_score)))
        self._adam = torch.optim.Adam([self._parameter], lr=learning_rate)
        self._start = self._mean_gate()
        self._worth = torch.zeros(units)

    @property
    def scores(self) -> torch.Tensor:
        """Shape (units,), fp32."""
        return self._parameter.detach()

    def _mean_gate(self) -> float:
        return torch.sigmoid(self.scores).mean().item()

    def step(self, measurement: Measurement, step: Step) -> float:
        """Take one step on the scores, and return the loss before it."""
        gradient, loss = measurement.gradient(step, self.scores)
        self.taken += 1
        slope = torch.sigmoid(self.scores) * torch.sigmoid(-self.scores)  # ∂γ/∂s
        worth = -gradient / slope.clamp_min(torch.finfo(torch.float32).tiny)
        price = 0.0 if self._share is None else self._price(worth, self._share)
        self._parameter.grad = gradient + price * slope
        self._adam.step()
        return loss

    def _price(self, worth: torch.Tensor, share: float) -> float:
        self._worth = _MEMORY * self._worth + (1 - _MEMORY) * worth
        worth = self._worth / (1 - _MEMORY**self.taken)
        target = self._start + (share - self._start) * min(1.0, self.taken / (_REACHED * self._steps))
        expensive = 1 - share + _FEEDBACK * (self._mean_gate() - target)  # the share of the units to push down
        price = torch.quantile(worth, min(1.0, max(0.0, expensive)))
        return (price + max(0.0, expensive - 1) * worth.abs().max()).item()

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.taken >= self._steps

    def result(self) -> tuple[list[float], list[float], dict[str, Any]]:
        """The learned scores, no standard errors, and figures for the metadata."""
        mean = self._mean_gate()
        if self._share is not None and abs(mean - self._share) > _TOLERANCE:
            logger.warning(
                f"The mean gate is {mean:.2f} after {self.taken} steps, not at the budget of {self._share:.2f}. Take "
                "more steps, a higher learning rate, or an initial score nearer 0."
            )
        return self.scores.tolist(), [], {**self._settings, "mean_gate": mean}
