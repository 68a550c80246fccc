import math

import pytest

from peft_ila import LayerImportance


def axes_of(importance):
    figure = importance.plot()
    return figure.axes[0]


def labels(axes, axis):
    return [label.get_text() for label in getattr(axes, f"get_{axis}ticklabels")()]


def test_layers_are_one_row():
    importance = LayerImportance(units=[f"model.layers.{i}" for i in range(4)], scores=[0.0, 1.0, -1.0, 2.0])
    axes = axes_of(importance)
    assert labels(axes, "x") == ["0", "1", "2", "3"] and labels(axes, "y") == ["decoder layer"]
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


def test_many_layers_keep_readable_ticks():
    importance = LayerImportance(units=[f"h.{i}" for i in range(126)], scores=[0.1 * i for i in range(126)])
    assert len(labels(axes_of(importance), "x")) <= 40


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
