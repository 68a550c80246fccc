"""The recipes in the pages of docs/ run."""

import math
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from peft import get_peft_model
from trainers import ila, options, plain_trainer
from transformers import Trainer, TrainingArguments

from peft_ila import ILAConfig

DOCS = Path(__file__).parent.parent / "docs"


def recipe(page: str) -> str:
    """The last one of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)[-1]


@pytest.mark.support("Trainers", "plain PyTorch loop")
def test_a_plain_loop(input_ids):
    model = get_peft_model(tiny_llama(), ILAConfig(target_modules=["q_proj"], init_lora_weights=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {
        "model": model,
        "torch": torch,
        "penalty": 0.0,  # these deltas are random: any pressure is greater than what they are worth
        "loader": [{"input_ids": input_ids, "labels": input_ids}] * 3,
    }
    exec(recipe("howto/loop.md"), names)
    assert names["importance"].units == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert len(set(names["importance"].scores)) == 3
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) == 3 and all("lora_gate" in name for name in moved)
    assert model.peft_config["default"].gate_mode == "open"


def test_dpo(tmp_path, monkeypatch, tokenizer, dialogues):
    monkeypatch.chdir(tmp_path)
    rejected = [{"role": "assistant", "content": "w1 w2 w1 w2"}]
    rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected} for row in dialogues]
    names = {"model": ila(), "preferences": Dataset.from_list(rows), "tokenizer": tokenizer}
    exec(recipe("howto/dpo.md").replace("max_steps=10", "max_steps=10, learning_rate=1e-2"), names)
    assert len(set(names["importance"].scores)) == 3
    assert names["importance"].metadata["learn_gates"]["loss_closed"] == pytest.approx(math.log(2), abs=1e-4)


def test_full_fine_tuning(tmp_path, monkeypatch, input_ids):
    monkeypatch.chdir(tmp_path)
    importance = ila().base_model.layer_importance()
    importance.scores = [0.0, 2.0, 1.0]
    (tmp_path / "OUT").mkdir()
    importance.save(tmp_path / "OUT" / "importance.json")
    model = tiny_llama()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": ids, "labels": ids} for ids in input_ids.tolist()]
    trainer = Trainer(model=model, args=TrainingArguments(**options(tmp_path, max_steps=2)), train_dataset=rows)
    names = {"model": model, "trainer": trainer}
    exec(recipe("howto/full.md"), names)
    still = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert still == set(names["frozen"]) != set()
    assert {name[:15] for name in before.keys() - still} == {"model.layers.1.", "model.layers.2."}


def test_4_bit(tmp_path, tokenizer, dialogues):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64).save_pretrained(tmp_path)
    names = {"name": str(tmp_path)}
    exec(recipe("quickstart.md"), names)
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=names["model"], max_steps=2)
    trainer.train()
    assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)
    assert names["model"].base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8
