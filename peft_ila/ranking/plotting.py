"""The heatmap of a ranking. Changes with how it looks."""

import math
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..files import whole_file
from ..units import split_layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_COLUMNS, _MOST_ROWS = 130, 60
_LONGEST = 80  # characters of a name
_NO_LAYER = "–"  # the last column, for units outside every stack of layers, such as `lm_head`


def heatmap(
    gates: Mapping[str, float],
    unsure: Collection[str] = (),
    model: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """
    See [`LayerImportance.plot`].

    Args:
        gates: The gate of each unit, in the order of the model.
        unsure: The units to mark by a dot.
        model: The model's name or path, for the title.
        path: The picture to write.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The path has no suffix that names a format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'peft-ila[plot]'") from error

    figure = Figure(layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if path is not None and os.path.splitext(path)[1].removeprefix(".").lower() not in formats:
        raise ValueError(f"The suffix of {os.fspath(path)!r} is not supported; it must be one of {[*formats]}.")

    cells = _cells(list(gates))
    columns = sorted({column for _, column in cells.values()})
    across = {column: position for position, column in enumerate(columns)}
    rows = list(dict.fromkeys(row for row, _ in cells.values()))
    down = {row: position for position, row in enumerate(rows)}
    values = np.full((len(rows), len(columns)), math.nan)
    for unit, (row, column) in cells.items():
        values[down[row], across[column]] = gates[unit]

    # of a model with more layers or names than this, the cells are smaller
    figure.set_size_inches(
        2.5 + 0.3 * min(max(len(columns), 8), _MOST_COLUMNS), 1.3 + 0.3 * min(max(len(rows), 2), _MOST_ROWS)
    )
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    unsure = set(unsure)
    if dots := [cells[unit] for unit in gates if unit in unsure]:
        axes.scatter([across[column] for _, column in dots], [down[row] for row, _ in dots], s=8, color="white")
    step = math.ceil(len(columns) / 40)
    labels = [_NO_LAYER if column == math.inf else str(int(column)) for column in columns]
    axes.set_xticks(range(0, len(columns), step), labels[::step], fontsize=8)
    step = math.ceil(len(rows) / _MOST_ROWS)
    # names may hold signs that matplotlib reads as formulas
    axes.set_yticks(range(0, len(rows), step), [_short(row) for row in rows[::step]], fontsize=8, parse_math=False)
    axes.set_xlabel("decoder layer")
    title = "importance" + (f" of the layers of {_short(os.path.basename(model))}" if model else "")
    axes.set_title(title, fontsize=10, parse_math=False)
    figure.colorbar(image, label="gate γ = σ(s)")
    if path is not None:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=150)
    return figure


def _short(name: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in name)
    return printable if len(printable) <= _LONGEST else f"…{printable[-_LONGEST:]}"


def _cells(units: list[str]) -> dict[str, tuple[str, float]]:
    """The row and the column of each unit: what is in a decoder layer, and the layer's index, ∞ for none."""
    layers = {unit: split_layer(unit) for unit in units}
    one_stack = len({layer[0] for layer in layers.values() if layer}) == 1
    cells = {}
    for unit, layer in layers.items():
        if layer is None:
            cells[unit] = (unit, math.inf)
            continue
        stack, index = layer
        inner = unit.removeprefix(f"{stack}.{index}").removeprefix(".")
        row = (inner or "decoder layer") if one_stack else f"{stack}.*.{inner}".removesuffix(".")
        cells[unit] = (row, index)
    return cells
