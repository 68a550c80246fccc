"""How well two rankings agree, and how certain a selection is. Functions on plain numbers."""

import math
import statistics
from collections.abc import Collection, Sequence

import numpy as np

_DRAWS, _AT_ONCE = 1000, 50


def jaccard(mine: Collection[str], theirs: Collection[str]) -> float:
    """|A ∩ B| / |A ∪ B|."""
    return len(set(mine) & set(theirs)) / len(set(mine) | set(theirs))


def spearman(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Spearman's rank correlation. Ties get their mean rank; NaN if one side has only one value."""
    x, y = _ranks(mine), _ranks(theirs)
    mean = (len(x) - 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(x, y))
    variance = sum((a - mean) ** 2 for a in x) * sum((b - mean) ** 2 for b in y)
    return covariance / math.sqrt(variance) if variance else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    first = {value: position for position, value in reversed(list(enumerate(order)))}
    last = {value: position for position, value in enumerate(order)}
    return [(first[value] + last[value]) / 2 for value in values]


def standardised(scores: Sequence[float]) -> list[float]:
    """(score - mean) / standard deviation of each score; 0 if all are equal."""
    mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
    return [(score - mean) / deviation if deviation else 0.0 for score in scores]


SURE = 8  # values: with fewer, the standard error is too uncertain


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two values and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def top(scores: Sequence[float], number: int) -> list[int]:
    """The positions of the greatest scores, greatest first. Ties keep their order."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:number]


def is_coin_toss(probability: float) -> bool:
    """Whether a unit with this probability of selection is uncertain."""
    return 0.25 < probability < 0.75


def membership(scores: Sequence[float], spread: Sequence[float], number: int) -> list[float]:
    """
    The share of 1,000 draws in which each score is among the `number` greatest. Ties keep their order.

    Args:
        scores: The means of the normal distributions.
        spread: Their standard deviations.
        number: The size of the selection.
    """
    random = np.random.default_rng(0)
    counts = np.zeros(len(scores), dtype=int)
    for _ in range(_DRAWS // _AT_ONCE):
        drawn = random.normal(scores, np.abs(spread), size=(_AT_ONCE, len(scores)))
        least = np.partition(drawn, -number, axis=1)[:, -number, None]
        above, equal = drawn > least, drawn == least
        room = number - above.sum(axis=1, keepdims=True)
        counts += (above | (equal & (equal.cumsum(axis=1) <= room))).sum(axis=0)
    return [float(count) for count in counts / _DRAWS]
