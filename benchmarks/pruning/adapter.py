"""One trained adapter: ways to choose what of it is kept, and the held-out losses with that."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.problem import Problem
from peft_ila.search.directions import Directions
from peft_ila.search.measurement import measuring
from peft_ila.units import unit_of

BATCHES, ROUNDS, GATE_STEPS, GATE_RATE = 16, 3, 24, 0.05  # the defaults of `peft-ila prune`
HALF = 32  # held-out examples: on the first half shares and factors are chosen, on the second they are reported


def losses(problem: Problem, model: Any) -> list[float]:
    """On both halves of the held-out examples."""
    held_out = problem.held_out[: 2 * HALF]
    return [problem.loss(model, held_out[:HALF]), problem.loss(model, held_out[HALF:])]


class Adapter:
    """
    Its singular directions, what each is worth, and the held-out losses with any gates on them.

    Gates have the shape (directions,): 1 keeps a direction, 0 leaves it out. A share is one of the parameters.
    """

    def __init__(self, problem: Problem, trainer: Any, measurement: Any, cache: Path) -> None:
        self.problem, self.model, self.measurement = problem, trainer.model, measurement
        self.directions = Directions(trainer.model.base_model)
        self.steps = measurement.steps()
        self.sizes = self.directions.sizes.float()
        self.none, self.all = torch.zeros(len(self.sizes)), torch.ones(len(self.sizes))
        if not cache.exists():
            steps = itertools.islice(self.steps, BATCHES)
            torch.save(torch.stack([self.directions.slope(measurement, step, self.none) for step in steps]), cache)
        self.slopes: torch.Tensor = torch.load(cache, weights_only=True)  # of each batch
        self.worth = -self.slopes.mean(0)
        self._refined: dict[float, torch.Tensor] = {}  # two arms look at each

    def gated(self, gates: torch.Tensor) -> Any:
        """The model with these gates."""
        self.directions.set_gates(gates)
        for gate in self.measurement._gates:
            gate.state = "open"
        return self.model

    def losses(self, gates: torch.Tensor) -> list[float]:
        """On both halves of the held-out examples."""
        return losses(self.problem, self.gated(gates))

    def first(self, value: torch.Tensor, share: float, on: torch.Tensor | None = None) -> torch.Tensor:
        """Those with the most value that fit into a share, beside those that are on."""
        if on is not None:
            value = value.masked_fill(on > 0, torch.inf)
        order = value.argsort(descending=True, stable=True)
        fits = self.sizes[order].cumsum(0) <= share * self.sizes.sum()
        return torch.zeros_like(self.none).index_fill(0, order[fits], 1.0)

    def attribution(self, share: float, batches: int = BATCHES) -> torch.Tensor:
        """The directions that are worth most for each parameter."""
        return self.first(-self.slopes[:batches].mean(0) / self.sizes, share)

    def rounds(self, share: float) -> torch.Tensor:
        """The same in equal parts. After each, the rest is measured again beside what is kept already."""
        if share in self._refined:
            return self._refined[share]
        gates = self.attribution(share / ROUNDS)
        for number in range(2, ROUNDS + 1):
            gates = self.measured(share * number / ROUNDS, beside=gates)
        self._refined[share] = gates
        return gates

    def measured(self, share: float, batches: int = BATCHES, beside: torch.Tensor | None = None) -> torch.Tensor:
        """By attribution on the batches that come next, beside what is on already."""
        steps = itertools.islice(self.steps, batches)
        worth = self.directions.attributions(self.measurement, steps, self.none if beside is None else beside)
        return self.first(worth / self.sizes, share, beside)

    def units(self, granularity: str, share: float) -> torch.Tensor:
        """Whole modules or layers, by attribution for each parameter."""
        names = [unit_of(module, granularity) for module in self.directions.modules]
        number = {name: i for i, name in enumerate(dict.fromkeys(names))}
        units = torch.tensor([number[name] for name in names])
        value = torch.bincount(units, self.worth.double()) / torch.bincount(units, self.sizes.double())
        order = value.argsort(descending=True, stable=True)
        fits = torch.bincount(units, self.sizes.double())[order].cumsum(0) <= share * self.sizes.sum()
        return torch.zeros(len(number)).index_fill(0, order[fits], 1.0)[units]

    def singular_value(self, share: float) -> torch.Tensor:
        """The largest of all modules together: `resize_lora`, loraspectra."""
        return self.first(self.directions.singular_values, share)

    def same_rank(self, share: float) -> torch.Tensor:
        """The largest of every module: LoRA-Squeeze after training."""
        seen: dict[str, Iterator[int]] = {}
        places = [next(seen.setdefault(name, itertools.count())) for name in self.directions.modules]
        return self.first(-torch.tensor(places, dtype=torch.float32), share)

    def random(self, share: float) -> torch.Tensor:
        """Any directions."""
        draw = torch.Generator().manual_seed(self.problem.seed)
        return self.first(torch.rand(len(self.sizes), generator=draw), share)

    def learn(self, gates: torch.Tensor) -> torch.Tensor:
        """The gates of what is kept, learned."""
        units = torch.arange(len(gates)).where(gates > 0, -1)
        return self.directions.learn_gates(self.measurement, self.steps, units, GATE_STEPS, GATE_RATE)

    def ranks(self, gates: torch.Tensor) -> list[int]:
        """The number of directions of each module that are on, in the model's order."""
        kept = dict.fromkeys(self.directions.modules, 0)
        for module, gate in zip(self.directions.modules, gates.tolist()):
            kept[module] += gate != 0
        return list(kept.values())


@contextlib.contextmanager
def adapter(problem: Problem, directory: Path) -> Iterator[Adapter]:
    """A saved adapter, ready to be pruned; what its directions are worth is kept beside it."""
    trainer = problem.trainer(directory)
    with measuring(trainer, trainer.model.base_model, 1, trained=("lora_A", "lora_B")) as measurement:
        yield Adapter(problem, trainer, measurement, directory / "slopes.pt")
