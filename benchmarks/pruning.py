"""
What is kept of a trained adapter's gain when most of its singular directions are left out, and their gates learned.

    python -m benchmarks.pruning --data dialogues dolly=DOLLY.jsonl gsm8k=GSM8K.jsonl \\
        --output benchmarks/results/pruning.json

SmolLM2-135M, LoRA r = 8 on all linear modules, 60 steps at 1e-3 (batches of 8), 16 training batches to measure. All
losses are of 64 held-out examples. Each arm is written when it is done, and a run that was killed goes on.
"""

import argparse
import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.problem import fine_tune, held_out_loss
from benchmarks.record import save
from peft_ila.embedded import dialogues, write_jsonl
from peft_ila.search.directions import Directions
from peft_ila.search.measurement import measuring

STEPS, RATE = 16, 1e-3
SHARES = (0.02, 0.05, 0.125, 0.25)


class Adapter:
    """One trained adapter, its directions, and the loss of any gates on them."""

    def __init__(self, trainer: Any, measurement: Any) -> None:
        self.trainer, self.measurement = trainer, measurement
        self.directions = Directions(trainer.model.base_model)
        self.steps = measurement.steps()
        self.sizes = self.directions.sizes.float()
        self.none, self.all = torch.zeros(len(self.sizes)), torch.ones(len(self.sizes))
        self.base, self.whole = self.loss(self.none), self.loss(self.all)
        self.worth = self.measure(self.none)

    def measure(self, gates: torch.Tensor) -> torch.Tensor:
        return self.directions.attributions(self.measurement, itertools.islice(self.steps, STEPS), gates)

    def loss(self, gates: torch.Tensor) -> float:
        self.directions.set_gates(gates)
        for gate in self.measurement._gates:
            gate.state = "open"
        return held_out_loss(self.trainer)

    def kept(self, gates: torch.Tensor) -> float:
        return (self.base - self.loss(gates)) / (self.base - self.whole)

    def first(self, value: torch.Tensor, share: float, on: torch.Tensor | None = None) -> torch.Tensor:
        """The gates with the most valuable directions on that fit into a share of the parameters."""
        gates = torch.zeros_like(value)
        left = share * float(self.sizes.sum())
        if on is not None:
            value = value.masked_fill(on > 0, torch.inf)
        for index in value.argsort(descending=True, stable=True).tolist():
            left -= float(self.sizes[index])
            if left < 0:
                break
            gates[index] = 1
        return gates

    def modules(self, share: float) -> torch.Tensor:
        """The same with all directions of a module or none."""
        names = self.directions.modules
        total = {name: [0.0, 0.0] for name in names}
        for name, worth, size in zip(names, self.worth.tolist(), self.sizes.tolist()):
            total[name][0] += worth
            total[name][1] += size
        left, on = share * float(self.sizes.sum()), set()
        for name, (_, size) in sorted(total.items(), key=lambda item: -item[1][0] / item[1][1]):
            left -= size
            if left < 0:
                break
            on.add(name)
        return torch.tensor([float(name in on) for name in names])

    def same_rank(self, share: float) -> torch.Tensor:
        places: dict[str, int] = {}
        value = []
        for name in self.directions.modules:
            places[name] = places.get(name, -1) + 1
            value.append(-float(places[name]))
        return self.first(torch.tensor(value), share)

    @functools.cache  # noqa: B019  one adapter at a time
    def rounds(self, share: float, number: int) -> torch.Tensor:
        gates = self.first(self.worth / self.sizes, share / number)
        for one in range(2, number + 1):
            gates = self.first(self.measure(gates) / self.sizes, share * one / number, gates)
        return gates

    def learn(self, kept: torch.Tensor, steps: int = 24, rate: float = 0.05) -> torch.Tensor:
        units = torch.arange(len(kept)).where(kept > 0, -1)
        return self.directions.learn_gates(self.measurement, self.steps, units, steps, rate)

    def tune(self, kept: torch.Tensor, steps: int, rate: float) -> float:
        """What is kept after LoRA steps on A and B of the kept directions, at the cost of as many steps on gates."""
        self.directions.set_gates(kept)
        factors = self.directions._factors
        weights = [weight for _, _, a, b in factors for weight in (a, b)]
        before = [weight.detach().clone() for weight in weights]
        parts = kept.split([len(a) for _, _, a, _ in factors])
        adam = torch.optim.Adam(weights, lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda done: 1 - done / steps)

        def step_taken() -> torch.Tensor:
            for (_, _, a, b), part in zip(factors, parts):
                a.grad *= part[:, None]
                b.grad *= part
            adam.step()
            schedule.step()
            return torch.zeros(1)

        for step in itertools.islice(self.steps, steps):
            self.measurement.slope(step, step_taken)
        loss = held_out_loss(self.trainer)
        for weight, value in zip(weights, before):
            weight.data.copy_(value)
        return (self.base - loss) / (self.base - self.whole)


def arms(adapter: Adapter) -> dict[str, Any]:
    """What to measure, by name, as functions that give the kept part of the gain."""
    value = adapter.worth / adapter.sizes
    strength = adapter.directions.singular_values
    draw = torch.rand(len(value), generator=torch.Generator().manual_seed(0))
    chosen: dict[str, Any] = {
        "attribution": lambda share: adapter.first(value, share),
        "singular value": lambda share: adapter.first(strength, share),
        "same rank": adapter.same_rank,
        "whole modules": adapter.modules,
        "random": lambda share: adapter.first(draw, share),
    }
    found: dict[str, Any] = {
        f"{name} {share}": lambda pick=pick, share=share: adapter.kept(pick(share))
        for name, pick in chosen.items()
        for share in SHARES
        if name != "same rank" or share >= 0.125
    }
    for factor in (0.7, 0.85, 1.15, 1.3):
        found[f"all times {factor}"] = lambda factor=factor: adapter.kept(factor * adapter.all)

    by = chosen["attribution"]
    twentieth = functools.cache(lambda: adapter.learn(by(0.05)))  # several arms look at these gates
    found["attribution 0.05, gates 24 at 0.05"] = lambda: adapter.kept(twentieth())
    found["attribution 0.05, gates of at least 0"] = lambda: adapter.kept(twentieth().clamp(min=0))
    for back in (0.25, 0.5):  # stands for a penalty on (γ − 1)²
        found[f"attribution 0.05, gates {back} of the way back to 1"] = lambda back=back: adapter.kept(
            twentieth() + back * (by(0.05) - twentieth())
        )
    found["three rounds 0.05"] = lambda: adapter.kept(adapter.rounds(0.05, 3))
    learned = {
        "attribution 0.05, gates 8 at 0.05": (lambda: by(0.05), 8, 0.05),
        "attribution 0.05, gates 64 at 0.05": (lambda: by(0.05), 64, 0.05),
        "attribution 0.05, gates 24 at 0.02": (lambda: by(0.05), 24, 0.02),
        "attribution 0.05, gates 24 at 0.1": (lambda: by(0.05), 24, 0.1),
        "three rounds 0.05, gates 24 at 0.05": (lambda: adapter.rounds(0.05, 3), 24, 0.05),
        "singular value 0.05, gates 24 at 0.05": (lambda: chosen["singular value"](0.05), 24, 0.05),
        "whole modules 0.05, gates 24 at 0.05": (lambda: adapter.modules(0.05), 24, 0.05),
        "attribution 0.125, gates 24 at 0.05": (lambda: by(0.125), 24, 0.05),
        "all, gates 24 at 0.05": (lambda: adapter.all, 24, 0.05),
    }
    for name, (pick, steps, rate) in learned.items():
        found[name] = lambda pick=pick, steps=steps, rate=rate: adapter.kept(adapter.learn(pick(), steps, rate))
    found["attribution 0.05, LoRA 24 at 0.0005"] = lambda: adapter.tune(by(0.05), 24, 5e-4)
    return found


def print_table(figures: dict[str, Any]) -> None:
    """The kept part of the gain by arm, a column for each set."""
    names = [name for name in figures if name != "made_by"]
    print(f"| arm | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
    for arm in dict.fromkeys(arm for name in names for arm in figures[name]):
        cells = [f"{figures[name][arm]:.3f}" if arm in figures[name] else "–" for name in names]
        print(f"| {arm} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="NAME=FILE, or 'dialogues' for the demo's.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, default=Path("pruning_adapters"))
    parser.add_argument("--arms", default="", help="A regular expression: only the arms whose names hold it.")
    args = parser.parse_args()
    figures: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for data in args.data:
        name, _, file = data.partition("=")
        if not file:
            file = str(args.adapters / "dialogues.jsonl")
            rows = [{"messages": [*row["prompt"], *row["completion"]]} for row in dialogues()]
            write_jsonl(rows, file)
        own = figures.setdefault(name, {})
        trainer = fine_tune(file, 0, 60, args.adapters / name, learning_rate=RATE)
        with measuring(trainer, trainer.model.base_model, 1, trained=("lora_A", "lora_B")) as measurement:
            adapter = Adapter(trainer, measurement)
            own |= {"base": adapter.base, "whole": adapter.whole, "directions": len(adapter.sizes)}
            for arm, run in arms(adapter).items():
                if arm not in own and re.search(args.arms, arm):
                    own[arm] = run()
                    print(f"{name:<10} {arm:<60} {own[arm]:.3f}", flush=True)
                    save(args.output, figures)
    print_table(figures)


if __name__ == "__main__":
    main()
