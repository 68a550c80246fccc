"""A memory budget selects as much of the ranking as fits."""

import pytest
import torch
from models import SMALL, ranked
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from peft_ila.export.skeleton import meta_skeleton
from peft_ila.workflows.budget import select_within, size_in_bytes
from peft_ila.workflows.plan import Step

CONFIG = LlamaConfig(**{**SMALL, "hidden_size": 64, "vocab_size": 512, "num_hidden_layers": 3})
STEP = {"batch_size": 2, "max_length": 64, "load_in_4bit": True, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def importance():
    importance = ranked(AutoModelForCausalLM.from_config(CONFIG), "layer")
    importance.scores = [1.3, -1.8, 0.4]
    return importance


@pytest.fixture(scope="module")
def totals(importance):
    """The bytes of tuning the most important layer, and the two most important ones."""
    step = Step(meta_skeleton(CONFIG), *STEP.values(), torch.float32)
    return [step.memory(importance.to_lora_config(top_k=number, r=8)).total for number in (1, 2)]


@pytest.mark.support("Operations", "`select_within`, `--memory_budget`: the selection that fits into a GPU")
def test_as_much_of_the_ranking_as_fits_is_selected(importance, totals):
    assert importance.ranking() == [importance.units[0], importance.units[2], importance.units[1]]
    for budget, number in ((totals[1] - 1, 1), (totals[1], 2), ("24GB", 3)):
        selected = select_within(CONFIG, importance, budget, **STEP, dtype=torch.float32, r=8)
        assert selected == importance.ranking()[:number]


def test_what_cannot_be_selected(importance, totals):
    message = (
        rf"A memory budget of {(totals[0] - 1) / 1e9:.3g} GB is too small: the frozen model takes \S+ GB, and tuning "
        rf"one unit \(model.layers.0\) takes {totals[0] / 1e9:.3g} GB in all"
    )
    with pytest.raises(ValueError, match=message):
        select_within(CONFIG, importance, totals[0] - 1, **STEP, dtype=torch.float32, r=8)
    with pytest.raises(ValueError, match="another architecture"):
        select_within(GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=512), importance, "24GB")
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 1024"):
        select_within(CONFIG, importance, "24GB", batch_size=0)
    with pytest.raises(ValueError, match="Only adapters are counted, but .*lm_head.* is also trainable"):
        select_within(CONFIG, importance, "24GB", **STEP, modules_to_save=["lm_head"])


def test_sizes():
    sizes = {"24GB": 24 * 10**9, "24gb": 24 * 10**9, "1.5 GiB": 3 * 2**29, "24000000000": 24 * 10**9, 7: 7}
    assert {size: size_in_bytes(size) for size in sizes} == sizes


@pytest.mark.parametrize("size", ["much", "", "GB", "-1GB", "nanGB", "infGB", "24TB", -5, 2.5])
def test_no_sizes(size):
    with pytest.raises(ValueError, match="must be a size such as '24GB', '24GiB' or a number of bytes, got"):
        size_in_bytes(size)
