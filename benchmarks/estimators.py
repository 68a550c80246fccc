"""
Which estimator of importance finds the modules that matter, at what cost, and how stable is it?

Stage 1 is that of `kept.py`. Every estimator then sees the same training batches of one adapter and may set the gates
γ to any values: its cost is the number of batches whose gradient ∂L/∂γ it asks for. Per run (data set and seed) and
estimator, the scores and the share of the held-out loss gain that the hard mask keeps go to `--output_dir`; what is
there already is not computed again.

    python benchmarks/estimators.py --data ../shared/data/sft_alpaca_gpt4.jsonl ../shared/data/sft_lima.jsonl \
        ../shared/data/sft_no_robots.jsonl --seeds 0 1 2 --output_dir OUT

About 15 minutes a run on 2 cores. `--table` prints the tables of `docs/estimators.md` from what is there.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kept import SHARES, fine_tune

from peft_ila.files import whole_file
from peft_ila.layer import Gate
from peft_ila.units import unit_of

BATCHES = 32


class FreeGate(Gate):
    """A gate whose γ is any number, also exactly 0 or 1, with a gradient."""

    gamma: torch.Tensor

    is_open = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma.to(x)


class Problem:
    """A fine-tuned adapter: its loss and ∂L/∂γ on one of its batches for any γ, a vector with one entry a module."""

    def __init__(self, data: str, seed: int, args: argparse.Namespace) -> None:
        adapter = args.output_dir / "adapters" / f"{Path(data).stem}_{seed}"
        trainer = fine_tune(data, seed, args, adapter if adapter.exists() else None)
        if not adapter.exists():
            trainer.model.save_pretrained(adapter)
        self.model = trainer.model
        self.model.set_gate_mode("soft")
        self.model.eval()
        self.gates = self.model.gates()
        self.units = list(self.gates)
        for gate in self.gates.values():
            gate.__class__ = FreeGate
            gate.weight.requires_grad_(False)
        torch.manual_seed(1000 + seed)
        self.batches = list(itertools.islice(trainer.get_train_dataloader(), BATCHES))
        self.held_out = list(trainer.get_eval_dataloader())
        zeros, ones = torch.zeros(len(self.units)), torch.ones(len(self.units))
        self.loss_open, self.loss_closed = self.held_out_loss(ones), self.held_out_loss(zeros)
        self.cost = 0

    def loss(self, gamma: torch.Tensor, batch: Any) -> torch.Tensor:
        for gate, value in zip(self.gates.values(), gamma.unbind()):
            gate.gamma = value
        return self.model(**batch, use_cache=False).loss

    def gradient(self, gamma: torch.Tensor, batch: Any) -> torch.Tensor:
        self.cost += 1
        gamma = gamma.detach().clone().requires_grad_()
        return torch.autograd.grad(self.loss(gamma, batch), gamma)[0]

    @torch.no_grad()
    def held_out_loss(self, gamma: torch.Tensor) -> float:
        tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in self.held_out]
        losses = [float(self.loss(gamma, batch)) for batch in self.held_out]
        return sum(a * b for a, b in zip(losses, tokens)) / sum(tokens)

    def kept(self, scores: torch.Tensor, share: float) -> float:
        gamma = torch.zeros(len(self.units))
        gamma[top(scores, share)] = 1
        return (self.loss_closed - self.held_out_loss(gamma)) / (self.loss_closed - self.loss_open)

    def layer_mean(self, scores: torch.Tensor) -> torch.Tensor:
        """Each module's score replaced by the mean of its decoder layer."""
        layers = [unit_of(unit, "layer") for unit in self.units]
        means = {layer: statistics.mean(s for s, own in zip(scores.tolist(), layers) if own == layer)
                 for layer in dict.fromkeys(layers)}
        return torch.tensor([means[layer] for layer in layers])

    @property
    def lambda_(self) -> float:
        """What all deltas are worth on training batches."""
        with torch.no_grad():
            ones = torch.ones(len(self.units))
            return statistics.mean(
                float(self.loss(ones * 0, batch) - self.loss(ones, batch)) for batch in self.batches[:4]
            )


def top(scores: torch.Tensor, share: float) -> torch.Tensor:
    return scores.topk(max(1, round(share * len(scores)))).indices


def path(problem: Problem, points: tuple[float, ...], batches: int = BATCHES) -> torch.Tensor:
    ones = torch.ones(len(problem.units))
    gradients = [
        problem.gradient(ones * points[i % len(points)], batch) for i, batch in enumerate(problem.batches[:batches])
    ]
    return -torch.stack(gradients).mean(0)


def random_masks(problem: Problem, points: tuple[float, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    gradients = [
        problem.gradient((torch.rand(len(problem.units), generator=generator) < points[i % len(points)]).float(), batch)
        for i, batch in enumerate(problem.batches)
    ]
    return -torch.stack(gradients).mean(0)


def descent(
    problem: Problem,
    penalty: Callable[[float], float],
    start: torch.Tensor | float = 2.0,
    lr: float = 0.15,
    batches: int = BATCHES,
    optimizer: Any = torch.optim.Adam,
    offset: int = 0,
) -> torch.Tensor:
    """Descent on L + λ·mean(γ), γ = σ(s); `penalty` gives λ at a progress from 0 to 1."""
    n = len(problem.units)
    s = (torch.zeros(n) + start).requires_grad_()
    steps = optimizer([s], lr=lr)
    for i, batch in enumerate(problem.batches[offset : offset + batches]):
        gamma = torch.sigmoid(s.detach())
        gradient = problem.gradient(gamma, batch) + penalty(i / batches) / n
        s.grad = gradient * gamma * (1 - gamma)
        steps.step()
    return s.detach()


def lagrangian(problem: Problem, share: float = 0.3, lr: float = 0.15) -> torch.Tensor:
    """Descent with a multiplier that brings mean(γ) to the budget along a straight schedule."""
    n = len(problem.units)
    s = torch.full((n,), 2.0, requires_grad=True)
    adam = torch.optim.Adam([s], lr=lr)
    multiplier = problem.lambda_
    for i, batch in enumerate(problem.batches):
        gamma = torch.sigmoid(s.detach())
        budget = 0.88 + (share - 0.88) * min(1, 1.25 * (i + 1) / BATCHES)
        multiplier *= math.exp(4 * (float(gamma.mean()) - budget))
        s.grad = (problem.gradient(gamma, batch) + multiplier / n) * gamma * (1 - gamma)
        adam.step()
    return s.detach()


def hard_concrete(problem: Problem, lr: float = 0.15, temperature: float = 2 / 3) -> torch.Tensor:
    """Louizos et al. 2018, with λ on the expected number of gates that are not 0."""
    n = len(problem.units)
    low, high = -0.1, 1.1
    generator = torch.Generator().manual_seed(0)
    s = torch.full((n,), 2.0, requires_grad=True)
    adam = torch.optim.Adam([s], lr=lr)
    lambda_ = problem.lambda_
    for batch in problem.batches:
        u = torch.rand(n, generator=generator).clamp(1e-6, 1 - 1e-6)
        gamma = (torch.sigmoid((u.log() - (1 - u).log() + s) / temperature) * (high - low) + low).clamp(0, 1)
        active = torch.sigmoid(s - temperature * math.log(-low / high))
        gradient = problem.gradient(gamma, batch)
        adam.zero_grad()
        ((gradient * gamma).sum() + lambda_ * active.mean()).backward()
        adam.step()
    return s.detach()


def straight_through(problem: Problem, start: torch.Tensor, share: float, batches: int, offset: int) -> torch.Tensor:
    """The forward pass has the hard top-H mask, the gradient goes to all scores as if it had not."""
    scale = float(start.std())
    s = (start / scale).requires_grad_()
    adam = torch.optim.Adam([s], lr=0.1)
    for batch in problem.batches[offset : offset + batches]:
        gamma = torch.zeros(len(s))
        gamma[top(s.detach(), share)] = 1
        s.grad = problem.gradient(gamma, batch)
        adam.step()
    return s.detach()


def shrinking(problem: Problem, last: float = 0.1, decay: float = 0.9, floor: float = 0.0) -> torch.Tensor:
    """Attribution along a path of hard masks: the mask keeps ever fewer of the units with the greatest running score."""
    n = len(problem.units)
    total = torch.zeros(n)
    for i, batch in enumerate(problem.batches):
        share = last ** (i / (BATCHES - 1))
        gamma = torch.full((n,), floor)
        gamma[top(total, share)] = 1
        if i == 0:
            gamma.fill_(1)
        total = decay * total - (1 - decay) * problem.gradient(gamma, batch)
    return total


def norm(problem: Problem) -> torch.Tensor:
    layers = dict(problem.model.base_model.model.named_modules())
    norms = []
    for unit in problem.units:
        layer = layers[unit]
        delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        norms.append(float(delta.norm()))
    return torch.tensor(norms)


MIDPOINTS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
ESTIMATORS: dict[str, Callable[[Problem], torch.Tensor]] = {
    "path": lambda p: path(p, MIDPOINTS),
    "path, lower half": lambda p: path(p, tuple(c / 2 for c in MIDPOINTS)),
    "pressure": lambda p: descent(p, lambda _, value=p.lambda_: value),
    "path 16 + pressure 16": lambda p: descent(
        p, lambda _, value=p.lambda_: value, zscore(path(p, MIDPOINTS, 16)) , batches=16, offset=16
    ),
    "shrinking masks": shrinking,
    "random masks": lambda p: random_masks(p, MIDPOINTS),
    "path 16 + straight-through 16 at 30 %": lambda p: straight_through(p, path(p, MIDPOINTS, 16), 0.3, 16, 16),
    "annealed pressure": lambda p: descent(p, lambda t, value=p.lambda_: 2 * t * value),
    "Lagrangian, H = 30 %": lagrangian,
    "hard-concrete": hard_concrete,
    "first order": lambda p: path(p, (1.0,)),
    "at the base model": lambda p: path(p, (0.0,)),
    "norm of ΔW": norm,
    "random": lambda p: torch.rand(len(p.units), generator=torch.Generator().manual_seed(len(str(p.loss_open)))),
    "plain descent from s = 4": lambda p: descent(p, lambda _: 0.0, 4.0, 0.1),
}


def zscore(scores: torch.Tensor) -> torch.Tensor:
    return (scores - scores.mean()) / scores.std()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files with `messages`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60, help="of stage 1")
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS))
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    args.granularity = "module"

    for seed, data in itertools.product(args.seeds, args.data):
        file = args.output_dir / f"{Path(data).stem}_{seed}.json"
        result = json.loads(file.read_text()) if file.exists() else {"data": Path(data).name, "seed": seed}
        found = result.setdefault("estimators", {})
        todo = [name for name in args.estimators if name not in found]
        if not todo:
            continue
        problem = Problem(data, seed, args)
        result |= {"units": problem.units, "loss_base": problem.loss_closed, "loss_tuned": problem.loss_open}
        for name in todo:
            problem.cost = 0
            scores = ESTIMATORS[name](problem)
            by_layer = problem.layer_mean(scores)
            found[name] = {
                "cost": problem.cost,
                "scores": scores.tolist(),
                "kept": [problem.kept(scores, share) for share in SHARES],
                "kept_layers": [problem.kept(by_layer, share) for share in SHARES[:2]],
            }
            print(file.stem, name, problem.cost, [round(k, 3) for k in found[name]["kept"]],
                  [round(k, 3) for k in found[name]["kept_layers"]], flush=True)
            with whole_file(file) as temporary:
                temporary.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
