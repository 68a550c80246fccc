import copy
import json
import math
import re
from pathlib import Path
from random import Random

import numpy
import pytest
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

import peft_ila
from peft_ila import LayerImportance

UNITS = [f"model.layers.{i}" for i in range(10)]


def importance(scores, **kwargs) -> LayerImportance:
    return LayerImportance(units=[f"model.layers.{i}" for i in range(len(scores))], scores=list(scores), **kwargs)


def test_ranking_breaks_ties_by_position():
    assert importance([1.0, 3.0, 1.0, 3.0]).ranking() == [f"model.layers.{i}" for i in (1, 3, 0, 2)]


def test_what_is_printed_fits_a_line():
    units = [f"model.layers.{i}" for i in range(210)]
    ranking = LayerImportance(units, [float(i) for i in range(210)], {"model": "me/model"})
    best = "model.layers.209, model.layers.208, model.layers.207, …"
    assert str(ranking) == f"LayerImportance(210 units of 'me/model', most important first: {best})"


def test_gates():
    gates = importance([0.0, 4.0, -4.0, 800.0, -800.0]).gates
    assert gates == pytest.approx([0.5, 0.9820137900379085, 0.017986209962091555, 1.0, 0.0])


def test_select():
    ranked = importance(range(10))
    assert ranked.select(top_p=0.3) == UNITS[:6:-1]
    assert ranked.select(top_k=2) == ["model.layers.9", "model.layers.8"]
    assert ranked.select(top_p=0.01) == ["model.layers.9"]
    assert ranked.select(top_p=1.0) == UNITS[::-1]
    assert ranked.select(units=["model.layers.2", "model.layers.7"]) == ["model.layers.7", "model.layers.2"]
    assert importance([-1.0, 0.0, 2.0]).select(threshold=0.5) == ["model.layers.2", "model.layers.1"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one of"),
        ({"top_p": 0.5, "top_k": 2}, r"exactly one of .* got \['top_p', 'top_k'\]"),
        ({"top_p": 0.0}, r"`top_p` .* \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"`top_p` .* got 1.5"),
        ({"top_p": math.nan}, r"`top_p` .* got nan"),
        ({"top_k": 0}, "`top_k` must be a whole number from 1 to 10, got 0"),
        ({"top_k": 11}, "`top_k` must be a whole number from 1 to 10, got 11"),
        ({"top_k": 2.5}, "`top_k` must be a whole number"),
        ({"threshold": 2.0}, r"`threshold` .* \[0, 1\], got 2.0"),
        ({"top_k": 2, "units": UNITS}, r"exactly one of .* got \['top_k', 'units'\]"),
        ({"units": []}, r"`units` must be a list of at least one unit, got \[\]"),
        ({"units": "model.layers.0"}, "`units` must be a list of at least one unit, got 'model.layers.0'"),
        ({"units": ["model.layers.0", "lm_head"]}, r"has no unit 'lm_head' \(1 of 2 are unknown\)"),
        ({"units": UNITS, "min_probability": 0.5}, "`min_probability` goes with .* not with `threshold` or `units`"),
        ({"threshold": 0.5, "min_probability": 0.5}, "`min_probability` goes with `top_p` or `top_k`"),
        ({"top_k": 2, "min_probability": 0.9}, "The probabilities are unknown: this ranking has no `spread`"),
        ({"threshold": 0.99999}, "No unit reaches `threshold=0.99999`; the greatest is 0.989"),
    ],
)
def test_bad_selections(arguments, message):
    with pytest.raises(ValueError, match=message):
        importance([0.5 * i for i in range(10)]).select(**arguments)


@pytest.mark.parametrize("share", [{"top_p": 0.34}, {"top_k": 2}])
def test_equal_scores_select_nothing_but_all_units(share):
    equal = importance([4.0, 4.0, 4.0])
    for use in (equal.select, equal.to_lora_config, equal.plot):
        with pytest.raises(ValueError, match=r"All 3 units have the same score, 4\.0, .* `learn_gates\(trainer\)`"):
            use(**share)
    assert len(equal.select(top_p=1.0)) == len(equal.select(top_k=3)) == len(equal.select(threshold=0.5)) == 3
    assert equal.select(units=UNITS[1:2]) == UNITS[1:2]
    assert importance([4.0]).select(top_p=0.3) == UNITS[:1]
    assert importance([4.0, 4.0, 3.0]).select(top_k=1) == UNITS[:1]  # ties of some are broken by position


def test_a_number_may_be_numpys():
    assert importance(range(10)).select(top_k=numpy.int64(2)) == UNITS[:7:-1]


@pytest.mark.parametrize("arguments", [{}, {"top_p": 0.5, "top_k": 2}])
def test_the_probability_of_no_selection(arguments):
    with pytest.raises(ValueError, match="Pass exactly one of `top_p` and `top_k`"):
        importance([1.0, 2.0], spread=[0.1, 0.1]).probability(**arguments)


def test_probability_of_being_selected():
    sure = importance([3.0, 1.0, 2.0, 0.0], spread=[0.0] * 4)
    assert list(sure.probability(top_k=2).values()) == [1.0, 0.0, 1.0, 0.0]
    assert sure.coin_tosses(top_k=2) == []

    # two units: the difference of their scores is normal too
    difference, spread = 0.5, [0.3, 0.4]
    unsure = importance([1.0 + difference, 1.0], spread=spread)
    expected = 0.5 * (1 + math.erf(difference / math.hypot(*spread) / math.sqrt(2)))
    probability = unsure.probability(top_k=1)
    assert probability["model.layers.0"] == pytest.approx(expected, abs=0.04)  # three standard errors of 1,000 draws
    assert sum(probability.values()) == pytest.approx(1)
    assert probability == unsure.probability(top_p=0.5)  # the draws are the same


def test_of_units_with_a_probability_so_many_belong_to_the_true_top():
    """Scores with noise of a known size, a quarter of the differences between units."""
    random = Random(0)
    said, true = [], []
    for _ in range(40):
        truth = [random.gauss(0, 1) for _ in range(30)]
        measured = importance([value + random.gauss(0, 0.25) for value in truth], spread=[0.25] * 30)
        top = set(importance(truth).select(top_p=0.3))
        for unit, probability in measured.probability(top_p=0.3).items():
            said.append(probability)
            true.append(unit in top)
    for low, high in ((0, 0.25), (0.25, 0.75), (0.75, 1.01)):
        of_bin = [i for i, probability in enumerate(said) if low <= probability < high]
        assert len(of_bin) > 100
        expected, found = (sum(values[i] for i in of_bin) / len(of_bin) for values in (said, true))
        assert found == pytest.approx(expected, abs=0.1)


def test_sure_units_alone_are_selected_and_coin_tosses_are_named():
    ranked = importance([5.0, 1.02, 1.0, -5.0], spread=[0.1] * 4)
    assert ranked.select(top_k=2) == ["model.layers.0", "model.layers.1"]
    assert ranked.select(top_k=2, min_probability=0.9) == ["model.layers.0"]
    assert ranked.coin_tosses(top_k=2) == ["model.layers.1", "model.layers.2"]
    assert ranked.to_lora_config(top_k=2, min_probability=0.9).target_modules == {"model.layers.0"}
    with pytest.raises(ValueError, match=r"No unit reaches `min_probability=0\.9`; the greatest is 0\.[45]"):
        importance([1.0, 1.0], spread=[1.0, 1.0]).select(top_k=1, min_probability=0.9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"units": [], "scores": []}, "at least one unit"),
        ({"units": ["a", "b"], "scores": [1.0]}, "1 scores for 2 units"),
        ({"units": ["a"], "scores": [1.0], "spread": [0.1, 0.1]}, "`spread` must hold one finite number"),
        ({"units": ["a"], "scores": [1.0], "spread": [math.nan]}, "`spread` must hold one finite number"),
        ({"units": ["a", "a"], "scores": [1.0, 2.0]}, "'a' is repeated"),
        ({"units": ["a"], "scores": [math.inf]}, "score of 'a' is inf"),
        ({"units": ["a"], "scores": [1.0], "modules": {"b": ["b"]}}, "`modules` must list"),
    ],
)
def test_bad_rankings(arguments, message):
    with pytest.raises(ValueError, match=message):
        LayerImportance(**arguments)


def test_overlap_is_the_jaccard_index():
    a, b = importance(range(10)), importance([9, 1, 2, 3, 4, 5, 6, 7, 8, 0])
    assert a.overlap(a) == 1.0
    # top 8 of each: 2..9 and 0, 2..8
    assert a.overlap(b, top_p=0.8) == 7 / 9
    assert importance(range(10)).overlap(importance(range(9, -1, -1)), top_p=0.5) == 0.0


def test_spearman_against_scipys_figures():
    # scipy.stats.spearmanr, ties included
    assert importance([1, 2, 3, 4, 5]).spearman(importance([5, 6, 7, 8, 7])) == pytest.approx(0.8207826816681233)
    assert importance([1, 2, 3]).spearman(importance([3, 2, 1])) == -1.0
    assert math.isnan(importance([1, 1, 1]).spearman(importance([3, 2, 1])))


def test_order_of_units_does_not_matter_for_comparisons():
    a = importance([3.0, 1.0, 2.0])
    b = LayerImportance(units=a.units[::-1], scores=a.scores[::-1])
    assert a.spearman(b) == 1.0 and a.overlap(b, top_p=0.4) == 1.0


def test_rankings_of_other_units_are_not_compared():
    with pytest.raises(ValueError, match=r"1 units are in only one of them, such as 'model\.layers\.2'"):
        importance([1.0, 2.0]).overlap(importance([1.0, 2.0, 3.0]))


def test_saved_and_loaded(tmp_path):
    ranked = importance(
        [0.1, -2.0, 3.5],
        metadata={"model": "größe", "learn_gates": {"steps": 3}},
        modules={f"model.layers.{i}": [f"model.layers.{i}.q_proj"] for i in range(3)},
        lookalikes=["vision.layers.0.q_proj"],
        spread=[0.5, 0.25, 0.0],
    )
    path = tmp_path / "new" / "importance.json"
    ranked.save(path)
    assert LayerImportance.load(path) == ranked
    content = json.loads(path.read_text())
    assert content["version"] == 1 and content["units"][1]["score"] == -2.0
    assert '{"unit": "model.layers.1", "score": -2.0' in path.read_text()  # one unit a line
    assert [entry.name for entry in path.parent.iterdir()] == ["importance.json"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("not json", "is not JSON"),
        ("[1]", "is not a ranking"),
        ('{"format": "x"}', "is not a ranking"),
        ('{"format": "peft_ila.LayerImportance", "version": 2}', "version 2 .* upgrade"),
        ('{"format": "peft_ila.LayerImportance", "version": 1}', "KeyError: 'units'"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "importance.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        LayerImportance.load(path)


GOOD = {
    "format": "peft_ila.LayerImportance",
    "version": 1,
    "metadata": {},
    "lookalikes": [],
    "units": [
        {"unit": "m.0", "score": 1.0, "modules": ["m.0.q"], "spread": 0.1},
        {"unit": "m.1", "score": 2.0, "modules": ["m.1.q"], "spread": 0.1},
    ],
}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(version=True), "has version True"),
        (lambda c: c.update(metadata=[]), "`metadata` must be a dict"),
        (lambda c: c.update(metadata={"model": 5}), r"`metadata\['model'\]` must be a name, got 5"),
        (lambda c: c.update(lookalikes="m.0.q"), "`lookalikes` must be a list"),
        (lambda c: c.update(lookalikes=[5]), "name of a module must be a string"),
        (lambda c: c.update(lookalikes=["m.0.q"]), "cannot be among `lookalikes`"),
        (lambda c: c["units"][0].update(modules="m.0.q"), "must hold a list of at least one name for 'm.0'"),
        (lambda c: c["units"][0].update(modules=[]), "must hold a list of at least one name for 'm.0'"),
        (
            lambda c: c["units"][0].update(modules=["m.1.q"]),
            "lists 'm.1.q' for 'm.0', but it is not part of that unit",
        ),
        (lambda c: c["units"][0].update(modules=["m.0.q", "m.0.q"]), "lists 'm.0.q' twice"),
        (lambda c: c["units"][0].update(unit=5), "name of a module must be a string"),
        (lambda c: c["units"][0].update(unit="m.1"), "'m.1' is repeated"),
        (lambda c: c["units"][0].update(unit="a\x1b[2J", modules=["a\x1b[2J"]), "cannot be the name of a module"),
        (lambda c: c["units"][0].update(unit="a..b", modules=["a..b"]), "cannot be the name of a module"),
        (lambda c: c["units"][0].update(score=True), "score of 'm.0' is True"),
        (lambda c: c["units"][0].update(score="a\nb"), r"score of 'm.0' is 'a\\nb'"),
        (lambda c: c.update(version="a\nb"), r"has version 'a\\nb'"),
        (lambda c: c.update(metadata={"task_type": "a\nb"}), r"`metadata\['task_type'\]` must be a name, got 'a\\nb'"),
        (lambda c: c["units"][0].update(score=10**400), "scores must be finite numbers"),
        (lambda c: c["units"][0].update(spread=-1), "`spread` must hold one finite number"),
        (lambda c: c["units"][0].pop("spread"), "KeyError: 'spread'"),
        (lambda c: c["units"][0].update(parameters={"m.0.x": 1}), "`parameters` names 'm.0.x'"),
        (lambda c: c["units"][0].update(parameters={"m.0.q": 0}), "must hold a number above 0 for 'm.0.q'"),
        (lambda c: c.update(units=5), "TypeError"),
    ],
)
def test_odd_files(tmp_path, change, message):
    content = copy.deepcopy(GOOD)
    (tmp_path / "importance.json").write_text(json.dumps(content))
    assert LayerImportance.load(tmp_path / "importance.json").scores == [1.0, 2.0]
    change(content)
    (tmp_path / "importance.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        LayerImportance.load(tmp_path / "importance.json")
    assert str(error.value).isprintable()


def test_half_a_character_in_metadata(tmp_path):
    """As in a path that is not UTF-8."""
    path = tmp_path / "importance.json"
    path.write_text(json.dumps({**GOOD, "metadata": {"model": "a\udcff", "\ud800": ["\udfff", "ä"]}}))
    importance = LayerImportance.load(path)
    importance.save(path)
    assert "ä" in path.read_text(encoding="utf-8") and LayerImportance.load(path) == importance


def test_a_spread_of_minus_0():
    assert LayerImportance(["a", "b"], [0.0, 1.0], spread=[-0.0, 0.1]).probability(top_k=1) == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize("unit", ["m.(a+)+b", "m.la(b", "m.a|b", "m.[", "m.a*"])
def test_names_are_no_patterns(unit):
    units = [f"{unit}.{i}" for i in range(3)]
    importance = LayerImportance(units, [1.0, 2.0, 3.0], modules={u: [f"{u}.q", f"{u}.k"] for u in units})
    config = importance.to_lora_config(top_k=2)
    assert importance.to_lora_config(units=importance.select(top_k=2)) == config
    names = [name for own in importance.modules.values() for name in own]
    hit = [name for name in names if check_target_module_exists(config, name)]
    assert hit == [f"{unit}.{i}.{name}" for i in (1, 2) for name in "qk"]


def test_a_file_nested_too_deep(tmp_path):
    (tmp_path / "importance.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        LayerImportance.load(tmp_path / "importance.json")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "importance.json"
    importance([1.0, 2.0]).save(path)
    before = path.read_text()
    broken = importance([3.0, 4.0], metadata={"data": object()})
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_freeze_unselected():
    model = tiny_llama()
    frozen = importance([1.0, 3.0, 2.0]).freeze_unselected(model, top_k=2, outside=False)
    expected = {name for name, _ in model.named_parameters() if name.startswith("model.layers.0.")}
    assert set(frozen) == expected
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == expected


@pytest.mark.parametrize("unselected", ["lm_head", "model.embed_tokens"])
def test_a_weight_shared_with_what_is_not_frozen_stays(unselected):
    model = tiny_llama(tie_word_embeddings=True)
    units = ["model.layers.0", unselected]
    assert LayerImportance(units, [1.0, 0.0]).freeze_unselected(model, top_k=1, outside=False) == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    both = LayerImportance(["model.layers.0", "lm_head", "model.embed_tokens"], [1.0, 0.0, 0.0])
    assert both.freeze_unselected(model, top_k=1, outside=False) == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    "units, left",
    [
        (["model.layers.0", "model.layers.1"], ["model.layers.0."]),
        (["model.layers.0.mlp", "lm_head"], ["model.layers.0.mlp."]),
        (["lm_head", "model.layers.0"], ["model.embed_tokens.weight"]),  # the same weight
        (["model.layers.0.mlp.up_proj.weight", "lm_head"], ["model.layers.0.mlp.up_proj.weight"]),
    ],
)
def test_freezing_all_that_is_not_selected(units, left):
    """By default, as `peft-ila tune --full`."""
    model = tiny_llama(tie_word_embeddings=True)
    frozen = LayerImportance(units, [1.0, 0.0]).freeze_unselected(model, top_k=1)
    names = [name for name, _ in model.named_parameters()]
    assert frozen == [name for name in names if not name.startswith(tuple(left))] and len(frozen) < len(names)
    assert frozen == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("best", [0, 2])
def test_freezing_another_model_freezes_nothing(outside, best):
    model = tiny_llama(layers=2)
    scores = [3.0 * (position == best) for position in range(4)]
    with pytest.raises(ValueError, match=re.escape("The model has no 'model.layers.2' (2 of 4 units are missing)")):
        importance(scores).freeze_unselected(model, top_k=1, outside=outside)
    assert all(parameter.requires_grad for parameter in model.parameters())


# equal scores select nothing, see above
scores_lists = st.lists(st.floats(-50, 50), min_size=2, max_size=20).filter(lambda scores: len(set(scores)) > 1)


@given(scores_lists, st.randoms(use_true_random=False))
def test_ranking_does_not_depend_on_the_order_of_distinct_units(scores, random):
    scores = list(dict.fromkeys(scores))
    ranked = importance(scores)
    order = list(range(len(scores)))
    random.shuffle(order)
    shuffled = LayerImportance(units=[ranked.units[i] for i in order], scores=[scores[i] for i in order])
    assert shuffled.ranking() == ranked.ranking()


@given(scores_lists, st.floats(0.01, 1), st.floats(0.01, 1))
def test_selection_grows_with_its_share(scores, a, b):
    smaller, larger = (set(importance(scores).select(top_p=p)) for p in sorted((a, b)))
    assert smaller <= larger


@given(scores_lists)
def test_comparisons_are_symmetric_and_bounded(scores):
    a, b = importance(scores), importance(scores[::-1])
    assert a.overlap(b) == b.overlap(a) and 0 <= a.overlap(b) <= 1
    assert a.spearman(b) == pytest.approx(b.spearman(a))
    assert -1.000001 <= a.spearman(b) <= 1.000001
    assert a.spearman(a) == pytest.approx(1.0)


def test_mean_is_that_of_standardised_scores():
    a = importance([1.0, 2.0, 6.0], metadata={"model": "m", "data": "a", "seed": 0}, lookalikes=["x"])
    b = importance([-10.0, 0.0, 10.0], metadata={"model": "m", "data": "b", "seed": 0}, spread=[1.0, 1.0, 1.0])
    mean = LayerImportance.mean([a, LayerImportance(b.units[::-1], b.scores[::-1], b.metadata, spread=b.spread)])
    own = numpy.array([a.scores, b.scores])
    own = (own - own.mean(1, keepdims=True)) / own.std(1, keepdims=True)
    assert mean.units == a.units and mean.modules == a.modules and mean.lookalikes == ["x"]
    assert mean.scores == pytest.approx(own.mean(0))
    assert mean.spread == []  # two rankings do not tell
    assert mean.metadata == {"model": "m", "seed": 0, "mean_of": [{"data": "a"}, {"data": "b"}]}
    twice = LayerImportance.mean([mean, mean])
    assert twice.metadata["mean_of"] == [{"mean_of": mean.metadata["mean_of"]}] * 2
    assert twice.ranking() == mean.ranking() and twice.spread == []


def test_the_mean_of_many_rankings_says_how_sure_it_is():
    own = numpy.random.default_rng(0).normal(size=(8, 5))
    mean = LayerImportance.mean(importance(list(scores)) for scores in own)
    own = (own - own.mean(1, keepdims=True)) / own.std(1, keepdims=True)
    assert mean.scores == pytest.approx(own.mean(0))
    assert mean.spread == pytest.approx(own.std(0, ddof=1) / math.sqrt(8))


def test_the_order_of_modules_in_a_unit_is_of_no_matter_to_a_mean():
    names = [f"model.layers.{i}" for i in range(2)]
    a, b = (importance([1.0, 2.0], modules={n: [f"{n}.{m}" for m in own] for n in names}) for own in ("xy", "yx"))
    assert LayerImportance.mean([a, b]).modules == a.modules


def test_a_ranking_of_equals_does_not_move_a_mean():
    mean = LayerImportance.mean([importance([1.0, 1.0, 1.0]), importance([1.0, 2.0, 0.0])])
    assert mean.ranking() == importance([1.0, 2.0, 0.0]).ranking()


def test_what_has_no_mean():
    a = importance([1.0, 2.0])
    with pytest.raises(ValueError, match="at least two rankings, got 1"):
        LayerImportance.mean([a])
    with pytest.raises(ValueError, match="same units"):
        LayerImportance.mean([a, importance([1.0, 2.0, 3.0])])
    with pytest.raises(ValueError, match="adapt the same modules"):
        LayerImportance.mean([a, importance([1.0, 2.0], modules={u: [f"{u}.q"] for u in a.units})])
    others = [importance([1.0, 2.0], metadata={"model_type": name}) for name in ("llama", "gpt2")]
    with pytest.raises(ValueError, match=r"rankings of one model type, got \['gpt2', 'llama'\]"):
        LayerImportance.mean([a, *others])


def test_published_rankings_load_by_name(tmp_path, monkeypatch):
    files = sorted((Path(peft_ila.__file__).parent / "published").glob("*.json"))
    assert files
    for file in files:
        ranking = LayerImportance.load(file.stem)
        assert ranking == LayerImportance.load(file) and ranking.metadata["mean_of"]
        config = ranking.to_lora_config(top_p=0.3)
        assert config.base_model_name_or_path == ranking.metadata["model"]
    with pytest.raises(
        FileNotFoundError, match="No such file: 'nothing'. The published rankings are .*smollm2-135m-instruct"
    ):
        LayerImportance.load("nothing")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="No such file: ''"):
        LayerImportance.load("")
    (tmp_path / files[1].stem).mkdir()  # such as the model's own
    assert LayerImportance.load(files[1].stem) == LayerImportance.load(files[1])
    importance([1.0, 2.0]).save(files[0].stem)  # a file of the user's own comes first
    assert LayerImportance.load(files[0].stem).scores == [1.0, 2.0]
