"""What the study of `benchmarks/study` computes by itself, against the package."""

import itertools
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, PeftModel
from trainers import options
from transformers import Trainer, TrainingArguments

from benchmarks.study.arms import (
    ALIGNMENT,
    ARMS,
    ARMS_OF_SECOND,
    LEARNING_RATES,
    SEEDS,
    SETS,
    TUNED,
    TUNING_SEED,
    TUNING_SETS,
    Job,
    Study,
    layers_within,
    modules_within,
    ranks_by_importance,
)
from benchmarks.study.claims import Claim
from benchmarks.study.figures import Estimate, Figures, difference, estimate
from benchmarks.study.problem import HELD_OUT, RANK, SCALE, Example, Problem, adapted_modules
from benchmarks.study.rankings import attribution, descent, untrained
from benchmarks.study.tables import insert
from peft_ila import ILAConfig, learn_gates


@pytest.fixture
def problem():
    # one dialogue only, so that the order in which a trainer takes its examples is that of the study
    return Problem(tiny_llama().requires_grad_(False), [Example([5, 9, 3, 7, 2, 8], 2)] * (HELD_OUT + 16), seed=0)


def ranked(problem, adapter, tmp_path, method):
    """What the package finds."""
    config = ILAConfig.from_lora(LoraConfig.from_pretrained(adapter), granularity="module", gate_mode="open")
    model = PeftModel.from_pretrained(tiny_llama(), adapter, config=config, is_trainable=True)
    batch = problem.collate(problem.train[:1])
    row = {"input_ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist()}
    trainer = Trainer(model=model, args=TrainingArguments(**options(tmp_path)), train_dataset=[row] * 64)
    return learn_gates(trainer, steps=4, method=method, min_agreement=None, loss_batches=1)


def test_attribution_is_that_of_learn_gates(problem, tmp_path):
    sizes = adapted_modules(problem.base)
    with problem.lora(dict.fromkeys(sizes, RANK)) as model:
        assert list(problem.fit(model, 1e-2, 3)) == [1, 2, 3]
        found = attribution(model, problem, 4)
        model.save_pretrained(tmp_path / "adapter")
    importance = ranked(problem, tmp_path / "adapter", tmp_path, "attribution")
    assert importance.units == list(sizes)
    torch.testing.assert_close(torch.tensor(importance.scores), found / found.mean() - 1, rtol=1e-3, atol=1e-4)


def test_the_untrained_search_is_that_of_learn_gates(problem, tmp_path):
    sizes = adapted_modules(problem.base)
    with problem.lora(dict.fromkeys(sizes, RANK)) as model:
        model.save_pretrained(tmp_path / "adapter")
    found = torch.tensor(untrained(problem, sizes)["untrained, 4 batches"])
    importance = ranked(problem, tmp_path / "adapter", tmp_path, "untrained")
    torch.testing.assert_close(torch.tensor(importance.scores), found / found.mean() - 1, rtol=1e-3, atol=1e-4)


def test_descent_closes_what_the_budget_has_no_place_for(problem):
    before = {name: value.clone() for name, value in problem.base.state_dict().items()}
    sizes = adapted_modules(problem.base)
    (scores,) = descent(problem, sizes, 1e-2, 5).values()
    assert len(scores) == len(sizes) and sum(score > 0 for score in scores) < len(sizes) / 2
    assert all(torch.equal(value, before[name]) for name, value in problem.base.state_dict().items())


def test_every_way_of_tuning_leaves_the_base_model_as_it_was(problem):
    before = {name: value.clone() for name, value in problem.base.state_dict().items()}
    units = list(adapted_modules(problem.base))
    ways = (
        lambda: problem.lora({units[0]: 4, units[-1]: 2}, 2),
        lambda: problem.eva(units),
        lambda: problem.adalora(units, 10),
        lambda: problem.full(units[:3]),
    )
    for way in ways:
        with way() as model:
            loss = problem.loss(model)
            list(problem.fit(model, 1e-2, 10))
            assert problem.loss(model) < loss
        assert before.keys() == problem.base.state_dict().keys()
        assert all(torch.equal(value, before[name]) for name, value in problem.base.state_dict().items())


def test_ranks_and_their_scale(problem):
    units = list(adapted_modules(problem.base))
    with problem.lora({units[0]: 4, units[-1]: 2}, 2) as model:
        layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
        assert {n: m.r["default"] for n, m in layers.items()} == {units[0]: 4, units[-1]: 2}
        assert {m.scaling["default"] for m in layers.values()} == {SCALE}


def test_selections_fit_their_budget():
    sizes = {f"m.layers.{i}.{name}": size for i in range(4) for name, size in (("q", 10), ("k", 3))}
    scores = {unit: float(i) for i, unit in enumerate(sizes)}
    assert modules_within(26, scores, sizes) == ["m.layers.3.k", "m.layers.3.q", "m.layers.2.k", "m.layers.2.q"]
    assert modules_within(7, scores, sizes) == ["m.layers.3.k", "m.layers.2.k"]
    assert layers_within(13, scores, sizes) == ["m.layers.3.q", "m.layers.3.k"]
    for budget, power, least, most in itertools.product((100, 416), (0.5, 1), (0, 1), (8, 32)):
        ranks = ranks_by_importance(scores, sizes, budget, power, least, most)
        used = sum(rank * sizes[unit] for unit, rank in ranks.items())
        assert budget - min(sizes.values()) < used <= budget or max(ranks.values()) == most
        assert all(max(least, 1) <= rank <= most for rank in ranks.values())
        by_score = [ranks.get(unit, 0) for unit in sizes if unit.endswith("q")]
        assert by_score == sorted(by_score)


@pytest.mark.parametrize("second", [False, True])
def test_every_arm_is_run_for_every_seed(second):
    """With figures made up, the study goes through all of its arms."""
    sizes = {f"m.layers.{i}.{name}": 10 for i in range(10) for name in "qk"}
    study = Study([], sizes, second)
    done: set[str] = set()
    while jobs := [job for job in study.jobs() if job.key not in done]:
        for job in jobs:
            done.add(job.key)
            row = {**job.described(), "loss": 1 + job.learning_rate}
            names = ["full search", "full search, half way", "norm of ΔW"] if job.ranked else []
            if job.kind in ("rank", "untrained"):
                names = list(untrained_names())
            if job.kind == "short":
                names = [f"{steps} steps at {multiple} ×" for steps in (4, 8, 12) for multiple in (1, 2, 4)]
            names += {"base": ["KappaTune"], "aletheia": ["aletheia-lora"], "descent": ["descent"]}.get(job.kind, [])
            study.add({**row, "scores": {name: list(range(len(sizes))) for name in names}})
    for group, sets, arms in ARMS_OF_SECOND if second else ARMS:
        for arm, data, seed in itertools.product(arms, sets, SEEDS):
            job = Job("tune", data, seed, arm, group, learning_rate=study.learning_rate(group))
            assert job.key in done
    assert {job.split("|")[1] for job in done} == ({*ALIGNMENT, *TUNING_SETS} if second else {*SETS, ""})


def test_learning_rates_are_tried_on_both_sides_of_the_best():
    def study(*losses):
        rows = [
            {"kind": "tune", "data": data, "seed": TUNING_SEED, "group": "g", "arm": TUNED}
            | {"learning_rate": rate, "loss": loss}
            for data in TUNING_SETS
            for rate, loss in losses
        ]
        return Study(rows, {})

    _, low, middle, high, highest = LEARNING_RATES
    assert list(study().rates("g")) == [low, middle, high] and study().learning_rate("g") is None
    assert study((low, 2.0), (middle, 1.0), (high, 3.0)).learning_rate("g") == middle
    edge = study((low, 3.0), (middle, 2.0), (high, 1.0))
    assert list(edge.rates("g")) == [low, middle, high, highest] and edge.learning_rate("g") is None
    assert study((low, 3.0), (middle, 2.0), (high, 1.0), (highest, 1.5)).learning_rate("g") == high


@pytest.mark.parametrize(
    ("mean", "error", "floor", "verdict"),
    [
        (0.95, 0.02, None, "holds"),
        (0.91, 0.02, None, "no difference measured"),
        (0.89, 0.02, None, "no difference measured"),
        (0.80, 0.02, None, "does not hold"),
        (0.80, 0.02, 0.6, "partly"),
        (0.62, 0.02, 0.6, "does not hold"),
        (0.95, None, None, "too few runs"),
    ],
)
def test_a_claim_holds_or_not_by_two_standard_errors(mean, error, floor, verdict):
    claim = Claim("", "", lambda figures: None, 0.9, floor)
    assert claim.verdict(Estimate(mean, error, 9)) == verdict


def test_the_seeds_of_a_set_are_no_independent_runs():
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 4.0}
    found = estimate(values.get, [*values, ("b", 1)])
    assert (found.mean, found.error, found.runs) == (3.0, 1.0, 3)
    assert difference(values.get, {("a", 0): 0.5}.get, values) == Estimate(0.5, None, 1)
    assert estimate({}.get, values) is None


@pytest.mark.parametrize("path", ["README.md", "docs/reproduction.md"])
def test_the_tables_are_those_of_the_figures(path):
    page = Path(path).read_text(encoding="utf-8")
    models = [Figures.load(Path("benchmarks/results") / name) for name in ("study", "study_gemma")]
    assert "made by benchmarks/study/tables.py" in page
    assert insert(models, page) == page


def untrained_names():
    yield from (f"untrained, {number} batches" for number in (1, 4, 8, 16))
    yield from ("untrained, L2", "untrained, norm of the mean gradient", "untrained, second moments")
    yield from ("untrained, r = 32", "untrained, A drawn again", "gradient norm", "Fisher")
