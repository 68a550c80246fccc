"""The arms of the study, each a way to spend trainable parameters, and the order of their runs."""

import itertools
import random
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
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
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Job:
    """
    One piece of work for one process.

    Args:
        kind: "tune", or "rank" (searches that train nothing; "untrained" is only that of the package), "short" (those
            with a short stage 1), "aletheia" (that package's), "descent" (the paper's), or "base" (what is known of
            the base model without a data set).
        data, seed: The run.
        arm: The name of what is tuned; with `learning_rate` it is a job's name.
        group: Arms that share a learning rate.
        method: "lora", "full", "eva" or "adalora".
        ranks: LoRA's rank at each module that is tuned.
        ranked: Whether the tuned adapter is ranked too.
    """

    kind: str
    data: str
    seed: int
    arm: str = ""
    group: str = ""
    method: str = "lora"
    ranks: dict[str, int] = field(default_factory=dict, hash=False, compare=False)
    learning_rate: float = 0.0
    ranked: bool = False

    @property
    def key(self) -> str:
        """The job's name in the output."""
        return "|".join([self.kind, self.data, str(self.seed), self.group, self.arm, f"{self.learning_rate:g}"])

    def described(self) -> dict[str, Any]:
        """What the output says of the job."""
        described = asdict(self)
        del described["ranks"], described["ranked"]
        return described


class Study:
    """
    The figures so far, and what is to be done next.

    Args:
        figures: The rows that there are.
        sizes: LoRA's parameters for each rank, by module.
        second: Whether only the arms of a second model are wanted, and the searches that they need.
    """

    def __init__(self, figures: list[dict[str, Any]], sizes: Sizes, second: bool = False) -> None:
        self.sizes = sizes
        self.second = second
        self.units = list(sizes)
        self.losses: dict[tuple[str, int, str, str], dict[float, float]] = {}
        self.scores: dict[tuple[str, int, str], list[float]] = {}
        self._known: dict[tuple[str, int, str, str], dict[str, int]] = {}
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
        The learning rates that are tried for a group, with the mean loss on the seed that is not reported, once known.

        The middle three of a list, and those beside the best one.
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
        """The best one of the group, once all that are to be tried were."""
        rates = self.rates(group)
        known = {rate: loss for rate, loss in rates.items() if loss is not None}
        return min(known, key=lambda rate: known[rate]) if known.keys() == rates.keys() else None

    def ranking(self, data: str, seed: int, name: str) -> list[float] | None:
        """The scores by a search, by none ("random 0", "first", …) or by those of other sets."""
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
        if name.startswith("of "):
            return self.scores.get((name[3:], seed, "full search"))
        if name == "mean of other sets":
            others = [self.scores.get((other, seed, "full search")) for other in ALIGNMENT if other != data]
            return [statistics.mean(z) for z in zip(*map(standardised, filter(None, others)))] if all(others) else None
        if name.endswith(" per parameter"):
            scores = self.ranking(data, seed, name.removesuffix(" per parameter"))
            return scores and [score / self.sizes[unit] for score, unit in zip(scores, self.units)]
        return self.scores.get((data, seed, name))

    def jobs(self) -> Iterator[Job]:
        """All jobs whose needs are met, the most urgent first."""
        if not self.second:
            yield Job("base", "", 0)
        yield from self._sweep("all", "modules 30")
        for data, seed in itertools.product(ALIGNMENT if self.second else SETS, SEEDS):
            yield self._search(data, seed)
        if rate := self.learning_rate("all"):
            for seed, data in itertools.product(SEEDS, ALIGNMENT if self.second else SETS):
                yield self._tune(data, seed, "all", "full search", dict.fromkeys(self.units, RANK), rate, ranked=True)
            for seed, data in itertools.product(SEEDS, () if self.second else ALIGNMENT):
                yield Job("short", data, seed, learning_rate=rate)
                yield Job("aletheia", data, seed)
                yield Job("descent", data, seed, learning_rate=rate)
        for group, sets, arms in ARMS_OF_SECOND if self.second else ARMS:
            yield from self._sweep(group)
            rate = self.learning_rate(group)
            for arm, seed, data in itertools.product(arms, SEEDS, sets) if rate else ():
                ranks = self._ranks(data, seed, group, arm)
                if ranks:
                    yield self._tune(data, seed, group, arm, ranks, rate or 0)

    def _search(self, data: str, seed: int) -> Job:
        return Job("untrained" if self.second else "rank", data, seed)

    def _sweep(self, *groups: str) -> Iterator[Job]:
        for data in TUNING_SETS:
            yield self._search(data, TUNING_SEED)
        for group in groups:
            for rate, data in itertools.product(self.rates(group), TUNING_SETS):
                if ranks := self._ranks(data, TUNING_SEED, group, TUNED):
                    yield self._tune(data, TUNING_SEED, group, TUNED, ranks, rate)

    def _tune(
        self, data: str, seed: int, group: str, arm: str, ranks: dict[str, int], rate: float, ranked: bool = False
    ) -> Job:
        method = {"weights": "full", "EVA": "eva", "AdaLoRA": "adalora"}.get(group.split()[0], "lora")
        return Job("tune", data, seed, arm, group, method, ranks, rate, ranked)

    def _ranks(self, data: str, seed: int, group: str, arm: str) -> dict[str, int] | None:
        key = (data, seed, group, arm)
        if key not in self._known and (ranks := self._allocate(*key)):
            self._known[key] = ranks
        return self._known.get(key)

    def _allocate(self, data: str, seed: int, group: str, arm: str) -> dict[str, int] | None:
        """LoRA's rank at each module that an arm of a group tunes; nothing while its ranking is missing."""
        kind, *numbers = group.split()
        if kind in ("all", "EVA", "AdaLoRA") or group == "weights 100":
            return dict.fromkeys(self.units, RANK)
        if kind == "uniform":
            return dict.fromkeys(self.units, int(numbers[0]))
        scores = self.ranking(data, seed, arm)
        if scores is None:
            return None
        by_unit = dict(zip(self.units, scores))
        budget = RANK * sum(self.sizes.values())
        if kind == "ranks":
            return ranks_by_importance(by_unit, self.sizes, budget, *map(float, numbers))
        share = int(numbers[0]) / 100
        within = layers_within if kind == "layers" else modules_within
        chosen = within(share * sum(self.sizes.values()), by_unit, self.sizes)
        rank = RANK
        if kind == "raised":
            rank = round(budget / sum(self.sizes[unit] for unit in chosen))
        return dict.fromkeys(chosen, rank)


TUNED = "untrained, 16 batches"  # the ranking by which learning rates are chosen: it costs no training
CHANCE = tuple(f"random {draw}" for draw in range(RANDOM))
BOTH = ("full search", "untrained, 8 batches")
SEARCHES = (
    *BOTH, *CHANCE, "untrained, 16 batches", "12 steps at 4 ×", "gradient norm", "mean of other sets",
    "untrained, 4 batches", "untrained, 1 batches", "Fisher", "12 steps at 1 ×", "12 steps at 2 ×", "8 steps at 4 ×",
    "4 steps at 4 ×", "untrained, r = 32", "untrained, A drawn again", "untrained, norm of the mean gradient",
    "untrained, L2", "untrained, second moments", "full search per parameter",
    "untrained, 8 batches per parameter", "full search, half way",
)  # fmt: skip
RIVALS = ("KappaTune", "norm of ΔW", "gradient norm", "descent", "first", "last")
# group, data sets, arms: in the order in which they are run
ARMS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("modules 30", ("reason_gsm8k",), ("full search", "mean of other sets", "random 0")),
    ("modules 30", ALIGNMENT, ("mean of other sets",)),
    ("modules 30", ("reason_math",), ("full search", "mean of other sets", "random 0")),
    ("modules 30", ALIGNMENT, SEARCHES[:8]),
    ("layers 30", ALIGNMENT, (*BOTH, "random 0")),
    ("all", ALIGNMENT, ("again",)),
    ("modules 75", ALIGNMENT, ("full search", "random 0", "bottom")),
    ("weights 100", ALIGNMENT, ("full search",)),
    ("weights 75", ALIGNMENT, ("full search", "random 0")),
    ("raised 30", ALIGNMENT, ("full search", "random 0")),
    ("modules 30", ALIGNMENT, RIVALS[:3]),
    ("modules 10", ALIGNMENT, ("full search", "random 0")),
    ("modules 30", ALIGNMENT, ("descent",)),
    ("modules 20", ALIGNMENT, ("full search", "random 0")),
    ("EVA", ALIGNMENT, ("EVA",)),
    ("modules 30", ALIGNMENT, ("first", "last")),
    ("weights 75", ALIGNMENT, ("bottom",)),
    ("AdaLoRA", ALIGNMENT, ("AdaLoRA",)),
    ("layers 30", ALIGNMENT, ("aletheia-lora", *CHANCE[1:3])),
    ("modules 10", ALIGNMENT, CHANCE[1:3]),
    ("raised 30", ALIGNMENT, BOTH[1:]),
    ("uniform 2", ALIGNMENT, ("uniform",)),
    ("ranks 1 0 32", ALIGNMENT, BOTH),
    ("ranks 0.5 1 32", ALIGNMENT, BOTH),
    ("modules 10", ALIGNMENT, BOTH),
    ("modules 20", ALIGNMENT, BOTH),
    ("modules 30", ALIGNMENT, ("12 steps at 4 ×",)),
    ("layers 30", ALIGNMENT, RIVALS),
    ("modules 30", SETS, (*(f"of {data}" for data in SETS), "mean of other sets", *CHANCE[:3], "full search")),
    ("raised 10", ALIGNMENT, (*BOTH, "random 0")),
    ("uniform 1", ALIGNMENT, ("uniform",)),
    ("modules 30", ALIGNMENT, SEARCHES),
    ("layers 30", ALIGNMENT, SEARCHES[:11]),
    ("modules 10", ALIGNMENT, (*SEARCHES[:11], "norm of ΔW")),
)
ARMS_OF_SECOND: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("modules 30", ALIGNMENT, ("full search", "random 0")),
    ("modules 75", ALIGNMENT, ("full search", "random 0")),
    ("modules 30", ALIGNMENT, ("untrained, 8 batches", "mean of other sets")),
    ("layers 30", ALIGNMENT, ("full search", "random 0")),
    ("raised 30", ALIGNMENT, ("full search", "random 0")),
    ("modules 30", ALIGNMENT, CHANCE[1:3]),
    ("modules 75", ALIGNMENT, ("bottom",)),
)


def modules_within(budget: float, scores: dict[str, float], sizes: Sizes) -> list[str]:
    """Units in the order of their scores, as long as their sizes fit."""
    chosen, left = [], budget
    for unit in sorted(scores, key=lambda unit: -scores[unit]):
        if sizes[unit] <= left:
            chosen.append(unit)
            left -= sizes[unit]
    return chosen


def layers_within(budget: float, scores: dict[str, float], sizes: Sizes) -> list[str]:
    """The modules of whole decoder layers, in the order of the sums of their scores, as long as they fit."""
    layers = modules_within(budget, by_layer(scores), by_layer(sizes))
    return [unit for layer in layers for unit in scores if unit_of(unit, "layer") == layer]


def by_layer(values: Mapping[str, Number]) -> dict[str, Number]:
    """The values of modules, summed over each decoder layer."""
    sums: dict[str, Number] = {}
    for unit, value in values.items():
        layer = unit_of(unit, "layer")
        sums[layer] = sums[layer] + value if layer in sums else value
    return sums


def ranks_by_importance(
    scores: dict[str, float], sizes: Sizes, budget: float, power: float, least: float, most: float
) -> dict[str, int]:
    """
    Ranks in proportion to a power of the scores, between a least and a greatest one, within a budget of parameters.

    Args:
        scores: A module's part in the whole; negative ones count as 0.
        sizes: A module's parameters for each rank.
    """
    weights = {unit: max(score, 0.0) ** power for unit, score in scores.items()}
    low, high = 0.0, 1e12
    for _ in range(200):
        middle = (low * high) ** 0.5 if low else high * 1e-6
        used = sum(min(max(int(middle * w), least), most) * sizes[unit] for unit, w in weights.items())
        low, high = (middle, high) if used <= budget else (low, middle)
        if not low and high < 1e-12:
            break
    ranks = {unit: int(min(max(int(low * w), least), most)) for unit, w in weights.items()}
    left = budget - sum(rank * sizes[unit] for unit, rank in ranks.items())
    for unit in sorted(ranks, key=lambda unit: -weights[unit]):  # what rounding has left
        if sizes[unit] <= left and ranks[unit] < most and weights[unit] > 0:
            ranks[unit] += 1
            left -= sizes[unit]
    return {unit: rank for unit, rank in ranks.items() if rank}
