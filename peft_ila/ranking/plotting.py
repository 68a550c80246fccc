"""Pictures of rankings: heatmap, overlaps, kept gain."""

import itertools
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
_CHARACTER = 0.07  # inches, at the font size of the labels
_FONT = 8


def heatmap(
    gates: Mapping[str, float],
    label: str,
    unsure: Collection[str] = (),
    selected: Collection[str] = (),
    model: str | None = None,
    path: str | os.PathLike[str] | None = None,
    subject: str = "importance",
) -> "Figure":
    """
    See [`LayerImportance.plot`].

    Args:
        gates: The gate, or another value, of each unit, in the order of the model.
        label: The label of the colour bar.
        unsure: The units to mark by a dot: their selection (without `selected`, as top 30 %) is uncertain.
        selected: The units to outline.
        model: The model's name or path, for the title.
        path: The picture to write.
        subject: The start of the title.

    Returns:
        The figure. Its axes are bands of layers, from the first layer on, and the colour bar.
    """
    figure = _figure(path)
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    cells = _cells(list(gates))
    columns = sorted({column for _, column in cells.values()})
    rows = list(dict.fromkeys(row for row, _ in cells.values()))
    across = {column: position for position, column in enumerate(columns)}
    down = {row: position for position, row in enumerate(rows)}
    place = {unit: (down[row], across[column]) for unit, (row, column) in cells.items()}

    bands = max(1, min(math.ceil(len(columns) / _COLUMNS), _BANDS, _ROWS // len(rows)))
    wide = math.ceil(len(columns) / bands)
    values = np.full((len(rows), bands * wide), math.nan)
    dots, outlined = np.zeros(values.shape, dtype=bool), np.zeros(values.shape, dtype=bool)
    for unit, gate in gates.items():
        values[place[unit]] = gate
    for units, marked in ((unsure, dots), (selected, outlined)):
        for unit in units:
            marked[place[unit]] = True

    title = subject + (f" of the layers of {_short(os.path.basename(model))}" if model else "")
    names = [_short(row) for row in rows] if rows != [_LAYER] else []
    width = max(4.5, 0.085 * len(title), min(_WIDEST, _CELL * wide))
    height = max(0.5, _CELL * min(len(rows), _LABELS))
    figure.set_size_inches(1 + _CHARACTER * max(map(len, names), default=0) + width, 0.9 + bands * (height + 0.3))
    every = figure.subplots(bands, squeeze=False)[:, 0]
    norm = Normalize(min(gates.values()), max(gates.values()))
    for band, axes in enumerate(every):
        part = slice(band * wide, (band + 1) * wide)
        image = axes.imshow(values[:, part], aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
        _ticks(axes, columns[part], names, width / wide)
        _mark(axes, dots[:, part], outlined[:, part], 72 * min(width / wide, height / len(rows)))
    every[0].set_title(title, fontsize=10, parse_math=False)
    if columns[0] != math.inf:
        every[-1].set_xlabel("decoder layer", fontsize=_FONT)
    bar = _bar(image, every, label, bands * height)
    if all(isinstance(value, int) for value in gates.values()):
        bar.locator = MaxNLocator(integer=True)  # ranks
        bar.update_ticks()
    _legend(figure, len(selected), len(gates), bool(unsure))
    _write(figure, path)
    return figure


def overlap_matrix(
    names: Sequence[str],
    overlaps: Mapping[float, Sequence[Sequence[float]]],
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """
    See [`~ranking.table.plot_overlaps`].

    Args:
        names: The names of the n rankings.
        overlaps: For each selected share in (0, 1), an n × n matrix of Jaccard indices in [0, 1].
        path: The picture to write.
    """
    figure = _figure(path)
    labels = [f"{_short(name)}  {number}" for number, name in enumerate(names, start=1)]
    side = max(1.8, 0.45 * len(names))
    figure.set_size_inches(1 + _CHARACTER * max(map(len, labels)) + (side + 0.3) * len(overlaps), 1 + side)
    every = figure.subplots(1, len(overlaps), squeeze=False, sharey=True)[0]
    for axes, (share, matrix) in zip(every, overlaps.items()):
        image = axes.imshow(matrix, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(np.array(matrix)):
            color = "black" if value > 0.45 else "white"
            axes.text(column, row, f"{value:.2f}", color=color, fontsize=_FONT, ha="center", va="center")
        # by chance, for n units and a share p: |A ∩ B| = p²·n and |A ∪ B| = 2·p·n - p²·n
        axes.set_title(f"top {100 * share:.0f} % (by chance {share / (2 - share):.2f})", fontsize=10)
        axes.set_xticks(range(len(names)), range(1, len(names) + 1), fontsize=_FONT)
        axes.set_yticks(range(len(names)), labels, fontsize=_FONT, parse_math=False)
    _bar(image, every, "overlap |A ∩ B| / |A ∪ B|", side)
    _write(figure, path)
    return figure


def kept_curve(
    shares: Sequence[float],
    kept: Mapping[str, Sequence[Sequence[float]]],
    path: str | os.PathLike[str] | None = None,
    subject: str = "units that are left on, most important first",
    result: tuple[str, float, float] | None = None,
) -> "Figure":
    """
    Draw the share of the gain that selections keep, against their share of the units.

    Args:
        shares: The shares of the units, in (0, 1], ascending.
        kept: For each kind of ranking one or more rows with the kept share of the gain at each of `shares`. Several
            rows are drawn as their mean and range.
        path: The picture to write.
        subject: The label of x.
        result: One more point: its label, its share, and its kept share of the gain.
    """
    figure = _figure(path)
    from matplotlib.ticker import PercentFormatter

    figure.set_size_inches(6, 3.4)
    axes = figure.subplots()
    for (name, rows), marker in zip(kept.items(), itertools.cycle("osD^v")):
        values = np.array(rows)
        (line,) = axes.plot(shares, values.mean(0), marker=marker, ms=4, label=_short(name))
        if len(rows) > 1:
            axes.fill_between(shares, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    if result:
        axes.plot(*result[1:], linestyle="", marker="*", ms=11, color="black", label=result[0])
    axes.set_xlabel(subject, fontsize=_FONT)
    axes.set_ylabel("kept of the loss gain of all", fontsize=_FONT)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(labelsize=_FONT)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=_FONT, frameon=False, loc="lower right")
    _write(figure, path)
    return figure


def check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib") from error


def _figure(path: str | os.PathLike[str] | None) -> "Figure":
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if path is not None and os.path.splitext(path)[1].removeprefix(".").lower() not in formats:
        raise ValueError(f"The suffix of {os.fspath(path)!r} is not supported; it must be one of {[*formats]}.")
    return figure


def _write(figure: "Figure", path: str | os.PathLike[str] | None) -> None:
    if path is not None:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=150)


def _bar(image: Any, every: Any, label: str, height: float) -> Any:
    """Add a colour bar beside some axes; their height is in inches."""
    bar = image.figure.colorbar(image, ax=list(every), pad=0.01, fraction=0.05, aspect=15 * height)
    bar.set_label(label, fontsize=_FONT)
    bar.ax.tick_params(labelsize=_FONT)
    return bar


def _ticks(axes: "Axes", columns: Sequence[float], names: Sequence[str], cell: float) -> None:
    """Add as many labels as fit; `cell` is a column's width in inches."""
    labels = [_NO_LAYER if column == math.inf else _short(str(int(column))) for column in columns]
    room = _CHARACTER * (1 + max(map(len, labels)))
    powers = (10**power * step for power in itertools.count() for step in (1, 2, 5))
    step = next(step for step in powers if step * cell >= room)
    ticks = list(range(0, len(labels), step))
    if labels[-1] == _NO_LAYER:
        ticks = [*(tick for tick in ticks if tick < len(labels) - step), len(labels) - 1]
    axes.set_xticks(ticks, [labels[tick] for tick in ticks], fontsize=_FONT)
    step = math.ceil(len(names) / _LABELS) or 1
    # matplotlib would read some names as formulas
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=_FONT, parse_math=False)
    axes.spines[:].set_visible(False)


def _mark(axes: "Axes", dots: Any, outlined: Any, cell: float) -> None:
    """
    Draw dots and outlines in black and white, which show on all colours.

    Args:
        axes: The axes of the cells.
        dots, outlined: Boolean, (rows, columns).
        cell: The smaller of a cell's width and height, in points.
    """
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
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=_FONT, frameon=False)


def _short(name: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in name)
    return printable if len(printable) <= _LONGEST else f"…{printable[-_LONGEST:]}"


def _cells(units: list[str]) -> dict[str, tuple[str, float]]:
    """The row of each unit (its name inside a decoder layer) and its column (the layer's index, ∞ for none)."""
    layers = {unit: split_layer(unit) for unit in units}
    one_stack = len({layer[0] for layer in layers.values() if layer}) == 1
    cells = {}
    for unit, layer in layers.items():
        if layer is None:
            cells[unit] = (unit, math.inf)
            continue
        stack, index = layer
        inner = unit.removeprefix(f"{stack}.{index}").removeprefix(".")
        row = (inner or _LAYER) if one_stack else f"{stack}.*.{inner}".removesuffix(".")
        cells[unit] = (row, index)
    return cells
