"""The arms of the study and the order of their runs. Each is a way to spend trainable parameters."""

import itertools
import random
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from benchmarks.study.problem import RANK
from peft_ila.ranking.comparison import standardised
from peft_ila.units import unit_of

SEEDS = (0, 1, 2)
TUNING_SEED = 100  # learning rates are chosen on it; no figure of it is reported
ALIGNMENT = ("sft_alpaca_gpt4", "sft_lima", "sft_dolly")
REASONING = ("reason_gsm8k", "reason_math")
SETS = (*ALIGNMENT, *REASONING)
TUNING_SETS = ("sft_alpaca_gpt4", "sft_dolly", "reason_gsm8k")
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)  # the middle three first, see `Study.rates`
FULL_LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)  # of full fine-tuning
RANDOM = 5

Sizes = dict[str, int]
Choice = tuple[tuple[str, ...], int]  # modules, LoRA's rank there
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Job:
    """
    One piece of work for one process.

    Args:
        kind: "tune", "untrained" (the search without training) or "base" (what is known of the base model without a
            data set).
        data, seed: The run.
        arm: The name of what is tuned; with `learning_rate` it is a job's name.
        group: Arms that share a learning rate.
        method: "lora", "full", "eva" or "adalora".
        units: The modules that are tuned.
        rank: LoRA's.
        ranked: Whether the tuned adapter is ranked too.
    """

    kind: str
    data: str
    seed: int
    arm: str = ""
    group: str = ""
    method: str = "lora"
    units: tuple[str, ...] = ()
    rank: int = RANK
    learning_rate: float = 0.0
    ranked: bool = False

    @property
    def key(self) -> str:
        """The job's name in the output."""
        return "|".join([self.kind, self.data, str(self.seed), self.group, self.arm, f"{self.learning_rate:g}"])

    def described(self) -> dict[str, Any]:
        """What the output says of the job."""
        described = asdict(self)
        for name in ("units", "rank", "ranked"):
            del described[name]
        return described


class Study:
    """
    The figures so far, and what is to be done next.

    Args:
        figures: The rows that there are.
        sizes: LoRA's parameters for each rank, by module.
        second: Whether only the arms of a second model are wanted.
    """

    def __init__(self, figures: list[dict[str, Any]], sizes: Sizes, second: bool = False) -> None:
        self.sizes = sizes
        self.sets, self.arms = (ALIGNMENT, ARMS_OF_SECOND) if second else (SETS, ARMS)
        self.units = list(sizes)
        self.losses: dict[tuple[str, int, str, str], dict[float, float]] = {}
        self.scores: dict[tuple[str, int, str], list[float]] = {}
        self._known: dict[tuple[str, int, str, str], Choice] = {}
        for row in figures:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Take in what a job has found."""
        if row["kind"] == "tune":
            own = self.losses.setdefault((row["data"], row["seed"], row["group"], row["arm"]), {})
            own[row["learning_rate"]] = row["loss"]
        for name, scores in row.get("scores", {}).items():
            self.scores[row["data"], row["seed"], name] = scores

    def rates(self, group: str) -> dict[float, float | None]:
        """
        The learning rates to try for a group, each with its mean loss once that is known.

        They are the middle three of a list, and then those beside the best one. The loss is of the seed that is not
        reported.
        """
        listed = FULL_LEARNING_RATES if group.startswith("weights") else LEARNING_RATES
        losses = [self.losses.get((data, TUNING_SEED, group, TUNED), {}) for data in TUNING_SETS]
        known = {
            rate: statistics.mean(own[rate] for own in losses) for rate in listed if all(rate in o for o in losses)
        }
        wanted = set(listed[1:4])
        if wanted <= known.keys():
            best = listed.index(min(known, key=lambda rate: known[rate]))
            wanted |= set(listed[max(best - 1, 0) : best + 2])
        return {rate: known.get(rate) for rate in listed if rate in wanted | known.keys()}

    def learning_rate(self, group: str) -> float | None:
        """The best one of the group. None until all were tried."""
        rates = self.rates(group)
        known = {rate: loss for rate, loss in rates.items() if loss is not None}
        return min(known, key=lambda rate: known[rate]) if known.keys() == rates.keys() else None

    def ranking(self, data: str, seed: int, name: str) -> list[float] | None:
        """Scores by a search, by none ("random 0", "first", …) or by other sets. None while they are missing."""
        if name.startswith("random"):
            draw = random.Random(f"{data} {seed} {name}")
            return [draw.random() for _ in self.units]
        if name == "first":
            return [float(-i) for i in range(len(self.units))]
        if name == "last":
            return [float(i) for i in range(len(self.units))]
        if name == "bottom":
            scores = self.ranking(data, seed, "full search")
            return scores and [-score for score in scores]
        if name == "KappaTune":
            return self.scores.get(("", 0, name))
        if name == "mean of other sets":
            others = [self.scores.get((other, seed, "full search")) for other in ALIGNMENT if other != data]
            return [statistics.mean(z) for z in zip(*map(standardised, filter(None, others)))] if all(others) else None
        return self.scores.get((data, seed, name))

    def jobs(self) -> Iterator[Job]:
        """All jobs that can be done with what is known, the most urgent first."""
        yield Job("base", "", 0)
        yield from self._sweep("all", "modules 30")
        runs = [(data, seed) for seed in SEEDS for data in self.sets]
        yield from (Job("untrained", *run) for run in runs)
        if rate := self.learning_rate("all"):
            for run in runs:
                yield self._tune(*run, "all", "full search", (tuple(self.units), RANK), rate, ranked=True)
        for group, sets, arms in self.arms:
            yield from self._sweep(group)
            if rate := self.learning_rate(group):
                for arm, seed, data in itertools.product(arms, SEEDS, sets):
                    if choice := self._choice(data, seed, group, arm):
                        yield self._tune(data, seed, group, arm, choice, rate)

    def _sweep(self, *groups: str) -> Iterator[Job]:
        for data in TUNING_SETS:
            yield Job("untrained", data, TUNING_SEED)
        for group in groups:
            for rate, data in itertools.product(self.rates(group), TUNING_SETS):
                if choice := self._choice(data, TUNING_SEED, group, TUNED):
                    yield self._tune(data, TUNING_SEED, group, TUNED, choice, rate)

    def _tune(
        self, data: str, seed: int, group: str, arm: str, choice: Choice, rate: float, ranked: bool = False
    ) -> Job:
        method = {"weights": "full", "EVA": "eva", "AdaLoRA": "adalora"}.get(group.split()[0], "lora")
        return Job("tune", data, seed, arm, group, method, *choice, rate, ranked)

    def _choice(self, data: str, seed: int, group: str, arm: str) -> Choice | None:
        key = (data, seed, group, arm)
        if key not in self._known and (choice := self._choose(*key)):
            self._known[key] = choice
        return self._known.get(key)

    def _choose(self, data: str, seed: int, group: str, arm: str) -> Choice | None:
        """The modules that an arm of a group tunes, and LoRA's rank there. None while its ranking is missing."""
        kind, *numbers = group.split()
        if kind in ("all", "EVA", "AdaLoRA") or group == "weights 100":
            return tuple(self.units), RANK
        if kind == "uniform":
            return tuple(self.units), int(numbers[0])
        scores = self.ranking(data, seed, arm)
        if scores is None:
            return None
        by_unit = dict(zip(self.units, scores))
        everything = sum(self.sizes.values())
        within = layers_within if kind == "layers" else modules_within
        chosen = within(int(numbers[0]) / 100 * everything, by_unit, self.sizes)
        used = sum(self.sizes[unit] for unit in chosen)
        return tuple(chosen), round(RANK * everything / used) if kind == "raised" else RANK


TUNED = "untrained, 16 batches"  # the ranking by which learning rates are chosen: it costs no training
CHANCE = tuple(f"random {draw}" for draw in range(RANDOM))
BOTH = ("full search", "untrained, 8 batches")
ENDS = ("first", "last")
# group, data sets, arms: in the order in which they are run
ARMS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("modules 30", SETS, (*BOTH, TUNED, *CHANCE, "KappaTune", "mean of other sets", *ENDS)),
    ("layers 30", ALIGNMENT, (*BOTH, *CHANCE[:3], *ENDS)),
    ("all", ALIGNMENT, ("again",)),
    ("modules 75", ALIGNMENT, ("full search", "random 0", "bottom")),
    ("weights 100", ALIGNMENT, ("full search",)),
    ("weights 75", ALIGNMENT, ("full search", "random 0", "bottom")),
    ("modules 10", ALIGNMENT, (*BOTH, *CHANCE[:3])),
    ("modules 20", ALIGNMENT, (*BOTH, "random 0")),
    ("raised 30", ALIGNMENT, (*BOTH, "random 0")),
    ("uniform 2", ALIGNMENT, ("uniform",)),
    ("uniform 1", ALIGNMENT, ("uniform",)),
    ("EVA", ALIGNMENT, ("EVA",)),
    ("AdaLoRA", ALIGNMENT, ("AdaLoRA",)),
)
ARMS_OF_SECOND: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("modules 30", ALIGNMENT, (*BOTH, *CHANCE[:3], "mean of other sets")),
    ("modules 75", ALIGNMENT, ("full search", "random 0", "bottom")),
    ("layers 30", ALIGNMENT, ("full search", "random 0")),
    ("raised 30", ALIGNMENT, ("full search", "random 0")),
)


def modules_within(budget: float, scores: dict[str, float], sizes: Sizes) -> list[str]:
    """Units in the order of their scores; one that does not fit any more is left out."""
    chosen, left = [], budget
    for unit in sorted(scores, key=lambda unit: -scores[unit]):
        if sizes[unit] <= left:
            chosen.append(unit)
            left -= sizes[unit]
    return chosen


def layers_within(budget: float, scores: dict[str, float], sizes: Sizes) -> list[str]:
    """The same with whole decoder layers: their modules. A layer's score is the sum of its modules' scores."""
    layers = modules_within(budget, by_layer(scores), by_layer(sizes))
    return [unit for layer in layers for unit in scores if unit_of(unit, "layer") == layer]


def by_layer(values: Mapping[str, Number]) -> dict[str, Number]:
    """The values of modules, summed over each decoder layer."""
    sums: dict[str, Number] = {}
    for unit, value in values.items():
        layer = unit_of(unit, "layer")
        sums[layer] = sums[layer] + value if layer in sums else value
    return sums
