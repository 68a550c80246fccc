"""Figures from the rows of `benchmarks/pruning/run.py`: what is kept of the whole adapter's gain, with errors."""

import functools
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.record import read_lines
from benchmarks.study.figures import Estimate, Run, Value, estimate

Arm = tuple[str, float]  # its name and its share of the whole adapter's parameters
BOTH, REPORTED = (0, 1), (1,)  # halves of the held-out examples


class Figures:
    """The rows of one model, by run and arm."""

    def __init__(self, rows: list[dict[str, Any]], made_by: dict[str, Any]) -> None:
        self.rank: int = made_by["rank"]
        self.units: dict[str, int] = made_by["units"]
        self.name = made_by["model"] + (f", r = {self.rank}" if self.rank != 8 else "")
        self.rows = {(row["arm"], row["share"], row["data"], row["seed"]): row for row in rows}
        self.runs: list[Run] = list(dict.fromkeys((row["data"], row["seed"]) for row in rows))

    @classmethod
    def load(cls, results: Path) -> "Figures":
        """Those in a directory that `benchmarks.pruning.run` has written."""
        return cls(read_lines(results / "figures.jsonl"), json.loads((results / "made_by.json").read_text()))

    def loss(self, arm: Arm, run: Run, halves: Iterable[int]) -> float | None:
        """The mean over the answers' tokens of these halves."""
        row, base = self.rows.get((*arm, *run)), self.rows.get(("base", 0.0, *run))
        if row is None or base is None:
            return None
        tokens = {half: base["tokens"][half] for half in halves}
        return sum(row["losses"][half] * number for half, number in tokens.items()) / sum(tokens.values())

    def kept(self, arm: Arm, run: Run, halves: tuple[int, ...] = BOTH) -> float | None:
        """The gain in held-out loss, as a share of the whole adapter's."""
        base, whole, own = (self.loss(x, run, halves) for x in (("base", 0.0), ("whole", 1.0), arm))
        return None if base is None or whole is None or own is None else (base - own) / (base - whole)

    def best(self, arms: Iterable[Arm], run: Run) -> float | None:
        """What the arm that is best on the first half keeps on the second. None if there was nothing to choose."""
        losses = {arm: loss for arm in arms if (loss := self.loss(arm, run, (0,))) is not None}
        return self.kept(min(losses, key=lambda arm: losses[arm]), run, REPORTED) if len(losses) > 1 else None

    def estimate(self, arm: Arm, beside: Arm = ("whole", 1.0)) -> Estimate | None:
        """Over the runs in which another arm was measured too."""
        return estimate(functools.partial(self.kept, arm), self.having(beside))

    def having(self, *arms: Arm) -> list[Run]:
        """The runs in which all of these were measured."""
        return [run for run in self.runs if all(self.kept(arm, run) is not None for arm in arms)]

    def trained(self, name: str, share: float) -> list[Arm]:
        """What was trained by this name, at every rate."""
        found = {key[:2] for key in self.rows if key[0].startswith(f"{name} at ") and key[1] == share}
        return sorted(found)

    def tuned(self, name: str, share: float) -> Value:
        """What was trained by this name has gained on the second halves, at the rate that is best on the first."""
        arms = self.trained(name, share)
        tried = self.having(*arms)
        firsts = {arm: estimate(functools.partial(self.kept, arm, halves=(0,)), tried) for arm in arms}
        best = max(arms, key=lambda arm: own.mean if (own := firsts[arm]) else 0.0, default=(name, share))
        return functools.partial(self.kept, best, halves=REPORTED)

    def ranks(self, arm: Arm, run: Run) -> list[int] | None:
        """The kept rank of each module."""
        row = self.rows.get((*arm, *run))
        return None if row is None else row["ranks"]

    def pairs(self) -> tuple[list[tuple[Run, Run]], list[tuple[Run, Run]]]:
        """Pairs of runs: two seeds of a set, and two sets with one seed."""
        pairs = list(itertools.combinations(self.runs, 2))
        seeds = [(one, other) for one, other in pairs if one[0] == other[0]]
        return seeds, [(one, other) for one, other in pairs if one[0] != other[0] and one[1] == other[1]]
