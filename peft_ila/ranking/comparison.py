"""How well two rankings agree, and how certain a selection is. Functions on plain numbers."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

SURE = 8  # values: with fewer, the standard error is too uncertain
_DRAWS, _AT_ONCE = 1000, 50


def spearman(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Spearman's rank correlation. Ties get their mean rank; NaN if one side has only one value."""
    x, y = (ranks - ranks.mean() for ranks in (_ranks(mine), _ranks(theirs)))
    variance = float((x @ x) * (y @ y))
    return float(x @ y) / math.sqrt(variance) if variance else math.nan


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - counts / 2)[place]


def standardised(scores: Sequence[float]) -> list[float]:
    """(score - mean) / standard deviation of each score; 0 if all are equal."""
    mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
    return [(score - mean) / deviation if deviation else 0.0 for score in scores]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two values and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def is_coin_toss(probability: float) -> bool:
    """Whether a unit with this probability of selection is uncertain."""
    return 0.25 < probability < 0.75


def membership(scores: Sequence[float], spread: Sequence[float], number: int) -> list[float]:
    """The share of 1,000 draws of all scores, with these standard deviations, in which each is in the top `number`."""
    random = np.random.default_rng(0)
    counts = np.zeros(len(scores))
    for _ in range(_DRAWS // _AT_ONCE):
        drawn = random.normal(scores, np.abs(spread), size=(_AT_ONCE, len(scores)))  # -0.0 is refused
        chosen = np.argsort(-drawn, axis=1, kind="stable")[:, :number]
        counts += np.bincount(chosen.ravel(), minlength=len(scores))
    return [float(count) for count in counts / _DRAWS]
