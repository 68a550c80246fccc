"""The heatmap of a ranking."""

import math
import os
from typing import TYPE_CHECKING

from .files import whole_file
from .units import split_layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .importance import LayerImportance


def heatmap(importance: "LayerImportance", path: str | os.PathLike[str] | None = None) -> "Figure":
    """
    See [`LayerImportance.plot`]. Units outside every stack of layers, such as `lm_head`, get a last column. Where the
    ranking says how sure it is, a dot marks the units that are in the top 30 % or not by a coin toss.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'peft-ila[plot]'") from error

    layers = {unit: split_layer(unit) for unit in importance.units}
    stacks = {layer[0] for layer in layers.values() if layer}
    indices = sorted({layer[1] for layer in layers.values() if layer})
    columns = [str(index) for index in indices]
    if None in layers.values():
        columns.append("–")

    unsure = set(importance.coin_tosses(top_p=0.3)) if importance.spread else set()
    rows: dict[str, list[float]] = {}
    dots: list[tuple[int, str]] = []
    for unit, gate in zip(importance.units, importance.gates):
        if layer := layers[unit]:
            stack, column = layer[0], str(layer[1])
            inner = unit.removeprefix(f"{stack}.{column}").removeprefix(".")
            label = inner or "decoder layer" if len(stacks) == 1 else f"{stack}.*.{inner}".removesuffix(".")
        else:
            column, label = "–", unit
        row = rows.setdefault(label, [math.nan] * len(columns))
        row[columns.index(column)] = gate
        if unit in unsure:
            dots.append((columns.index(column), label))

    figure = Figure(figsize=(2.5 + 0.3 * max(len(columns), 8), 1.3 + 0.3 * max(len(rows), 2)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(list(rows.values()), aspect="auto", cmap="viridis", interpolation="nearest")
    if dots:
        axes.scatter([x for x, _ in dots], [list(rows).index(label) for _, label in dots], s=8, color="white")
    step = math.ceil(len(columns) / 40)
    axes.set_xticks(range(0, len(columns), step), columns[::step], fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_xlabel("decoder layer")
    model = importance.metadata.get("model")
    axes.set_title("importance" + (f" of the layers of {os.path.basename(model)}" if model else ""), fontsize=10)
    figure.colorbar(image, label="gate γ = σ(s)")
    if path is not None:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=150)
    return figure
