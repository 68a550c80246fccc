"""The searches that the study compares. Each scores every module, from training data alone."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import KappaTuneSelector

from benchmarks.study.problem import Batch, Problem

Scores = dict[str, list[float]]
ATTRIBUTION = 16  # batches of the full search's second stage
UNTRAINED = (8, 16)  # batches


def untrained(problem: Problem, sizes: dict[str, int]) -> Scores:
    """
    By the gradient of a fresh LoRA's B: what `learn_gates(method="untrained")` measures.

    All adapters of one rank have one alpha, so the factor α/r is left out.
    """
    with problem.lora(list(sizes)) as model:
        gradients = [_gradients_of_b(problem, model, batch) for batch in problem.batches(max(UNTRAINED))]
    norms = torch.stack([torch.stack([g.norm(1) for g in batch]) for batch in gradients])
    return {f"untrained, {number} batches": rounded(norms[:number].mean(0)) for number in UNTRAINED}


def kappa_tune(base: Any, sizes: dict[str, int]) -> Scores:
    """PEFT's KappaTune, which looks at no data: the smaller the condition number of W, the better a target."""
    order = KappaTuneSelector(base, show_progress=False).get_best_targets()
    return {"KappaTune": [-float(order.index(unit)) for unit in sizes]}


def attribution(model: PeftModel, problem: Problem) -> torch.Tensor:
    """
    −∂L/∂γ of each module's gate at γ = 0: what `learn_gates` measures.

    There the model is the base model, and the gradient for γ is that for B at 0, multiplied by the trained B.
    """
    weights = [layer.lora_B["default"].weight for layer in _layers(model)]
    trained = [weight.detach().clone() for weight in weights]
    total = torch.zeros(len(weights), device=trained[0].device)
    try:
        for weight in weights:
            weight.data.zero_()
        for batch in problem.batches(ATTRIBUTION):
            total -= torch.stack([(g * b).sum() for g, b in zip(_gradients_of_b(problem, model, batch), trained)])
    finally:
        for weight, value in zip(weights, trained):
            weight.data.copy_(value)
    return total / ATTRIBUTION


def rounded(scores: torch.Tensor) -> list[float]:
    """For the output."""
    return [float(f"{score:.5g}") for score in scores.tolist()]


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_B") and len(module.lora_B)]


def _gradients_of_b(problem: Problem, model: Any, batch: Batch) -> Sequence[torch.Tensor]:
    weights = [layer.lora_B["default"].weight for layer in _layers(model)]
    return torch.autograd.grad(problem.mean_loss(model, batch), weights)
