"""Attribution: how much of the loss gain each gate is worth, as an optimiser that any trainer can run."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .importance import LayerImportance

# The least number of steps; twice as many for a standard error, and the ranking is looked at again after as many.
ROUND = 4


class GateAttribution(torch.optim.Optimizer):
    """
    Measures −∂L/∂γ of each gate at the base model: the first-order term of the loss gain of its weight delta.

    This is the Taylor criterion of Molchanov et al. (2019, https://arxiv.org/abs/1906.10771), not at the fine-tuned
    model, where training has made the loss flat in every gate, but where the deltas set out from. A step reads the
    gradients of the scores on one batch, which are ∂L/∂γ while the gates are probed; the scores stay.

    What was measured is in `param_groups`, so it is saved and resumed with a trainer's checkpoints.

    Args:
        params (`Iterable[torch.nn.Parameter]`): The scores, of shape (1,), of gates that are probed.
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
        Take the gradients of the scores down as one sample.

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

    @staticmethod
    def _sample(score: torch.Tensor) -> torch.Tensor:
        if (gradient := score.grad) is None:  # no batch reached the unit
            return torch.zeros(1)
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        return -local.float().sum().reshape(1)  # an empty shard, of a score that another process holds, adds 0


def samples_of(optimizer: Any) -> torch.Tensor:
    """
    What a [`GateAttribution`] has measured: shape (steps, scores), fp32 on the CPU, in the unit of the loss.

    Under fp16, steps that the gradient scaler skipped are not among them. Under FSDP2 to be called by all processes.

    Raises:
        ValueError: There are fewer than `ROUND`.
    """
    (group,) = optimizer.param_groups
    taken = len(group.get("samples", ()))
    if taken < ROUND:
        raise ValueError(
            f"Stage 2 measured {taken} batches, but needs {ROUND}: in the other steps no gradient was finite. Train "
            "in bf16 or fp32, or take more steps."
        )
    samples = group["samples"].clone()  # what is added up below is not kept
    if isinstance(score := group["params"][0], DTensor):
        torch.distributed.all_reduce(samples, group=score.device_mesh.get_group(score.device_mesh.ndim - 1))
    return samples.cpu()


def attributions(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The attribution of each unit and its standard error over the batches.

    Args:
        samples: Of shape (steps, units).

    Returns:
        Two tensors of shape (units,).
    """
    return samples.mean(0), samples.std(0) / math.sqrt(len(samples))


def agreement(samples: torch.Tensor) -> float:
    """How well the ranking from the first half of the samples agrees with that from all, at most 1."""
    names = [str(unit) for unit in range(samples.shape[1])]
    part, whole = (
        LayerImportance(names, attributions(rows)[0].tolist()) for rows in (samples[: len(samples) // 2], samples)
    )
    return min(part.overlap(whole, 0.3), part.overlap(whole, 0.75), part.spearman(whole))


def steps_to_settle(samples: torch.Tensor, bound: float) -> int | None:
    """The first step after which the [`agreement`] had been at least `bound` three times in a row, if any."""
    agreeing = 0
    for end in range(2 * ROUND, len(samples) + 1, ROUND):
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
        if taken and taken % ROUND == 0 and steps_to_settle(samples_of(optimizer), self.bound):
            control.should_training_stop = True
