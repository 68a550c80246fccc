"""Path attribution: how much of the loss gain each gate is worth, as an optimiser that any trainer can run."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .importance import LayerImportance

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

    What was measured is in `param_groups`, so it is saved and resumed with a trainer's checkpoints.

    Args:
        params (`Iterable[torch.nn.Parameter]`): The scores, of shape (1,), set to `score_of(PATH[0])`.
        lr (`float`): Without effect; learning-rate schedulers want one.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.0) -> None:
        super().__init__(params, {"lr": lr})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimiser; what was measured goes where the scores are: a trainer on one GPU loads to the CPU."""
        super().load_state_dict(state_dict)
        (group,) = self.param_groups
        if "samples" in group:
            group["samples"] = group["samples"].to(group["params"][0].device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """
        Take the gradients of the scores down as one sample and go on to the next point of the path.

        Raises:
            ValueError: A gradient is NaN or infinite.
        """
        (group,) = self.param_groups
        device = group["params"][0].device  # decoder layers may be spread over several
        row = torch.cat([self._sample(score).to(device) for score in group["params"]])[None]
        if not row.isfinite().all():
            raise ValueError(
                "The gradient of the gates is not finite on a training batch. Check the data and the loss."
            )
        # With the group, not with each score: accelerate, which tells the scores of a sharded model apart by their
        # address, takes all empty shards for one.
        group["samples"] = torch.cat([group["samples"], row]) if "samples" in group else row
        for score in group["params"]:
            score.fill_(score_of(PATH[len(group["samples"]) % len(PATH)]))

    @staticmethod
    def _sample(score: torch.Tensor) -> torch.Tensor:
        gamma = torch.sigmoid(_local(score)).float()
        gradient = torch.zeros_like(gamma) if score.grad is None else _local(score.grad)  # no batch reached the unit
        # an empty shard, of a score that another process holds, adds 0
        return -(gradient / (gamma * (1 - gamma))).sum().reshape(1)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def samples_of(optimizer: Any) -> torch.Tensor:
    """
    What a [`PathAttribution`] has measured: shape (steps, scores), fp32 on the CPU, in the unit of the loss.

    Under fp16, steps that the gradient scaler skipped are not among them. Under FSDP2 to be called by all processes.

    Raises:
        ValueError: Not all points of the path were measured.
    """
    (group,) = optimizer.param_groups
    taken = len(group.get("samples", ()))
    if taken < len(PATH):
        raise ValueError(
            f"Stage 2 measured {taken} of the {len(PATH)} points of its path: in the other steps no gradient was "
            "finite. Train in bf16 or fp32, or take more steps."
        )
    samples = group["samples"].clone()  # what is added up below is not kept
    if isinstance(score := group["params"][0], DTensor):
        torch.distributed.all_reduce(samples, group=score.device_mesh.get_group(score.device_mesh.ndim - 1))
    return samples.cpu()


def attributions(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The attribution of each unit and its standard error, from samples whose rows go round the points of the path.

    Args:
        samples: Of shape (steps, units).

    Returns:
        Two tensors of shape (units,). The errors are those of the mean over batches; NaN if a point of the path has
        fewer than two.
    """
    means, errors = [], []
    for point in range(min(len(PATH), len(samples))):
        rows = samples[point :: len(PATH)]
        means.append(rows.mean(0))
        errors.append(rows.var(0, correction=1) / len(rows) if len(rows) > 1 else torch.full_like(rows[0], math.nan))
    return torch.stack(means).mean(0), torch.stack(errors).sum(0).sqrt() / len(means)


def agreement(samples: torch.Tensor) -> float:
    """How well the ranking from the first half of the samples agrees with that from all, at most 1."""
    names = [str(unit) for unit in range(samples.shape[1])]
    half = len(samples) // len(PATH) // 2 * len(PATH)
    part, whole = (LayerImportance(names, attributions(rows)[0].tolist()) for rows in (samples[:half], samples))
    return min(part.overlap(whole, 0.3), part.overlap(whole, 0.75), part.spearman(whole))


def steps_to_settle(samples: torch.Tensor, bound: float) -> int | None:
    """The first step after which the [`agreement`] had been at least `bound` for three rounds of the path, if any."""
    agreeing = 0
    for end in range(2 * len(PATH), len(samples) + 1, len(PATH)):
        agreeing = agreeing + 1 if agreement(samples[:end]) >= bound else 0
        if agreeing == 3:
            return end
    return None


class StopWhenSettled(TrainerCallback):
    """
    Ends training when the ranking has settled, see [`steps_to_settle`].

    It keeps nothing itself, so a resumed run stops where an unbroken one does.
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        taken = len(optimizer.param_groups[0].get("samples", ()))  # fewer than `state.global_step` under fp16
        if taken and taken % len(PATH) == 0 and steps_to_settle(samples_of(optimizer), self.bound):
            control.should_training_stop = True
