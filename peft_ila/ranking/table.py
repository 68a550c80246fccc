"""Rankings as rows and as text tables, and their overlaps as a picture."""

import os
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from .card import TOP_ROWS
from .comparison import is_coin_toss
from .importance import LayerImportance
from .plotting import CHARACTER, FONT, add_bar, new_figure, short, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARE = 0.3  # the table shows the probability that a unit belongs to this share


def ranking_rows(importance: LayerImportance) -> list[dict[str, Any]]:
    """
    The ranking, most important unit first.

    Returns:
        For each unit `unit`, `score` and `gate`. If the ranking has a spread, also `spread` and
        `probability_top_30`, see [`LayerImportance.probability`].
    """
    rows = {
        unit: {"unit": unit, "score": score, "gate": gate}
        for unit, score, gate in zip(importance.units, importance.scores, importance.gates)
    }
    if importance.spread:
        probability = importance.probability(top_p=_SHARE)
        for unit, spread in zip(importance.units, importance.spread):
            rows[unit] |= {"spread": spread, "probability_top_30": probability[unit]}
    return [rows[unit] for unit in importance.ranking()]


def ranking_table(importance: LayerImportance) -> str:
    """The ranking, most important unit first, with a bar per gate and the probability of the top 30 %."""
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
        lines.append(f"Uncertain (in the top {_SHARE:.0%} with a probability of ¼ to ¾): {', '.join(open_ones)}")
    return "\n".join(lines)


def comparison_rows(rankings: Sequence[tuple[str, LayerImportance]]) -> list[dict[str, Any]]:
    """The overlaps and the rank correlation of each pair of rankings, each with its name."""
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
    """The result of [`comparison_rows`], one line per pair."""
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
    Draw the overlap of each pair of rankings, in the top 30 % and the top 75 %, as two matrices with numbers.

    Args:
        rankings: Each with its name.
        path: The picture to write; its suffix sets the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The rankings have different units, or the path's suffix names no format.
    """
    figure = new_figure(path)
    labels = [f"{short(name)}  {number}" for number, (name, _) in enumerate(rankings, start=1)]
    side = max(1.8, 0.45 * len(labels))
    figure.set_size_inches(1 + CHARACTER * max(map(len, labels)) + 2 * (side + 0.3), 1 + side)
    every = figure.subplots(1, 2, sharey=True)
    for axes, share in zip(every, (0.3, 0.75)):
        matrix = np.array([[a.overlap(b, share) for _, b in rankings] for _, a in rankings])
        image = axes.imshow(matrix, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(matrix):
            color = "black" if value > 0.45 else "white"
            axes.text(column, row, f"{value:.2f}", color=color, fontsize=FONT, ha="center", va="center")
        # by chance, for n units and a share p: |A ∩ B| = p²·n and |A ∪ B| = 2·p·n - p²·n
        axes.set_title(f"top {100 * share:.0f} % (by chance {share / (2 - share):.2f})", fontsize=10)
        axes.set_xticks(range(len(labels)), range(1, len(labels) + 1), fontsize=FONT)
        axes.set_yticks(range(len(labels)), labels, fontsize=FONT, parse_math=False)
    add_bar(image, every, "overlap |A ∩ B| / |A ∪ B|", side)
    write(figure, path)
    return figure
