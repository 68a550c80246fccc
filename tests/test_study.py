"""What the study of `benchmarks/study` computes by itself, against the package; and its tables in the docs."""

import functools
import itertools
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama

from benchmarks.pruning import figures as pruning_figures
from benchmarks.pruning import tables as pruning_tables
from benchmarks.pruning.adapter import adapter, losses
from benchmarks.study import tables
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
)
from benchmarks.study.claims import Claim
from benchmarks.study.figures import Estimate, Figures, difference, estimate
from benchmarks.study.problem import HELD_OUT, Example, Problem, adapted_modules
from benchmarks.study.rankings import attribution, rounded, untrained
from peft_ila import learn_gates


@pytest.fixture
def problem():
    # one dialogue only, so that the order in which a trainer takes its examples is that of the study
    return Problem(tiny_llama().requires_grad_(False), [Example([5, 9, 3, 7, 2, 8], 2)] * (HELD_OUT + 16), seed=0)


def test_the_searches_are_those_of_learn_gates(problem, tmp_path):
    sizes = adapted_modules(problem.base)
    with problem.lora(list(sizes)) as model:
        model.save_pretrained(tmp_path / "fresh")
        assert list(problem.fit(model, 1e-2, 3)) == [1, 2, 3]
        trained = rounded(attribution(model, problem))
        model.save_pretrained(tmp_path / "trained")
    own = {"attribution": trained, "untrained": untrained(problem, sizes)["untrained, 8 batches"]}
    for method, name in (("attribution", "trained"), ("untrained", "fresh")):
        trainer = problem.trainer(tmp_path / name)
        importance = learn_gates(trainer, steps=4, method=method, min_agreement=None, loss_batches=1)
        found = torch.tensor(own[method])
        assert importance.units == list(sizes)
        torch.testing.assert_close(torch.tensor(importance.scores), found / found.mean() - 1, rtol=1e-3, atol=1e-4)


def test_a_row_of_several_examples_has_the_loss_of_each_alone():
    base = tiny_llama().requires_grad_(False)
    examples = [Example([5, 9, 3, 7, 2, 8], 2), Example([4, 6, 1], 1), Example([8, 8, 2, 5, 9], 4)]
    alone = [
        base(input_ids=torch.tensor([x.tokens]), labels=torch.tensor([[-100] * x.prompt + x.tokens[x.prompt :]])).loss
        * (len(x.tokens) - x.prompt)
        for x in examples
    ]
    packed = Problem(base, examples, seed=0).loss(base, examples)
    assert packed == pytest.approx(float(sum(alone)) / 7, abs=1e-5)


@pytest.mark.parametrize("way", ["lora", "full", "eva", "adalora"])
def test_every_way_of_tuning_lowers_the_loss_and_leaves_the_base_model_as_it_was(problem, way):
    before = {name: value.clone() for name, value in problem.base.state_dict().items()}
    options = {"lora": [2], "adalora": [10]}.get(way, [])
    with getattr(problem, way)(list(adapted_modules(problem.base))[:3], *options) as model:
        loss = problem.loss(model)
        list(problem.fit(model, 1e-2, 10))
        assert problem.loss(model) < loss
    assert before.keys() == problem.base.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in problem.base.state_dict().items())


def test_pruned_adapters_have_the_losses_and_the_sizes_that_they_claim(problem, tmp_path):
    with problem.lora(list(adapted_modules(problem.base)), 4) as model:
        list(problem.fit(model, 1e-2, 10))
        whole = losses(problem, model)
        model.save_pretrained(tmp_path)
    with adapter(problem, tmp_path) as own:
        assert own.losses(own.all) == pytest.approx(whole, abs=1e-4)
        assert own.losses(own.none) == pytest.approx(losses(problem, problem.base), abs=1e-4)
        modules = functools.partial(own.units, "module")
        for rule in (own.attribution, own.rounds, own.singular_value, own.same_rank, own.random, modules):
            kept = rule(0.3)
            assert 0.2 < own.sizes[kept > 0].sum() / own.sizes.sum() <= 0.3
            assert sum(own.ranks(kept)) == kept.sum()


def test_selections_fit_their_budget():
    sizes = {f"m.layers.{i}.{name}": size for i in range(4) for name, size in (("q", 10), ("k", 3))}
    scores = {unit: float(i) for i, unit in enumerate(sizes)}
    assert modules_within(26, scores, sizes) == ["m.layers.3.k", "m.layers.3.q", "m.layers.2.k", "m.layers.2.q"]
    assert modules_within(7, scores, sizes) == ["m.layers.3.k", "m.layers.2.k"]
    assert layers_within(13, scores, sizes) == ["m.layers.3.q", "m.layers.3.k"]


@pytest.mark.parametrize("second", [False, True])
def test_every_arm_is_run_for_every_seed(second):
    """With figures made up, the study goes through all of its arms."""
    sizes = {f"m.layers.{i}.{name}": 10 for i in range(10) for name in "qk"}
    study = Study([], sizes, second)
    done: set[str] = set()
    while jobs := [job for job in study.jobs() if job.key not in done]:
        for job in jobs:
            done.add(job.key)
            names = {"base": ["KappaTune"], "untrained": ["untrained, 8 batches", "untrained, 16 batches"]}
            found = names.get(job.kind, ["full search"] if job.ranked else [])
            row = {**job.described(), "loss": 1 + job.learning_rate}
            study.add({**row, "scores": {name: list(range(len(sizes))) for name in found}})
    for group, sets, arms in ARMS_OF_SECOND if second else ARMS:
        for arm, data, seed in itertools.product(arms, sets, SEEDS):
            assert Job("tune", data, seed, arm, group, learning_rate=study.learning_rate(group)).key in done
    assert {job.split("|")[1] for job in done} == {"", *TUNING_SETS, *(ALIGNMENT if second else SETS)}


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


def test_a_claim_holds_or_not_by_two_standard_errors():
    for mean, error, floor, verdict in (
        (0.95, 0.02, None, "holds"),
        (0.91, 0.02, None, "no difference measured"),
        (0.89, 0.02, None, "no difference measured"),
        (0.80, 0.02, None, "does not hold"),
        (0.80, 0.02, 0.6, "partly"),
        (0.62, 0.02, 0.6, "does not hold"),
        (0.95, None, None, "too few runs"),
    ):
        claim = Claim("", "", lambda figures: None, 0.9, floor)
        assert claim.verdict(Estimate(mean, error, 9)) == verdict
        assert claim.verdict(Estimate(mean, error, 2)) == "too few runs"


def test_the_seeds_of_a_set_are_no_independent_runs():
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 4.0}
    found = estimate(values.get, [*values, ("b", 1)])
    assert (found.mean, found.error, found.runs) == (3.0, 1.0, 3)
    assert difference(values.get, {("a", 0): 0.5}.get, values) == Estimate(0.5, None, 1)
    assert estimate({}.get, values) is None


def test_a_learning_rate_is_chosen_on_the_first_halves_where_all_were_tried():
    def row(data, arm, share, *losses):
        return {"data": data, "seed": 0, "arm": arm, "share": share, "losses": losses, "tokens": [1, 1]}

    rows = [row(data, "base", 0.0, 2.0, 2.0) for data in "ab"] + [row(data, "whole", 1.0, 1.0, 1.0) for data in "ab"]
    rows += [row(data, "rank 1 at 0.1", 0.125, 1.4, 1.0) for data in "ab"]
    rows += [row("b", "rank 1 at 0.2", 0.125, 1.2, 1.5)]  # better on the first half of the set that has both
    figures = pruning_figures.Figures(rows, {"model": "m", "rank": 8, "units": {}})
    gained = figures.tuned("rank 1", 0.125)
    assert (gained(("a", 0)), gained(("b", 0))) == (None, 0.5)
    assert figures.tuned("rank 2", 0.25)(("a", 0)) is None


def test_the_tables_are_those_of_the_figures():
    for module, figures, names, paths in (
        (tables, Figures, ("study", "study_gemma"), ("docs/choosing.md", "docs/reproduction.md")),
        (
            pruning_tables,
            pruning_figures.Figures,
            ("pruning", "pruning_gemma", "pruning_r16", "pruning_r64"),
            (
                "README.md",
                "docs/choosing.md",
                "docs/reproduction.md",
                "docs/appendix/pruning.md",
                "docs/appendix/cost.md",
            ),
        ),
    ):
        models = [figures.load(Path("benchmarks/results") / name) for name in names]
        for path in paths:
            page, made_by = Path(path).read_text(encoding="utf-8"), f"{module.__name__.replace('.', '/')}.py"
            assert made_by in page
            assert tables.insert(page, models, module.TABLES, made_by) == page
