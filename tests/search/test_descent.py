"""The paper's own method, against a loop of one's own in mode "soft"."""

import logging

import pytest
import torch
from trainers import lora_weights, plain_trainer, sft_trainer, trained_ila

from peft_ila import learn_gates
from peft_ila.search.descent import Descent


@pytest.fixture
def trainer(tmp_path, tokenizer, dialogues):
    """Each batch is the whole data set, so that their order does not matter."""
    return plain_trainer(tmp_path, tokenizer, dialogues, trained_ila(), per_device_train_batch_size=48)


def by_hand(trainer, steps, start, learning_rate):
    model, batch = trainer.model, trainer.data_collator(list(trainer.train_dataset))
    model.set_gate_mode("soft")
    model.eval()
    scores = [gate.weight for gate in model.gates().values()]
    for score in scores:
        score.data.fill_(start)
    adam = torch.optim.Adam(scores, lr=learning_rate)
    for _ in range(steps):
        model(**batch).loss.backward()
        adam.step()
        adam.zero_grad()
    return [score.item() for score in scores]


@pytest.mark.support("Search", 'method="descent", with and without a budget')
@pytest.mark.parametrize("settings", [{}, {"initial_score": 1.0, "learning_rate": 0.3}])
def test_descends_on_the_scores_alone(trainer, input_ids, settings):
    model = trainer.model
    before, outputs = lora_weights(model), model.eval()(input_ids).logits
    importance = learn_gates(trainer, method="descent", steps=6, **settings)
    for name, value in lora_weights(model).items():
        assert torch.equal(value, before[name])
    assert torch.equal(model.eval()(input_ids).logits, outputs)
    assert model.peft_config["default"].gate_mode == "open"
    assert model.layer_importance().scores == importance.scores
    assert importance.gates == pytest.approx(torch.tensor(importance.scores).sigmoid().tolist())
    assert importance.spread == []
    found = importance.metadata["learn_gates"]
    start, rate = settings.get("initial_score", 4.0), settings.get("learning_rate", 0.1)
    assert (found["method"], found["steps"], found["steps_taken"], found["budget"]) == ("descent", 6, 6, None)
    assert (found["initial_score"], found["learning_rate"]) == (start, rate)
    assert found["loss_closed"] > found["loss_open"]
    assert found["mean_gate"] == pytest.approx(sum(importance.gates) / 3)
    assert importance.scores == pytest.approx(by_hand(trainer, 6, start, rate), abs=1e-4)


def test_the_mean_gate_comes_to_the_budget(tmp_path, tokenizer, dialogues, caplog):
    importance = learn_gates(
        plain_trainer(tmp_path, tokenizer, dialogues, trained_ila()), method="descent", budget=0.4
    )
    assert importance.metadata["learn_gates"]["steps"] == 128
    assert importance.metadata["learn_gates"]["budget"] == 0.4
    assert sum(importance.gates) / 3 == pytest.approx(0.4, abs=0.05)
    assert not caplog.records


def test_a_budget_that_is_not_reached_is_said(trainer, caplog):
    with caplog.at_level(logging.WARNING, logger="peft_ila"):
        learn_gates(trainer, method="descent", budget=0.3, steps=4)
    assert "The mean gate is 0.97 after 4 steps, not at the budget of 0.30" in caplog.text


@pytest.mark.parametrize("budget", [None, 1])
def test_the_layer_that_was_tuned_wins(tmp_path, tokenizer, dialogues, budget):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, learning_rate=5e-3, max_steps=20)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name and ".layers.1." not in name:
            parameter.data.zero_()
    importance = learn_gates(trainer, method="descent", budget=budget, steps=64)
    assert importance.select(top_k=1) == ["model.layers.1"]
    if budget is None:
        assert importance.scores[0] == importance.scores[2] == 4.0  # no gradient, no pressure
    else:
        assert importance.gates[1] > 0.8 > 0.2 > max(importance.gates[0], importance.gates[2])


def test_a_failure_gives_the_scores_back(trainer):
    before = trainer.model.base_model.layer_importance().scores
    compute_loss, calls = trainer.compute_loss, []

    def broken(*args, **kwargs):
        calls.append(1)
        return compute_loss(*args, **kwargs) * (float("nan") if len(calls) > 9 else 1.0)

    trainer.compute_loss = broken
    with pytest.raises(ValueError, match="The gradient of the gates is not finite"):
        learn_gates(trainer, method="descent", steps=8)
    assert trainer.model.base_model.layer_importance().scores == before


def test_the_pressure_finds_the_best_units_of_a_known_loss():
    """A loss that is linear in the gates: the budget keeps those of the steepest slope."""

    class Linear:
        def gradient(self, step, scores):
            gates = torch.sigmoid(scores)
            return -torch.arange(1.0, 11) * gates * (1 - gates), 0.0

    descent = Descent(10, 128, budget=3)
    while not descent.finished:
        descent.step(Linear(), None)
    scores, _, facts = descent.result()
    assert sorted(range(10), key=lambda i: -scores[i])[:3] == [9, 8, 7]
    assert facts["mean_gate"] == pytest.approx(0.3, abs=0.05)
