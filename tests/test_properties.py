"""What must hold for any scores, masks and rankings."""

import math

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from peft_ila import ILAConfig, LayerImportance

IDS = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["layer", "module"])
def model(request):
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model = get_peft_model(tiny_llama().double(), ILAConfig(**options, granularity=request.param)).double()
    return model.eval()


@given(scores=st.lists(st.floats(-4, 4), min_size=3, max_size=3), position=st.integers(0, 2))
def test_the_gradient_of_each_gate_is_the_slope_of_the_loss(scores, position):
    torch.manual_seed(0)  # a network that is float64 throughout; Llama's norms are not
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    config = ILAConfig(r=2, target_modules=["0", "2", "4"], init_lora_weights=False, gate_mode="soft")
    model = get_peft_model(network, config).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    gates = list(model.gates().values())
    for gate, score in zip(gates, scores):
        gate.weight.data.fill_(score)
    model(x).square().mean().backward()
    slopes = []
    with torch.no_grad():
        for step in (1e-5, -1e-5):
            gates[position].weight += step
            slopes.append(float(model(x).square().mean()))
            gates[position].weight -= step
    assert gates[position].weight.grad.item() == pytest.approx((slopes[0] - slopes[1]) / 2e-5, rel=1e-5, abs=1e-9)


@torch.no_grad()
def test_the_ends_of_every_mode(model):
    model.set_gate_mode("open")
    opened = model(IDS).logits
    with model.disable_adapter():
        base = model(IDS).logits
    model.set_gate_mode("soft")
    for gate in model.gates().values():
        gate.weight.fill_(1e3)
    assert torch.equal(model(IDS).logits, opened)  # σ(s) is 1 in floating point
    for gate in model.gates().values():
        gate.weight.fill_(-1e3)
    assert torch.equal(model(IDS).logits, base)
    model.apply_mask(list(model.gates()))
    assert torch.equal(model(IDS).logits, opened)
    for gate in model.gates().values():
        gate.state = "closed"
    assert torch.equal(model(IDS).logits, base)


rankings = st.lists(st.floats(-30, 30), min_size=1, max_size=40, unique=True).map(
    lambda scores: LayerImportance([f"layers.{i}" for i in range(len(scores))], scores)
)


@given(importance=rankings, random=st.randoms(use_true_random=False))
def test_a_ranking_does_not_depend_on_the_order_of_the_units(importance, random):
    order = list(range(len(importance.units)))
    random.shuffle(order)
    shuffled = LayerImportance([importance.units[i] for i in order], [importance.scores[i] for i in order])
    assert shuffled.ranking() == importance.ranking()
    assert shuffled.overlap(importance) == 1
    assert math.isnan(importance.spearman(shuffled)) or importance.spearman(shuffled) == pytest.approx(1)


@given(importance=rankings, shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_selections_are_nested(importance, shares):
    low, high = sorted(shares)
    small, large = importance.select(top_p=low), importance.select(top_p=high)
    assert small == large[: len(small)] and len(importance.select(top_p=1.0)) == len(importance.units)


@given(importance=rankings, thresholds=st.tuples(st.floats(0, 0.4), st.floats(0, 0.4)))
def test_a_higher_threshold_selects_less(importance, thresholds):
    low, high = sorted(thresholds)
    if max(importance.gates) >= high:
        assert set(importance.select(threshold=high)) <= set(importance.select(threshold=low))
