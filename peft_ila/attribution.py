"""Path attribution: how much of the loss gain each gate is worth, as an optimiser that any trainer can run."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# Midpoints of four equal parts of the path from γ = 0 to γ = 1.
PATH = (1 / 8, 3 / 8, 5 / 8, 7 / 8)


def score_of(gamma: float) -> float:
    """The score s whose gate σ(s) is γ."""
    return math.log(gamma / (1 - gamma))


class PathAttribution(torch.optim.Optimizer):
    """
    Measures the mean of −∂L/∂γ of each gate along the straight path γ = c·1 from the base model to the fine-tuned one.

    These are the integrated gradients (Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365) of the loss gain
    with respect to the gates: over all units, they add up to L(0) − L(1). All gates stand at one point of the path; a
    step reads the gradients of the scores there and moves all gates to the next point, round and round.

    What was measured is in the state of the optimiser, so it is saved and resumed with a trainer's checkpoints.

    Args:
        params (`Iterable[torch.nn.Parameter]`): The scores, of shape (1,), set to `score_of(PATH[0])`.
        lr (`float`): Without effect; learning-rate schedulers want one.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.0) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take the gradients of the scores down as one sample and go on to the next point of the path."""
        for group in self.param_groups:
            for score in group["params"]:
                gradient = torch.zeros_like(score) if score.grad is None else score.grad  # no batch reached the unit
                gamma = torch.sigmoid(score)
                sample = -gradient / (gamma * (1 - gamma))
                if isinstance(sample, DTensor):
                    sample = sample.full_tensor()
                state = self.state[score]
                state["samples"] = torch.cat([state.get("samples", sample[:0]), sample])
                score.fill_(score_of(PATH[len(state["samples"]) % len(PATH)]))

    def samples(self, scores: Sequence[nn.Parameter]) -> torch.Tensor:
        """What was measured: shape (steps, scores), fp32 on the CPU, in the unit of the loss."""
        return torch.stack([self.state[score]["samples"].float().cpu() for score in scores], dim=1)


def attributions(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The attribution of each unit and its standard error, from samples whose rows go round the points of the path.

    Args:
        samples: Of shape (steps, units).

    Returns:
        Two tensors of shape (units,). The errors are those of the mean over batches; they are 0 where there is only
        one batch at each point.
    """
    means, errors = [], []
    for point in range(min(len(PATH), len(samples))):
        rows = samples[point :: len(PATH)]
        means.append(rows.mean(0))
        errors.append(rows.var(0, correction=1) / len(rows) if len(rows) > 1 else torch.zeros_like(rows[0]))
    return torch.stack(means).mean(0), torch.stack(errors).sum(0).sqrt() / len(means)
