"""Rankings as text for the terminal."""

from collections.abc import Sequence
from itertools import combinations

from .card import TOP_ROWS
from .comparison import is_coin_toss
from .importance import LayerImportance

_SHARE = 0.3  # the table shows how sure it is that a unit belongs to this share


def ranking_table(importance: LayerImportance) -> str:
    """The ranking, most important unit first, with a bar for each gate and how sure the top 30 % are."""
    gates = dict(zip(importance.units, importance.gates))
    scores = dict(zip(importance.units, importance.scores))
    spread = dict(zip(importance.units, importance.spread))
    probability = importance.probability(top_p=_SHARE) if spread else {}
    ranking = importance.ranking()
    width = max(len(unit) for unit in ranking)
    sure = f"  {'±':>5}  p(top {_SHARE:.0%})" if spread else ""
    lines = [f"{'rank':>4}  {'unit':<{width}}  {'score':>7}{sure}  {'gate':>5}"]
    for rank, unit in enumerate(ranking[:TOP_ROWS], start=1):
        sure = f"  {spread[unit]:>5.2f}  {probability[unit]:>10.2f}" if spread else ""
        bar = "█" * round(30 * gates[unit])
        lines.append(f"{rank:>4}  {unit:<{width}}  {scores[unit]:>7.3f}{sure}  {gates[unit]:>5.3f}  {bar}")
    if len(ranking) > TOP_ROWS:
        lines.append(f"      … and {len(ranking) - TOP_ROWS} more")
    if open_ones := [unit for unit in ranking if unit in probability and is_coin_toss(probability[unit])]:
        lines.append(f"In the top {_SHARE:.0%} or not by a coin toss: {', '.join(open_ones)}")
    return "\n".join(lines)


def comparison_table(rankings: Sequence[tuple[str, LayerImportance]]) -> str:
    """
    Overlap and rank correlation of each pair.

    Args:
        rankings: Each with its name.

    Raises:
        ValueError: Two rankings are of different units.
    """
    width = max(len(name) for name, _ in rankings)
    lines = [f"{'A':<{width}}  {'B':<{width}}  overlap@75%  overlap@30%  Spearman"]
    for (one, a), (two, b) in combinations(rankings, 2):
        figures = f"{a.overlap(b, 0.75):>11.2f}  {a.overlap(b, 0.3):>11.2f}  {a.spearman(b):>8.2f}"
        lines.append(f"{one:<{width}}  {two:<{width}}  {figures}")
    return "\n".join([*lines, "(by chance: 0.60 and 0.18)"])
