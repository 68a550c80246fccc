"""Figures from the study's rows: gains compared with LoRA on all modules, with errors, and overlaps of rankings."""

import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import read_lines
from benchmarks.study.arms import ALIGNMENT, CHANCE, SEEDS, SETS, TUNING_SEED, by_layer
from peft_ila import LayerImportance
from peft_ila.ranking.comparison import mean_and_error

Run = tuple[str, int]
Value = Callable[[Run], float | None]
NAMES = {
    "sft_alpaca_gpt4": "Alpaca-GPT4",
    "sft_lima": "LIMA",
    "sft_dolly": "Dolly",
    "reason_gsm8k": "GSM8K",
    "reason_math": "MATH",
    "text_wikitext2": "WikiText-2",
    "text_c4": "C4",
}
RUNS = list(itertools.product(ALIGNMENT, SEEDS))
LORA = ("all", "full search")  # on all modules


@dataclass
class Estimate:
    """A mean over data sets of the means over their seeds. With several sets it has a standard error."""

    mean: float
    error: float | None
    runs: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


class Figures:
    """The rows of one model's study, by run and arm."""

    def __init__(self, rows: list[dict[str, Any]], made_by: dict[str, Any]) -> None:
        self.rows, self.made_by = rows, made_by
        self.units: list[str] = made_by["units"]
        self.tuned = {
            (row["group"], row["arm"], row["data"], row["seed"]): row
            for row in rows
            if row["kind"] == "tune" and row["seed"] != TUNING_SEED
        }
        self.swept = [row for row in rows if row["kind"] == "tune" and row["seed"] == TUNING_SEED]
        self.base = {(row["data"], row["seed"]): row for row in rows if row["kind"] in ("rank", "untrained")}
        self.untuned: dict[str, Any] = next((row for row in rows if row["kind"] == "base"), {})
        self.scores = {
            (row["data"], row["seed"], name): scores for row in rows for name, scores in row.get("scores", {}).items()
        }

    @classmethod
    def load(cls, results: Path) -> "Figures":
        """Those in a directory that `benchmarks.study.run` has written."""
        return cls(read_lines(results / "figures.jsonl"), json.loads((results / "made_by.json").read_text()))

    def gained(self, group: str, arm: str, run: Run) -> float | None:
        """The gain in held-out loss, as a share of LoRA's on all modules. "random" is the mean of its draws."""
        if arm == "random":
            return mean(self.gained(group, draw, run) for draw in CHANCE)
        row, full = self.tuned.get((group, arm, *run)), self.tuned.get((*LORA, *run))
        if row is None or full is None:
            return None
        base = self.base[run]["loss"]
        return (base - row["loss"]) / (base - full["loss"])

    def less(self, group: str, arm: str, other: tuple[str, str] = LORA, runs: Iterable[Run] = RUNS) -> Estimate | None:
        """What an arm gains less what another one does."""
        return difference(lambda run: self.gained(group, arm, run), lambda run: self.gained(*other, run), runs)

    def known(self, arm: tuple[str, str], what: str, name: str) -> dict[Run, float]:
        """A figure that was measured beside the loss, by run."""
        rows = {run: self.tuned.get((*arm, *run), {}) for run in RUNS}
        return {run: row[what][name] for run, row in rows.items() if what in row}

    def arms(self, group: str) -> list[str]:
        """Those that were run, the best first. Random draws count as one."""
        arms = {"random" if arm in CHANCE else arm for own, arm, _, _ in self.tuned if own == group}
        return sorted(arms, key=lambda arm: -(mean(self.gained(group, arm, run) for run in RUNS) or 0.0))

    def ranking(self, run: Run, search: str, layers: bool) -> LayerImportance | None:
        """A search's ranking of modules, or of decoder layers by the sums of their modules' scores."""
        scores = self.scores.get((*run, search)) or self.scores.get(("", 0, search))
        if scores is None:
            return None
        found = dict(zip(self.units, scores))
        if layers:
            found = by_layer(found)
        return LayerImportance(list(found), list(found.values()))

    def overlaps(self, layers: bool, search: str) -> dict[str, tuple[list[float], ...]]:
        """Pairs of rankings by a search: their overlaps at 75 and 30 %, and their correlations."""
        every = {run: self.ranking(run, search, layers) for run in itertools.product(SETS, SEEDS)}
        rankings = {run: ranking for run, ranking in every.items() if ranking is not None}
        found: dict[str, list[tuple[float, ...]]] = {}
        for ((a, s), one), ((b, t), other) in itertools.combinations(rankings.items(), 2):
            if a == b:
                found.setdefault("two seeds of a set", []).append(nearness(one, other))
            elif s == t:
                kinds = sorted({"alignment" if data in ALIGNMENT else "reasoning" for data in (a, b)})
                found.setdefault(f"two sets: {' and '.join(kinds)}", []).append(nearness(one, other))
        return {label: tuple(map(list, zip(*own))) for label, own in sorted(found.items())}


def nearness(one: LayerImportance, other: LayerImportance) -> tuple[float, float, float]:
    """The overlaps of two rankings at 75 and 30 %, and their correlation."""
    return one.overlap(other, 0.75), one.overlap(other, 0.3), one.spearman(other)


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def estimate(value: Value, runs: Iterable[Run] = RUNS) -> Estimate | None:
    """Over the runs that have a value. The seeds of a set share their examples, so they are no independent runs."""
    by_set: dict[str, list[float]] = {}
    for run in runs:
        if (own := value(run)) is not None:
            by_set.setdefault(run[0], []).append(own)
    means = [statistics.mean(own) for own in by_set.values()]
    if not means:
        return None
    found = mean_and_error(means) if len(means) > 1 else (means[0], None)
    return Estimate(*found, sum(map(len, by_set.values())))


def less(a: Value, b: Value) -> Value:
    """The paired difference, where both are known."""

    def paired(run: Run) -> float | None:
        x, y = a(run), b(run)
        return None if x is None or y is None else x - y

    return paired


def difference(a: Value, b: Value, runs: Iterable[Run] = RUNS) -> Estimate | None:
    """Of the paired differences, over the runs that have both."""
    return estimate(less(a, b), runs)
