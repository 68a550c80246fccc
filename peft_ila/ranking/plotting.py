"""The heatmap of a ranking, and what all pictures share."""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import whole_file
from ..units import split_layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST = 80  # characters of a name
_LAYER = "decoder layer"  # the row of whole layers, if there is one stack
_NO_LAYER = "–"  # the last column, for units outside every stack of layers, such as `lm_head`
_LABELS = 60  # at most, along y
# layers per band (the rest continues below, like lines of text), bands and rows, at most; then cells shrink
_COLUMNS, _BANDS, _ROWS = 40, 10, 40
_CELL, _WIDEST = 0.25, 10.0  # inches
CHARACTER = 0.07  # inches, at the font size of the labels
FONT = 8


def heatmap(
    values: Mapping[str, float],
    label: str,
    title: str,
    path: str | os.PathLike[str] | None = None,
    unsure: Collection[str] = (),
    selected: Collection[str] = (),
) -> "Figure":
    """
    See [`LayerImportance.plot`]: a value of each unit in the order of the model, which the colour bar calls `label`.

    Units in `selected` are outlined. Those in `unsure` get a dot: their selection (without `selected`, as top 30 %) is
    uncertain. The figure's axes are bands of layers, from the first layer on, and the colour bar.
    """
    figure = new_figure(path)
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    cells = _cells(values)
    columns = sorted({column for _, column in cells.values()})
    rows = list(dict.fromkeys(row for row, _ in cells.values()))
    down, across = ({name: i for i, name in enumerate(own)} for own in (rows, columns))
    bands = max(1, min(math.ceil(len(columns) / _COLUMNS), _BANDS, _ROWS // len(rows)))
    wide = math.ceil(len(columns) / bands)
    grid = np.full((len(rows), bands * wide), math.nan)
    dots, outlined = np.zeros((2, *grid.shape), dtype=bool)
    for unit, (row, column) in cells.items():
        place = down[row], across[column]
        grid[place], dots[place], outlined[place] = values[unit], unit in unsure, unit in selected

    names = [short(row) for row in rows] if rows != [_LAYER] else []
    width = max(4.5, 0.085 * len(title), min(_WIDEST, _CELL * wide))
    height = max(0.5, _CELL * min(len(rows), _LABELS))
    figure.set_size_inches(1 + CHARACTER * max(map(len, names), default=0) + width, 0.9 + bands * (height + 0.3))
    every = figure.subplots(bands, squeeze=False)[:, 0]
    norm = Normalize(min(values.values()), max(values.values()))
    for band, axes in enumerate(every):
        part = slice(band * wide, (band + 1) * wide)
        image = axes.imshow(grid[:, part], aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
        _ticks(axes, columns[part], names, width / wide)
        _mark(axes, dots[:, part], outlined[:, part], 72 * min(width / wide, height / len(rows)))
    every[0].set_title(title, fontsize=10, parse_math=False)
    if columns[0] != math.inf:
        every[-1].set_xlabel("decoder layer", fontsize=FONT)
    whole = all(isinstance(value, int) for value in values.values())  # ranks
    add_bar(image, every, label, bands * height, MaxNLocator(integer=True) if whole else None)
    _legend(figure, len(selected), len(values), bool(unsure))
    write(figure, path)
    return figure


def title_of(subject: str, model: str | None) -> str:
    """The title of a heatmap of a model, by its name or path."""
    return f"{subject} of {short(os.path.basename(model))}" if model else subject


def check_matplotlib() -> None:
    """Raise an `ImportError` that says what to install."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib") from error


def new_figure(path: str | os.PathLike[str] | None) -> "Figure":
    """An empty figure, after a check that it can be written to this path."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if path is not None and os.path.splitext(path)[1].removeprefix(".").lower() not in formats:
        raise ValueError(f"The suffix of {os.fspath(path)!r} is not supported; it must be one of {[*formats]}.")
    return figure


def write(figure: "Figure", path: str | os.PathLike[str] | None) -> None:
    """Write a figure, if there is a path."""
    if path is not None:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=150)


def add_bar(image: Any, every: Any, label: str, height: float, ticks: Any = None) -> None:
    """Add a colour bar beside some axes; their height is in inches."""
    bar = image.figure.colorbar(image, ax=list(every), pad=0.01, fraction=0.05, aspect=15 * height, ticks=ticks)
    bar.set_label(label, fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)


def short(name: str) -> str:
    """A name as a label: what does not print is left out, and the start of a long one."""
    printable = "".join(character if character.isprintable() else " " for character in name)
    return printable if len(printable) <= _LONGEST else f"…{printable[-_LONGEST:]}"


def _ticks(axes: "Axes", columns: Sequence[float], names: Sequence[str], cell: float) -> None:
    """Add as many labels as fit; `cell` is a column's width in inches."""
    labels = [_NO_LAYER if column == math.inf else short(str(int(column))) for column in columns]
    step = math.ceil(CHARACTER * (1 + max(map(len, labels))) / cell)
    ticks = list(range(0, len(labels), step))
    if labels[-1] == _NO_LAYER:
        ticks = [*(tick for tick in ticks if tick < len(labels) - step), len(labels) - 1]
    axes.set_xticks(ticks, [labels[tick] for tick in ticks], fontsize=FONT)
    step = math.ceil(len(names) / _LABELS) or 1
    # matplotlib would read some names as formulas
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=FONT, parse_math=False)
    axes.spines[:].set_visible(False)


def _mark(axes: "Axes", dots: Any, outlined: Any, cell: float) -> None:
    """Draw dots and outlines in black and white, which show on all colours. `cell` is a cell's side in points."""
    from matplotlib.collections import LineCollection

    if dots.any():
        rows, columns = np.nonzero(dots)
        size = min(4.5, max(1.0, cell / 2))
        axes.scatter(columns, rows, s=size**2, color="white", edgecolor="black", linewidth=size / 6, zorder=4)
    if outlined.any():
        padded = np.pad(outlined, 1)
        upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]) - 0.5
        level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]) - 0.5
        lines = [((x, y), (x, y + 1)) for y, x in upright] + [((x, y), (x + 1, y)) for y, x in level]
        width = min(1.2, cell / 12)
        for color, wide in (("white", 3 * width), ("black", width)):
            axes.add_collection(
                LineCollection(lines, colors=color, linewidths=wide, capstyle="projecting", clip_on=False, zorder=1.4)
            )


def _legend(figure: "Figure", selected: int, units: int, unsure: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if selected:
        handles.append(Patch(facecolor="none", edgecolor="black", label=f"selected: {selected} of {units}"))
    if unsure:
        label = "uncertain selection" if selected else "uncertain in the top 30 %"
        handles.append(Line2D([], [], linestyle="", marker="o", mfc="white", mec="black", ms=4, mew=0.7, label=label))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=FONT, frameon=False)


def _cells(units: Collection[str]) -> dict[str, tuple[str, float]]:
    """The row of each unit (its name inside a decoder layer) and its column (the layer's index, ∞ for none)."""
    layers = {unit: split_layer(unit) for unit in units}
    one_stack = len({layer[0] for layer in layers.values() if layer}) == 1
    cells: dict[str, tuple[str, float]] = {}
    for unit, layer in layers.items():
        if layer is None:
            cells[unit] = (unit, math.inf)
            continue
        stack, index = layer
        inner = unit.removeprefix(f"{stack}.{index}").removeprefix(".")
        row = (inner or _LAYER) if one_stack else f"{stack}.*.{inner}".removesuffix(".")
        cells[unit] = (row, index)
    return cells
