"""The heatmap of a ranking. Changes with how it looks."""

import math
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from ..files import whole_file
from ..units import split_layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'peft-ila[plot]'") from error

    cells = _cells(list(gates))
    columns = [str(index) for index in sorted({int(column) for _, column in cells.values() if column != _NO_LAYER})]
    if any(column == _NO_LAYER for _, column in cells.values()):
        columns.append(_NO_LAYER)
    rows: dict[str, list[float]] = {}
    for unit, (row, column) in cells.items():
        rows.setdefault(row, [math.nan] * len(columns))[columns.index(column)] = gates[unit]

    figure = Figure(figsize=(2.5 + 0.3 * max(len(columns), 8), 1.3 + 0.3 * max(len(rows), 2)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(list(rows.values()), aspect="auto", cmap="viridis", interpolation="nearest")
    if dots := [cells[unit] for unit in gates if unit in unsure]:
        across, down = [columns.index(column) for _, column in dots], [list(rows).index(row) for row, _ in dots]
        axes.scatter(across, down, s=8, color="white")
    step = math.ceil(len(columns) / 40)
    axes.set_xticks(range(0, len(columns), step), columns[::step], fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_xlabel("decoder layer")
    axes.set_title("importance" + (f" of the layers of {os.path.basename(model)}" if model else ""), fontsize=10)
    figure.colorbar(image, label="gate γ = σ(s)")
    if path is not None:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=150)
    return figure


def _cells(units: list[str]) -> dict[str, tuple[str, str]]:
    """The row and the column of each unit: what is in a decoder layer, and the layer's index."""
    layers = {unit: split_layer(unit) for unit in units}
    one_stack = len({layer[0] for layer in layers.values() if layer}) == 1
    cells = {}
    for unit, layer in layers.items():
        if layer is None:
            cells[unit] = (unit, _NO_LAYER)
            continue
        stack, index = layer
        inner = unit.removeprefix(f"{stack}.{index}").removeprefix(".")
        row = (inner or "decoder layer") if one_stack else f"{stack}.*.{inner}".removesuffix(".")
        cells[unit] = (row, str(index))
    return cells
