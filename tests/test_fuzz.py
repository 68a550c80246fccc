"""A sample of `python -m benchmarks.robustness.fuzz`: hostile input is refused, and nothing else happens."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.robustness import fuzz as harness
from benchmarks.robustness.fuzz import KINDS, Fuzz, Wrong, quiet
from peft_ila.export.adapters import read_adapter, save_adapter
from peft_ila.export.plain import export_adapter

CASES = {"ranking": 1200, "data": 400, "adapter weights": 200, "adapter configuration": 150, "command line": 80}


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input(fuzz, kind):
    @settings(
        max_examples=CASES.get(kind, 40),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 2**32))
    def run(seed):
        fuzz.case(kind, seed)

    with quiet():
        run()


def lose_a_module(tensors):
    for part in "AB":
        del tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"]


def lose_a_tensor(tensors):
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]


def scale_a_weight(tensors):
    tensors["base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"] *= 1.1


def invent_a_module(tensors):
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(2, 8)


def cut_a_weight(tensors):
    key = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"
    tensors[key] = tensors[key][:3].clone()


@pytest.mark.parametrize("adapter", ["soft", "hard"])
@pytest.mark.parametrize("damage", [lose_a_module, lose_a_tensor, scale_a_weight, invent_a_module, cut_a_weight])
def test_a_wrong_export_is_found(fuzz, tmp_path, monkeypatch, adapter, damage):
    def wrong(source, output):
        export_adapter(source, output)
        config, tensors = read_adapter(output)
        damage(tensors)
        save_adapter(tensors, config, output)

    with quiet():
        assert fuzz._export(fuzz.good / adapter, tmp_path)
        monkeypatch.setattr(harness, "export_adapter", wrong)
        with pytest.raises(Wrong):
            fuzz._export(fuzz.good / adapter, tmp_path)
