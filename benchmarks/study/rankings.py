"""The searches that the study compares. Each scores every module, from training data alone."""

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.helpers import KappaTuneSelector
from transformers import Trainer, TrainingArguments

from benchmarks.study.problem import BATCH, RANK, SCALE, Batch, Problem
from peft_ila import ILAConfig, learn_gates
from peft_ila.units import unit_of

Scores = dict[str, list[float]]
ATTRIBUTION = 16  # batches of the full search's second stage
SHORT = 8  # batches of a short search's
UNTRAINED = (1, 4, 8, 16)  # batches
STEPS, MULTIPLES = (4, 8, 12), (1, 2, 4)  # of a short stage 1, and of the learning rate there
EXAMPLES = 64  # for the diagonal of the Fisher information


def untrained(problem: Problem, sizes: dict[str, int]) -> Scores:
    """
    By the gradient of a fresh LoRA's B: what `learn_gates(method="untrained")` measures.

    All adapters of one rank have one alpha, so the factor α/r is left out.
    """
    return _by_batches(_untrained_gradients(problem, sizes))


def all_untrained(problem: Problem, sizes: dict[str, int]) -> Scores:
    """That, variants of it, and what the base model's own gradients say."""
    gradients = _untrained_gradients(problem, sizes)
    shown = _by_batches(gradients) | _base_gradients(problem, sizes)
    gradients = gradients[:SHORT]
    found = {"untrained, L2": _norms(gradients, 2)}
    means = [sum(own) / SHORT for own in zip(*gradients)]
    found["untrained, norm of the mean gradient"] = torch.stack([mean.norm(1) for mean in means])
    # the first-order worth of Adam's step after these batches, with its moments not decayed
    squares = [sum(g.square() for g in own) / SHORT for own in zip(*gradients)]
    worth = [(mean.square() / (square.sqrt() + 1e-12)).sum() for mean, square in zip(means, squares)]
    found["untrained, second moments"] = torch.stack(worth)
    with problem.lora(dict.fromkeys(sizes, 4 * RANK), rank=4 * RANK) as model:
        found[f"untrained, r = {4 * RANK}"] = _norms([_gradients_of_b(model, b) for b in problem.batches(SHORT)], 1)
    with problem.lora(dict.fromkeys(sizes, RANK)) as model:
        gradients = []
        for batch in problem.batches(SHORT):
            for module in _layers(model):
                module.reset_lora_parameters("default", True)
            gradients.append(_gradients_of_b(model, batch))
        found["untrained, A drawn again"] = _norms(gradients, 1)
    return shown | _listed(found)


def _by_batches(gradients: list[Sequence[torch.Tensor]]) -> Scores:
    return _listed({f"untrained, {number} batches": _norms(gradients[:number], 1) for number in UNTRAINED})


def _untrained_gradients(problem: Problem, sizes: dict[str, int]) -> list[Sequence[torch.Tensor]]:
    with problem.lora(dict.fromkeys(sizes, RANK)) as model:
        return [_gradients_of_b(model, batch) for batch in problem.batches(max(UNTRAINED))]


def _base_gradients(problem: Problem, sizes: dict[str, int]) -> Scores:
    """‖∂L/∂W‖_F of the base model, and the trace of the empirical Fisher information of each module."""
    weights = [problem.base.get_submodule(unit).weight for unit in sizes]
    with problem.full(list(sizes)) as model:
        total = [torch.zeros_like(weight) for weight in weights]
        for batch in problem.batches(SHORT):
            for own, gradient in zip(total, torch.autograd.grad(model(**batch, use_cache=False).loss, weights)):
                own += gradient
        fisher = torch.zeros(len(weights), device=weights[0].device)
        for example in problem.batches(EXAMPLES, size=1):
            gradients = torch.autograd.grad(model(**example, use_cache=False).loss, weights)
            fisher += torch.stack([gradient.square().sum() for gradient in gradients])
    return _listed({"gradient norm": torch.stack([own.norm() for own in total]), "Fisher": fisher})


def kappa_tune(base: Any, sizes: dict[str, int]) -> Scores:
    """PEFT's KappaTune, which looks at no data: the smaller the condition number of W, the better a target."""
    order = KappaTuneSelector(base, show_progress=False).get_best_targets()
    return {"KappaTune": [-float(order.index(unit)) for unit in sizes]}


def aletheia(problem: Problem, sizes: dict[str, int]) -> Scores:
    """aletheia-lora's probe of the base model, with its defaults: each layer's score, shared out among its modules."""
    from aletheia_lora import gradient_probe  # for this arm only: pip install --no-deps aletheia-lora

    rows = [torch.tensor(example.tokens) for example in problem.train]
    data: Any = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} for tokens in rows]
    layers = list(dict.fromkeys(unit_of(unit, "layer") for unit in sizes))
    norms = gradient_probe(problem.base, data, len(layers), compute_dtype=torch.float32, seed=problem.seed)
    modules = len(sizes) / len(layers)
    return {"aletheia-lora": [float(f"{norms[layers.index(unit_of(u, 'layer'))] / modules:.5g}") for u in sizes]}


def short(problem: Problem, sizes: dict[str, int], learning_rate: float) -> Scores:
    """By attribution after a short stage 1 at a constant learning rate."""
    found = {}
    for multiple in MULTIPLES:
        with problem.lora(dict.fromkeys(sizes, RANK)) as model:
            for step in problem.fit(model, multiple * learning_rate, max(STEPS), decay=False):
                if step in STEPS:
                    found[f"{step} steps at {multiple} ×"] = attribution(model, problem, SHORT)
    return _listed(found)


def descent(problem: Problem, sizes: dict[str, int], learning_rate: float, steps: int) -> Scores:
    """The paper's search, as the package has it, for 30 % of the modules, after LoRA on all of them."""
    base: Any = copy.deepcopy(problem.base)
    with tempfile.TemporaryDirectory() as directory:
        with problem.lora(dict.fromkeys(sizes, RANK)) as model:
            for _ in problem.fit(model, learning_rate, steps):
                pass
            model.save_pretrained(directory)
        config = ILAConfig.from_lora(LoraConfig.from_pretrained(directory), granularity="module", gate_mode="open")
        gated = PeftModel.from_pretrained(base, directory, config=config, is_trainable=True)
        arguments = TrainingArguments(
            directory,
            per_device_train_batch_size=BATCH,
            seed=problem.seed,
            dataloader_pin_memory=False,  # `collate` has moved it
            report_to="none",
            disable_tqdm=True,
        )
        rows: Any = problem.train
        trainer = Trainer(model=gated, args=arguments, data_collator=problem.collate, train_dataset=rows)
        importance = learn_gates(trainer, method="descent", budget=0.3)
    found = dict(zip(importance.units, importance.scores))
    return {"descent": [float(f"{found[unit]:.5g}") for unit in sizes]}


def attribution(model: PeftModel, problem: Problem, batches: int) -> torch.Tensor:
    """
    −∂L/∂γ of each module's gate at γ = 0, what `learn_gates` measures.

    There the model is the base model, and the gradient for γ is that for B at 0, multiplied by the trained B.
    """
    layers = _layers(model)
    weights = [layer.lora_B["default"].weight for layer in layers]
    trained = [weight.detach().clone() for weight in weights]
    total = torch.zeros(len(layers), device=trained[0].device)
    try:
        for weight in weights:
            weight.data.zero_()
        for batch in problem.batches(batches):
            total -= torch.stack([(g * b).sum() for g, b in zip(_gradients_of_b(model, batch), trained)])
    finally:
        for weight, value in zip(weights, trained):
            weight.data.copy_(value)
    return total / batches


@torch.no_grad()
def delta_norms(model: PeftModel) -> torch.Tensor:
    """‖ΔW‖_F of each module."""
    layers = _layers(model)
    products = [SCALE * layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in layers]
    return torch.stack([product.norm() for product in products])


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_B") and len(module.lora_B)]


def _gradients_of_b(model: Any, batch: Batch) -> Sequence[torch.Tensor]:
    weights = [layer.lora_B["default"].weight for layer in _layers(model)]
    return torch.autograd.grad(model(**batch, use_cache=False).loss, weights)


def _norms(gradients: list[Sequence[torch.Tensor]], order: int) -> torch.Tensor:
    """The mean over batches of each module's norm."""
    return torch.stack([torch.stack([g.norm(order) for g in batch]) for batch in gradients]).mean(0)


def _listed(found: dict[str, torch.Tensor]) -> Scores:
    return {name: [float(f"{score:.5g}") for score in scores.tolist()] for name, scores in found.items()}
