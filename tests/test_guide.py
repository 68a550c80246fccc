"""The recipe in the guide runs."""

import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from peft import get_peft_model

from peft_ila import ILAConfig

GUIDE = (Path(__file__).parent.parent / "docs" / "guide.md").read_text(encoding="utf-8")


@pytest.mark.support("Trainers", "plain PyTorch loop")
def test_a_plain_loop(input_ids):
    (recipe,) = re.findall(r"## A plain loop\n+```python\n(.*?)```", GUIDE, flags=re.S)
    model = get_peft_model(tiny_llama(), ILAConfig(target_modules=["q_proj"], init_lora_weights=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {
        "model": model,
        "torch": torch,
        "penalty": 0.0,  # these deltas are random: any pressure is greater than what they are worth
        "loader": [{"input_ids": input_ids, "labels": input_ids}] * 3,
    }
    exec(recipe, names)
    assert names["importance"].units == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert len(set(names["importance"].scores)) == 3
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) == 3 and all("lora_gate" in name for name in moved)
    assert model.peft_config["default"].gate_mode == "open"
