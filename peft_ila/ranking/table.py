"""Rankings as rows, as text for the terminal, and side by side as a picture."""

import os
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from .card import TOP_ROWS
from .comparison import is_coin_toss
from .importance import LayerImportance
from .plotting import overlap_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARE = 0.3  # the table shows how sure it is that a unit belongs to this share


def ranking_rows(importance: LayerImportance) -> list[dict[str, Any]]:
    """
    The ranking, most important unit first.

    Returns:
        For each unit `unit`, `score` and `gate`; and where the ranking says how sure it is, `spread` and
        `probability_top_30`, see [`LayerImportance.probability`].
    """
    columns: dict[str, dict[str, float]] = {
        "score": dict(zip(importance.units, importance.scores)),
        "gate": dict(zip(importance.units, importance.gates)),
    }
    if importance.spread:
        columns["spread"] = dict(zip(importance.units, importance.spread))
        columns["probability_top_30"] = importance.probability(top_p=_SHARE)
    return [
        {"unit": unit, **{name: column[unit] for name, column in columns.items()}} for unit in importance.ranking()
    ]


def ranking_table(importance: LayerImportance) -> str:
    """The ranking, most important unit first, with a bar for each gate and how sure the top 30 % are."""
    rows = ranking_rows(importance)
    width = max(len(row["unit"]) for row in rows)
    sure = f"  {'±':>5}  p(top {_SHARE:.0%})" if importance.spread else ""
    lines = [f"{'rank':>4}  {'unit':<{width}}  {'score':>7}{sure}  {'gate':>5}"]
    for rank, row in enumerate(rows[:TOP_ROWS], start=1):
        sure = f"  {row['spread']:>5.2f}  {row['probability_top_30']:>10.2f}" if importance.spread else ""
        bar = "█" * round(30 * row["gate"])
        lines.append(f"{rank:>4}  {row['unit']:<{width}}  {row['score']:>7.3f}{sure}  {row['gate']:>5.3f}  {bar}")
    if len(rows) > TOP_ROWS:
        lines.append(f"      … and {len(rows) - TOP_ROWS} more")
    if open_ones := [row["unit"] for row in rows if is_coin_toss(row.get("probability_top_30", 1))]:
        lines.append(f"In the top {_SHARE:.0%} or not by a coin toss: {', '.join(open_ones)}")
    return "\n".join(lines)


def comparison_rows(rankings: Sequence[tuple[str, LayerImportance]]) -> list[dict[str, Any]]:
    """
    Overlap and rank correlation of each pair.

    Args:
        rankings: Each with its name.

    Returns:
        For each pair the names `a` and `b`, and `overlap_75`, `overlap_30` and `spearman`.

    Raises:
        ValueError: Two rankings are of different units.
    """
    return [
        {
            "a": one,
            "b": two,
            "overlap_75": a.overlap(b, 0.75),
            "overlap_30": a.overlap(b, 0.3),
            "spearman": a.spearman(b),
        }
        for (one, a), (two, b) in combinations(rankings, 2)
    ]


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """What [`comparison_rows`] finds, a line for each pair."""
    width = max(len(row[name]) for row in rows for name in "ab")
    lines = [f"{'A':<{width}}  {'B':<{width}}  overlap@75%  overlap@30%  Spearman"]
    for row in rows:
        figures = f"{row['overlap_75']:>11.2f}  {row['overlap_30']:>11.2f}  {row['spearman']:>8.2f}"
        lines.append(f"{row['a']:<{width}}  {row['b']:<{width}}  {figures}")
    return "\n".join([*lines, "(by chance: 0.60 and 0.18)"])


def plot_overlaps(
    rankings: Sequence[tuple[str, LayerImportance]], path: str | os.PathLike[str] | None = None
) -> "Figure":
    """
    Draw how much of the top 30 % and of the top 75 % each two rankings share, as two matrices with the numbers.

    Args:
        rankings: Each with its name.
        path: The picture to write; matplotlib tells the format from its suffix.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: Two rankings are of different units, or the path has no suffix that names a format.
    """
    overlaps = {share: [[a.overlap(b, share) for _, b in rankings] for _, a in rankings] for share in (0.3, 0.75)}
    return overlap_matrix([name for name, _ in rankings], overlaps, path)
