"""What a memory budget selects against all selections there are, each counted."""

import itertools

import numpy
import pytest
import torch
from models import SMALL, ranked
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from peft_ila import LayerImportance
from peft_ila.export.skeleton import meta_skeleton
from peft_ila.measure import saved_tensor_bytes
from peft_ila.workflows.budget import additive, select_within, size_in_bytes
from peft_ila.workflows.plan import Step, plan

CONFIGS = {
    "llama": LlamaConfig(**{**SMALL, "hidden_size": 64, "vocab_size": 512, "num_hidden_layers": 4}),
    "gpt2": GPT2Config(n_embd=64, n_layer=4, n_head=4, vocab_size=512, bos_token_id=1, eos_token_id=1),
}
STEP = {"batch_size": 2, "max_length": 64, "gradient_checkpointing": False}


def ranking(name, scores, method="attribution", granularity="layer", **options) -> LayerImportance:
    importance = ranked(AutoModelForCausalLM.from_config(CONFIGS[name]), granularity, **options)
    importance.scores = list(scores)[: len(importance.units)]
    importance.metadata["learn_gates"] = {"method": method}
    return importance


def needs(name, importance, selections=None, checkpointing=False) -> dict[frozenset, int]:
    """The bytes of these selections, or of all."""
    step = Step(meta_skeleton(CONFIGS[name]), 2, 64, False, checkpointing, torch.bfloat16)
    if selections is None:
        sizes = range(1, len(importance.units) + 1)
        selections = [s for size in sizes for s in itertools.combinations(importance.units, size)]
    return {frozenset(s): step.memory(importance.to_lora_config(units=s, r=8)).total for s in selections}


@pytest.fixture(scope="module")
def of_llama() -> dict[frozenset, int]:
    return needs("llama", ranking("llama", [0.0] * 4))


def best(needed, worth, budget) -> float:
    return max(sum(worth[unit] for unit in s) for s, total in needed.items() if total <= budget)


@pytest.mark.support("Operations", "`select_within`, `--memory_budget`: the selection that fits into a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_other_selection_of_layers_that_fits_is_more_important(name, checkpointing):
    importance = ranking(name, [1.3, -0.8, 0.4, -0.1])
    worth = dict(zip(importance.units, [2.3, 0.2, 1.4, 0.9]))
    needed = needs(name, importance, None, checkpointing)
    totals = sorted(needed.values())
    for budget in (totals[6], totals[9] + 1, totals[-1] - 1):
        options = {**STEP, "gradient_checkpointing": checkpointing, "r": 8}
        selected = select_within(CONFIGS[name], importance, budget, **options)
        assert needed[frozenset(selected)] <= budget
        assert sum(worth[unit] for unit in selected) == pytest.approx(best(needed, worth, budget))
        assert selected == [unit for unit in importance.ranking() if unit in selected]


def test_several_high_layers_take_the_place_of_a_low_one(of_llama):
    importance = ranking("llama", [1.0, 0.5, 0.5, -0.99])
    first, second, third, fourth = importance.units
    budget = of_llama[frozenset({second, third})]
    assert of_llama[frozenset({first})] <= budget < of_llama[frozenset({first, fourth})]
    assert importance.select(top_k=1) == [first]  # the most important one alone would fit
    assert set(select_within(CONFIGS["llama"], importance, budget, **STEP, r=8)) == {second, third}
    budget = of_llama[frozenset({first, second, third})]
    assert set(select_within(CONFIGS["llama"], importance, budget, **STEP, r=8)) == {first, second, third}


def test_the_step_counts(of_llama):
    importance = ranking("llama", [0.0] * 4)
    budget = of_llama[frozenset(importance.units)]
    assert len(select_within(CONFIGS["llama"], importance, budget, **STEP, r=8)) == 4
    for more in ({"max_length": 72}, {"batch_size": 3}, {"r": 32}, {"dtype": torch.float32}):
        with pytest.raises(ValueError, match="too small"):
            step = {**STEP, "r": 8, **more}
            select_within(CONFIGS["llama"], importance, min(of_llama.values()), **step)
        assert len(select_within(CONFIGS["llama"], importance, budget, **{**STEP, "r": 8, **more})) < 4
    smaller = {**STEP, "batch_size": 3, "gradient_checkpointing": True}
    assert len(select_within(CONFIGS["llama"], importance, budget, **smaller, r=8)) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast_what_it_keeps_is_counted(dtype):
    lora = ranking("llama", [0.0, 0.0, -1.0, -1.0]).to_lora_config(top_k=2, r=8)
    model = get_peft_model(AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=dtype), lora).train()
    ids = torch.zeros(2, 64, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_tensor_bytes(model, lambda: model(input_ids=ids, labels=ids).loss)
        counted = Step(meta_skeleton(CONFIGS["llama"]), 2, 64, False, False, dtype).memory(lora)
    gradients_of_logits = 2 * (2 * 64 * 512 * 4)
    assert counted.activations + counted.logits - gradients_of_logits == kept


@pytest.mark.parametrize(
    "method, scores, expected",
    [
        ("attribution", [3.0, -1.2, -1.0, -0.9], [0, 3]),  # negative shares, and none, are not selected
        ("untrained", [3.0, -0.9, 1.0, -0.8], [0, 2, 3, 1]),
        ("descent", [3.0, -1.2, -1.0, -0.9], [0, 3, 2, 1]),  # gates are positive
    ],
)
def test_what_has_importance_is_selected_where_there_is_room(method, scores, expected):
    importance = ranking("llama", scores, method)
    selected = select_within(CONFIGS["llama"], importance, "24GB", **STEP, r=8)
    assert selected == [importance.units[position] for position in expected]


def test_of_a_mean_the_least_unit_counts_as_nothing():
    importance = ranking("llama", [3.0, -1.2, -1.0, -0.9])
    mean = LayerImportance.mean([importance, importance])
    selected = select_within(CONFIGS["llama"], mean, "24GB", **STEP, r=8)
    assert selected == [mean.units[position] for position in (0, 3, 2)]
    expected = numpy.array(importance.scores) + 1.2
    assert additive(mean) == pytest.approx(expected / numpy.std(importance.scores))


def test_modules_are_at_least_as_important_as_the_best_that_fit():
    scores = [0.9, 0.1, -0.5, 1.6, 0.3, -0.2, -0.7, 0.6]
    importance = ranking("llama", scores, granularity="module", target_modules=["q_proj", "down_proj"])
    worth = {unit: score + 1 for unit, score in zip(importance.units, scores)}
    by_score = [importance.select(top_k=number) for number in range(1, 9)]
    needed = needs("llama", importance, by_score)
    for budget in sorted(needed.values())[1::3]:
        selected = select_within(CONFIGS["llama"], importance, budget, **STEP, r=8)
        assert needs("llama", importance, [selected])[frozenset(selected)] <= budget
        assert sum(worth[unit] for unit in selected) >= best(needed, worth, budget)


def test_more_than_adapters_is_not_counted():
    with pytest.raises(ValueError, match="Only adapters are counted, but .*lm_head.* is also trainable"):
        importance = ranking("llama", [0.0] * 4)
        select_within(CONFIGS["llama"], importance, "24GB", **STEP, modules_to_save=["lm_head"])


def test_what_cannot_be_selected(of_llama):
    importance = ranking("llama", [0.0] * 4)
    least = min(of_llama.values())
    assert select_within(CONFIGS["llama"], importance, least, **STEP, r=8) == [importance.units[-1]]
    message = (
        rf"A memory budget of {(least - 1) / 1e9:.3g} GB is too small: the frozen model takes \S+ GB, and tuning one "
        rf"unit \(model.layers.3\) takes {least / 1e9:.3g} GB in all"
    )
    with pytest.raises(ValueError, match=message):
        select_within(CONFIGS["llama"], importance, least - 1, **STEP, r=8)
    with pytest.raises(ValueError, match="another architecture"):
        select_within(CONFIGS["gpt2"], importance, "24GB")
    with pytest.raises(ValueError, match="no unit of positive importance"):
        select_within(CONFIGS["llama"], ranking("llama", [-1.0] * 4), "24GB")
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 1024"):
        select_within(CONFIGS["llama"], importance, "24GB", batch_size=0)


def test_the_step_is_that_of_plan_by_default():
    importance = ranking("llama", [0.0] * 4)
    total = plan(CONFIGS["llama"], importance, shares=(1.0,))["100%"].total
    assert len(select_within(CONFIGS["llama"], importance, total)) == 4
    assert len(select_within(CONFIGS["llama"], importance, total - 1)) == 3


def test_sizes():
    sizes = {"24GB": 24 * 10**9, "24gb": 24 * 10**9, "1.5 GiB": 3 * 2**29, "24000000000": 24 * 10**9, 7: 7}
    assert {size: size_in_bytes(size) for size in sizes} == sizes


@pytest.mark.parametrize("size", ["much", "", "GB", "-1GB", "nanGB", "infGB", "24TB", -5, 2.5])
def test_no_sizes(size):
    with pytest.raises(ValueError, match="must be a size such as '24GB', '24GiB' or a number of bytes, got"):
        size_in_bytes(size)
