"""The whole of the search as a function, on a trainer of one's own."""

import json

import pytest
import torch
from conftest import tiny_llama
from peft import PeftModel
from trainers import plain_trainer, sft_trainer

from peft_ila import EpsilonStability, LayerImportance, rank


@pytest.mark.support("Operations", "`peft-ila rank` as a function, `workflows.rank.rank`")
@pytest.mark.parametrize("make", [plain_trainer, sft_trainer])
def test_both_stages_and_their_files(tmp_path, tokenizer, dialogues, make):
    trainer = make(tmp_path, tokenizer, dialogues)
    importance = rank(trainer, EpsilonStability(0.5, 1, 1), metadata={"mine": 1}, steps=4)
    assert trainer.state.global_step < 40
    assert importance.metadata["stage_1"] == {"steps": trainer.state.global_step, "stable": True}
    assert importance.metadata["mine"] == 1
    assert LayerImportance.load(tmp_path / "importance.json") == importance
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "adapter",
        "importance.json",
        "importance.png",
        "_run.json",
    }
    adapter = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert adapter.layer_importance().scores == importance.scores
    assert "## Layer importance" in (tmp_path / "adapter" / "README.md").read_text()
    for name in ("importance.json", "importance.png"):  # the card has them too
        assert (tmp_path / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_the_trainers_own_stability_is_taken(tmp_path, tokenizer, dialogues):
    own = EpsilonStability(0.5, 1, 1)
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, callbacks=[own])
    assert rank(trainer, steps=4).metadata["stage_1"]["steps"] == own.stopped_at


def test_an_adapter_is_ranked_as_it_is_and_by_descent(tmp_path, tokenizer, dialogues):
    adapter = str(tmp_path / "first" / "adapter")
    first = rank(sft_trainer(tmp_path / "first", tokenizer, dialogues, max_steps=6), method="attribution", steps=4)
    again = rank(sft_trainer(tmp_path / "second", tokenizer, dialogues), adapter=adapter, steps=4)
    assert again.scores == first.scores
    assert again.metadata["stage_1"] == {"adapter": adapter}
    assert json.loads((tmp_path / "second" / "adapter" / "stage_1.json").read_text()) == again.metadata["stage_1"]
    trainer = sft_trainer(tmp_path / "third", tokenizer, dialogues)
    descent = rank(trainer, adapter=adapter, method="descent", budget=1, steps=8)
    assert descent.metadata["learn_gates"]["budget"] == 1
    assert LayerImportance.load(tmp_path / "third" / "importance.json") == descent


def test_the_seed_of_the_search(tmp_path, tokenizer, dialogues):
    rankings = [
        rank(sft_trainer(tmp_path / str(seed), tokenizer, dialogues), method="untrained", steps=4, seed=seed)
        for seed in (7, 8)
    ]
    assert [ranking.metadata["learn_gates"]["seed"] for ranking in rankings] == [7, 8]
    assert rankings[0].scores != rankings[1].scores


def test_metadata_that_cannot_be_written(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues)
    with pytest.raises(TypeError, match="PosixPath is not JSON serializable"):
        rank(trainer, metadata={"data": tmp_path})
    assert trainer.state.global_step == 0


def test_bad_settings_are_found_before_any_work(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match="`budget` must be a whole number of units from 1"):
        rank(trainer, method="descent", budget=0)
    with pytest.raises(ValueError, match=r"\['budget'\] are settings of `method=\"descent\"`"):
        rank(trainer, budget=0.3)
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
