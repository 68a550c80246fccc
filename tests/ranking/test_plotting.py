import math

import numpy as np
import pytest

from peft_ila import LayerImportance
from peft_ila.ranking.table import plot_overlaps


def axes_of(importance):
    figure = importance.plot()
    return figure.axes[0]


def labels(axes, axis):
    return [label.get_text() for label in getattr(axes, f"get_{axis}ticklabels")()]


def test_layers_are_one_row():
    importance = LayerImportance(units=[f"model.layers.{i}" for i in range(4)], scores=[0.0, 1.0, -1.0, 2.0])
    axes = axes_of(importance)
    assert labels(axes, "x") == ["0", "1", "2", "3"] and axes.get_xlabel() == "decoder layer"
    assert labels(axes, "y") == []  # it would say the same as the x-axis
    assert axes.images[0].get_array().tolist() == [importance.gates]


def test_modules_are_rows():
    units = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
    axes = axes_of(LayerImportance(units=units, scores=[0.0, 1.0, 2.0, 3.0]))
    assert labels(axes, "y") == ["self_attn.q_proj", "mlp.up_proj"]
    assert axes.images[0].get_array()[1].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))])


def test_two_stacks_and_a_head():
    units = ["encoder.block.0", "encoder.block.1", "decoder.block.0", "lm_head"]
    axes = axes_of(LayerImportance(units=units, scores=[0.0, 1.0, 2.0, 3.0]))
    assert labels(axes, "y") == ["encoder.block.*", "decoder.block.*", "lm_head"]
    assert labels(axes, "x") == ["0", "1", "–"]
    filled = [[bool(value == value) for value in row] for row in axes.images[0].get_array().filled(math.nan)]
    assert filled == [[True, True, False], [True, False, False], [False, False, True]]


def test_units_that_are_selected_by_a_coin_toss_are_marked():
    units = [f"h.{i}.{name}" for i in range(5) for name in "ab"]
    scores = [3.0, -3.0, 2.0, -3.0, 0.01, -3.0, 0.0, -3.0, -2.0, -3.0]  # top 30 %: 3.0, 2.0 and one of 0.01 and 0.0
    axes = axes_of(LayerImportance(units, scores, spread=[0.1] * 10))
    assert axes.collections[0].get_offsets().tolist() == [[2, 0], [3, 0]]
    assert not axes_of(LayerImportance(units, scores)).collections


def test_dots_are_of_the_selection_that_is_outlined():
    importance = LayerImportance([f"h.{i}" for i in range(5)], [4.0, 2.01, 2.0, 1.0, 0.0], spread=[0.1] * 5)
    dots, *_ = importance.plot(top_k=2).axes[0].collections
    assert dots.get_offsets().tolist() == [[1, 0], [2, 0]]
    for selection in ({"threshold": 0.8}, {"units": ["h.0"]}):
        assert {type(own).__name__ for own in importance.plot(**selection).axes[0].collections} == {"LineCollection"}


def outlines(figure):
    """The lines around cells in each band, as pairs of points."""
    lines = [[own for own in axes.collections if hasattr(own, "get_segments")] for axes in figure.axes[:-1]]
    return [{tuple(map(tuple, line.tolist())) for own in band for line in own.get_segments()} for band in lines]


def around(column, row):
    """The four sides of a cell."""
    left, right, above, below = column - 0.5, column + 0.5, row - 0.5, row + 0.5
    upright = {((x, above), (x, below)) for x in (left, right)}
    return upright | {((left, y), (right, y)) for y in (above, below)}


def test_the_selection_is_outlined():
    units = [f"h.{i}.{name}" for i in range(4) for name in "ab"]
    importance = LayerImportance(units, [9.0, 0.0, 0.0, 0.0, 0.0, 8.0, 0.0, 7.0])
    assert outlines(importance.plot()) == [set()]
    assert outlines(importance.plot(top_k=3)) == [around(0, 0) | (around(2, 1) ^ around(3, 1))]  # none between them
    figure = importance.plot(units=["h.3.a"])
    assert outlines(figure) == [around(3, 0)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["selected: 1 of 8"]
    assert not importance.plot().legends
    with pytest.raises(ValueError, match="`top_p` is the share of units"):
        importance.plot(top_p=2)
    with pytest.raises(ValueError, match="exactly one of"):
        importance.plot(min_probability=0.5)


@pytest.mark.parametrize("layers, names, bands", [(40, 1, 1), (126, 7, 4), (1000, 1, 10)])
def test_many_layers_go_on_in_bands_below(layers, names, bands):
    units = [f"h.{i}.{name}" for i in range(layers) for name in "abcdefg"[:names]]
    importance = LayerImportance(units, [0.01 * i for i in range(len(units))])
    figure = importance.plot(units=["h.0.a", units[-1]])
    *every, _ = figure.axes
    assert len(every) == bands
    drawn = np.concatenate([axes.images[0].get_array().filled(math.nan) for axes in every], axis=1)
    assert drawn.T[:layers].flatten().tolist() == importance.gates and np.isnan(drawn[:, layers:]).all()
    wide = drawn.shape[1] // bands
    for band, axes in enumerate(every):
        assert [int(label) for label in labels(axes, "x")] == [band * wide + int(tick) for tick in axes.get_xticks()]
        assert labels(axes, "y") == [*"abcdefg"[:names]]
        assert axes.images[0].norm is every[0].images[0].norm
    # in inches, of labels of 8 points
    assert np.diff(every[0].get_xticks()).min() * 10 / max(wide, 40) >= 0.07 * len(str(layers))
    assert around(0, 0) <= outlines(figure)[0]
    assert around((layers - 1) % wide, names - 1) <= outlines(figure)[-1]


def test_lightness_grows_with_the_gate():
    image = axes_of(LayerImportance(["h.0", "h.1"], [0.0, 1.0])).images[0]
    red, green, blue, _ = image.cmap(np.linspace(0, 1, 256)).T
    assert (np.diff(0.299 * red + 0.587 * green + 0.114 * blue) > 0).all()  # as pictures are made grey, ITU-R BT.601


@pytest.mark.parametrize("method", ["attribution", "untrained", "descent", None])
def test_the_colours_are_gates_after_descent_only(method):
    metadata = {"learn_gates": {"method": method}} if method else {}
    *_, bar = LayerImportance(["h.0", "h.1"], [0.0, 1.0], metadata).plot().axes
    assert bar.get_ylabel() == ("gate γ = σ(s)" if method == "descent" else "importance σ(s)")


def test_pictures_are_opaque(tmp_path):
    from matplotlib.image import imread

    importance = LayerImportance(["h.0", "h.1"], [0.0, 1.0])
    importance.plot(tmp_path / "heatmap.png", top_k=1)
    plot_overlaps([("a", importance), ("b", importance)], tmp_path / "overlap.png")
    for name in ("heatmap.png", "overlap.png"):  # their text is dark, the page that shows them may be, too
        picture = imread(tmp_path / name)
        assert (picture[..., 3] == 1).all() and (picture[0] == 1).all()


def test_units_outside_every_stack_have_no_layer():
    axes = axes_of(LayerImportance(["embed", "lm_head"], [0.0, 1.0]))
    assert labels(axes, "y") == ["embed", "lm_head"] and axes.get_xlabel() == ""


def test_overlaps(tmp_path):
    units = [f"h.{i}" for i in range(4)]
    rankings = [LayerImportance(units, scores) for scores in ([4, 3, 2, 1], [1, 3, 2, 4], [4, 3, 2, 1])]
    names = ["$\\frac{", "b\x1b.json", "$\\frac{"]
    figure = plot_overlaps(list(zip(names, rankings)), tmp_path / "overlap.svg")
    top_30, top_75, _ = figure.axes
    assert top_30.get_title() == "top 30 % (by chance 0.18)" and top_75.get_title() == "top 75 % (by chance 0.60)"
    assert labels(top_30, "y") == ["$\\frac{  1", "b .json  2", "$\\frac{  3"] and labels(top_75, "x") == [
        "1",
        "2",
        "3",
    ]
    for axes, share in ((top_30, 0.3), (top_75, 0.75)):
        expected = [f"{a.overlap(b, share):.2f}" for a in rankings for b in rankings]
        assert [text.get_text() for text in axes.texts] == expected
        places = [text.get_position() for text in axes.texts]
        assert places == [(column, row) for row in range(3) for column in range(3)]
    assert top_30.texts[1].get_text() == "0.00" and top_75.texts[1].get_text() == "0.50"
    assert "$\\frac{" in (tmp_path / "overlap.svg").read_text()
    with pytest.raises(ValueError, match="Only rankings of the same units"):
        plot_overlaps([("a", rankings[0]), ("b", LayerImportance(["h.9"], [1.0]))])


def test_names_that_are_no_names(tmp_path):
    units = ["h.0.$\\frac{", "h.1.$x^2$", "h.1.<b>"]
    importance = LayerImportance(units, [0.0, 1.0, 2.0], {"model": "a/$\\frac{\x1b"})
    axes = axes_of(importance)
    assert labels(axes, "y") == ["$\\frac{", "$x^2$", "<b>"]
    assert axes.get_title() == "importance of the layers of $\\frac{ "
    importance.plot(tmp_path / "heatmap.svg")
    assert "$x^2$" in (tmp_path / "heatmap.svg").read_text()


@pytest.mark.parametrize("name", ["h.{}.a", "h.{}.b.{}", "n{}"])
def test_a_picture_of_bounded_size(name):
    units = [name.format(i, i) for i in range(1000)]
    figure = LayerImportance(units, [0.1] * len(units)).plot()
    assert max(figure.get_size_inches()) <= 45
    assert len(labels(figure.axes[0], "y")) <= 60


def test_written_whole_or_not_at_all(tmp_path):
    importance = LayerImportance(units=["h.0", "h.1"], scores=[0.0, 1.0])
    importance.plot(tmp_path / "new" / "heatmap.png")
    assert (tmp_path / "new" / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="not supported"):
        importance.plot(tmp_path / "heatmap.unknown")
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]
