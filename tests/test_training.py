import logging
import math

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

import peft_ila.attribution
from peft_ila import EpsilonStability, ILAConfig, LayerImportance, learn_gates
from peft_ila.attribution import GateAttribution
from peft_ila.training import measure_losses

# ---------------------------------------------------------------------------------------------------------------------
# EpsilonStability
# ---------------------------------------------------------------------------------------------------------------------


def stop_step(losses, **settings):
    """Feed logged losses to the callback; the index of the loss at which it stops, or None."""
    callback = EpsilonStability(**settings)
    args = TrainingArguments(output_dir="unused", logging_steps=1, report_to="none", use_cpu=True)
    state, control = TrainerState(max_steps=len(losses), logging_steps=1), TrainerControl()
    callback.on_train_begin(args, state, control)
    for step, loss in enumerate(losses):
        state.global_step = step
        callback.on_log(args, state, control, logs={"loss": loss})
        if control.should_training_stop:
            assert callback.stopped_at == step
            return step
    return None


def test_stops_when_the_smoothed_loss_settles():
    falling = [2.0 - 0.1 * i for i in range(10)]
    # window 3: the six last losses are all 1.1 from index 14 on, the two means then differ by 0
    assert stop_step([*falling, *[1.1] * 20], epsilon=1e-6, window=3, patience=1) == 14
    assert stop_step([*falling, *[1.1] * 20], epsilon=1e-6, window=3, patience=4) == 17
    assert stop_step(falling, epsilon=0.01, window=3, patience=1) is None


def test_noise_is_smoothed_and_patience_starts_anew():
    noisy = [1.0 + (0.5 if i % 2 else -0.5) for i in range(20)]
    assert stop_step(noisy, epsilon=0.01, window=2, patience=1) == 3
    assert stop_step(noisy, epsilon=0.01, window=1, patience=1) is None
    # one jump resets the count
    assert stop_step([1, 1, 1, 5, 5, 5, 5, 5], epsilon=0.1, window=1, patience=3) == 6


def test_a_rising_loss_is_not_stable():
    assert stop_step([1.0 + 0.1 * i for i in range(20)], epsilon=0.05, window=2, patience=1) is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(loss):
    with pytest.raises(ValueError, match=f"loss is {loss} at step 2; training has diverged"):
        stop_step([1.0, 1.0, loss], epsilon=0.1, window=1, patience=9)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"epsilon": 0.0}, "`epsilon` must be greater than 0, got 0.0"),
        ({"epsilon": math.nan}, "`epsilon` must be greater than 0, got nan"),
        ({"window": 0}, "`window` must be a whole number of at least 1, got 0"),
        ({"patience": 1.5}, "`patience` must be a whole number of at least 1, got 1.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        EpsilonStability(**settings)


def test_a_new_run_starts_anew_and_a_resumed_one_goes_on():
    args = TrainingArguments(output_dir="unused", logging_steps=1, report_to="none", use_cpu=True)
    history = [{"loss": 1.0, "step": step} for step in range(3)] + [{"eval_loss": 9.0, "step": 2}]
    callback = EpsilonStability(epsilon=0.1, window=2, patience=1)
    for log_history, stopped_at in ((history, 3), ([], None)):
        state, control = TrainerState(max_steps=9, global_step=3, log_history=log_history), TrainerControl()
        callback.on_train_begin(args, state, control)
        callback.on_log(args, state, control, logs={"loss": 1.0})
        assert callback.stopped_at == stopped_at


# ---------------------------------------------------------------------------------------------------------------------
# Trainers
# ---------------------------------------------------------------------------------------------------------------------


def ila(mode="open", granularity="layer", model=None, **kwargs):
    torch.manual_seed(1)
    config = ILAConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", granularity=granularity, gate_mode=mode, **kwargs
    )
    return get_peft_model(model or tiny_llama(), config)


def options(tmp_path, **kwargs):
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "max_steps": 40,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        **kwargs,
    }


def sft_trainer(tmp_path, tokenizer, dialogues, model=None, callbacks=(), **kwargs) -> SFTTrainer:
    return SFTTrainer(
        model=model or ila(),
        args=SFTConfig(**{"bf16": False, **options(tmp_path, **kwargs)}),
        train_dataset=Dataset.from_list(dialogues),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def plain_trainer(tmp_path, tokenizer, dialogues, model=None, **kwargs) -> Trainer:
    rows = []
    for row in dialogues:
        messages = row["prompt"] + row["completion"]
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)})
    return Trainer(model=model or ila(), args=TrainingArguments(**options(tmp_path, **kwargs)), train_dataset=rows)


def lora_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}


def test_stability_stops_a_trainer_without_evaluation_data(tmp_path, tokenizer, dialogues, caplog):
    callback = EpsilonStability(epsilon=0.1, window=3, patience=2)
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, callbacks=[callback], max_steps=400)
    with caplog.at_level(logging.INFO, logger="peft_ila"):
        trainer.train()
    assert trainer.state.global_step == callback.stopped_at < 400
    assert f"Training is stable at step {callback.stopped_at}" in caplog.text
    assert "stable for 2 of 2 (epsilon 0.1)" in caplog.text
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    last, before = losses[-3:], losses[-6:-3]
    assert abs(sum(last) - sum(before)) / 3 < 0.1


def test_stability_says_when_it_was_not_reached(tmp_path, tokenizer, dialogues, caplog):
    trainer = sft_trainer(
        tmp_path, tokenizer, dialogues, callbacks=[EpsilonStability(epsilon=1e-9, window=20)], max_steps=4
    )
    trainer.train()
    assert "needs 42 steps to decide" in caplog.text
    assert "Training ended at step 4 before it was stable" in caplog.text


def test_a_diverging_trainer_is_stopped_although_the_trainer_filters_nan(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, max_steps=10)
    trainer.add_callback(EpsilonStability())
    next(p for name, p in trainer.model.named_parameters() if "down_proj.lora_A" in name).data.fill_(math.nan)
    with pytest.raises(ValueError, match="loss is nan at step 1"):
        trainer.train()


def test_stability_needs_logging(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, callbacks=[EpsilonStability()], logging_strategy="no")
    with pytest.raises(ValueError, match='`logging_strategy` must not be "no"'):
        trainer.train()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(sft_trainer, marks=pytest.mark.support("Trainers", "TRL `SFTTrainer`")),
        pytest.param(plain_trainer, marks=pytest.mark.support("Trainers", "transformers `Trainer`")),
    ],
)
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_both_stages(tmp_path, tokenizer, dialogues, input_ids, make, granularity):
    trainer = make(tmp_path, tokenizer, dialogues, model=ila(granularity=granularity))
    trainer.train()
    model = trainer.model
    before, outputs = lora_weights(model), model.eval()(input_ids).logits
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    logs, step = len(trainer.state.log_history), trainer.state.global_step

    importance = learn_gates(trainer, steps=12)

    assert isinstance(importance, LayerImportance)
    assert len(importance.units) == (3 if granularity == "layer" else 21)
    assert len(set(importance.scores)) == len(importance.scores)
    for name, value in lora_weights(model).items():
        assert torch.equal(value, before[name])
    assert torch.equal(model.eval()(input_ids).logits, outputs)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert (len(trainer.state.log_history), trainer.state.global_step) == (logs, step)
    assert not list(tmp_path.glob("checkpoint*"))
    importance.save(tmp_path / "importance.json")
    assert LayerImportance.load(tmp_path / "importance.json") == importance
    settings = importance.metadata["learn_gates"]
    assert settings["steps"] == 12 and settings["seed"] == trainer.args.seed
    assert settings["loss_closed"] > settings["loss_open"]
    assert len(importance.spread) == len(importance.units) and all(spread > 0 for spread in importance.spread)
    # the model can be used on: masked, trained further, saved
    model.apply_mask(importance.select(top_k=1))
    model.save_pretrained(tmp_path / "adapter")
    trainer.train()


def test_same_seed_same_scores(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues)
    trainer.train()
    first, second = (learn_gates(trainer, steps=5, seed=3) for _ in range(2))
    assert first.scores == second.scores
    assert learn_gates(trainer, steps=5, seed=4).scores != first.scores


def gradients_at(model, batch, gamma):
    """∂L/∂γ of each unit with all gates at γ, by plain LoRA whose B is multiplied by a leaf tensor."""
    gates = {unit: torch.tensor(gamma, requires_grad=True) for unit in model.gates()}
    model.set_gate_mode("open")
    weights = {}
    for name, parameter in model.named_parameters():
        (gate,) = [gates[unit] for unit in gates if f".{unit}." in name] or [None]
        weights[name] = parameter.detach() * gate if gate is not None and "lora_B" in name else parameter.detach()
    torch.func.functional_call(model, weights, kwargs=dict(batch)).loss.backward()
    return torch.stack([gate.grad for gate in gates.values()])


@pytest.mark.parametrize("steps", [4, 10])
def test_the_scores_are_what_each_unit_is_worth_at_the_base_model(tmp_path, tokenizer, dialogues, steps):
    """Against an independent reference; each batch is the whole data set, so that their order does not matter."""
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, per_device_train_batch_size=len(dialogues))
    trainer.train()
    importance = learn_gates(trainer, steps=steps)
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.eval()
    worth = -gradients_at(trainer.model, batch, 0.0)
    torch.testing.assert_close(torch.tensor(importance.scores), worth / worth.mean() - 1, rtol=1e-4, atol=1e-4)
    assert importance.spread == pytest.approx([0.0] * 3 if steps == 10 else [], abs=1e-3)  # the batches do not differ
    assert importance.metadata["learn_gates"]["attributed"] == pytest.approx(worth.sum().item(), rel=1e-4)


def test_deltas_that_raise_the_loss_at_first_cannot_be_ranked(tmp_path, tokenizer, dialogues, monkeypatch):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.neg_()
    monkeypatch.setattr("peft_ila.training.measure_losses", lambda trainer, batches: (4.0, 3.0))
    with pytest.raises(ValueError, match="a small part of it raises the loss: the attributions add up to -"):
        learn_gates(trainer, steps=4)
    assert set(trainer.model.base_model.layer_importance().scores) == {4.0}


def test_stops_when_the_ranking_has_settled(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, learning_rate=5e-3)
    trainer.train()
    settled = learn_gates(trainer, steps=60, min_agreement=0.9)
    taken = settled.metadata["learn_gates"]["steps_taken"]
    assert 16 <= taken < 60 and taken % 4 == 0
    assert learn_gates(trainer, steps=taken, min_agreement=None).scores == settled.scores
    everything = learn_gates(trainer, steps=60, min_agreement=None)
    assert everything.metadata["learn_gates"]["steps_taken"] == 60
    assert everything.ranking() == settled.ranking()


def test_a_ranking_that_does_not_settle_ends_at_the_cap(tmp_path, tokenizer, dialogues, monkeypatch):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, learning_rate=5e-3)
    trainer.train()
    monkeypatch.setattr("peft_ila.attribution.agreement", lambda samples: 0.0)
    assert learn_gates(trainer, steps=16).metadata["learn_gates"]["steps_taken"] == 16


class TwoLayers(torch.nn.Module):
    """Two linear layers, the first under any name."""

    def __init__(self, first):
        super().__init__()
        torch.manual_seed(3)
        self.names = (first, "b")
        self.embed, self.head = torch.nn.Embedding(64, 16), torch.nn.Linear(16, 64)
        for name in self.names:
            self.add_module(name, torch.nn.Sequential(torch.nn.Linear(16, 16)))

    def forward(self, input_ids, labels, **kwargs):
        hidden = self.embed(input_ids)
        for name in self.names:
            hidden = hidden + torch.tanh(getattr(self, name)(hidden))
        logits = self.head(hidden)[:, :-1]
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}


def test_each_score_goes_to_its_own_unit(tmp_path):
    """Also where the names of some modules look like norms, which trainers give to another group of parameters."""
    rows = [{"input_ids": [i % 8 + 3, i % 8 * 3 + 5, i % 8 * 2 + 11], "labels": [3, 4, i % 8 + 5]} for i in range(48)]
    scores = []
    for first in ("a", "a_norm"):
        torch.manual_seed(1)
        config = ILAConfig(r=2, target_modules=[f"{first}.0", "b.0"], granularity="module", gate_mode="open")
        model = get_peft_model(TwoLayers(first), config)
        args = TrainingArguments(**options(tmp_path, max_steps=10), label_names=["labels"])
        trainer = Trainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        scores.append(learn_gates(trainer, steps=8, min_agreement=None).scores)
    assert scores[0] == scores[1] and abs(scores[0][0] - scores[0][1]) > 0.01


def test_too_few_steps_say_nothing_of_how_sure_it_is(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues)
    trainer.train()
    assert learn_gates(trainer, steps=7, min_agreement=None).spread == []
    assert all(spread > 0 for spread in learn_gates(trainer, steps=8, min_agreement=None).spread)


def test_batches_without_a_label_are_left_out(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(
        tmp_path, tokenizer, dialogues, per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=10
    )
    trainer.train()
    for row in trainer.train_dataset[::3]:
        row["labels"] = [-100] * len(row["labels"])
    closed, opened = measure_losses(trainer, len(dialogues))
    for row in list(trainer.train_dataset):
        if set(row["labels"]) == {-100}:
            trainer.train_dataset.remove(row)
    expected = measure_losses(trainer, len(dialogues))
    assert (closed, opened) == pytest.approx(expected) and math.isfinite(closed)
    learn_gates(trainer, steps=4)
    for row in trainer.train_dataset:
        row["labels"] = [-100] * len(row["labels"])
    with pytest.raises(ValueError, match="None of the first 8 training batches gives a finite loss"):
        learn_gates(trainer, steps=4)


def test_a_gradient_that_is_not_finite_is_an_error_and_the_scores_stay(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, max_steps=10)
    trainer.train()
    before = trainer.model.base_model.layer_importance().scores
    compute_loss = trainer.compute_loss

    def broken(model, inputs, **kwargs):
        loss = compute_loss(model, inputs, **kwargs)
        return loss * math.nan if loss.requires_grad else loss

    trainer.compute_loss = broken
    with pytest.raises(ValueError, match="The gradient of the gates is not finite on a training batch"):
        learn_gates(trainer, steps=4, min_agreement=None)
    assert trainer.model.base_model.layer_importance().scores == before


def test_steps_that_the_gradient_scaler_skips_are_no_samples():
    """As under fp16, whose first steps overflow."""
    score = torch.nn.Parameter(torch.zeros(1))
    optimizer, scaler = GateAttribution([score]), torch.amp.GradScaler("cpu")
    for step in range(8):
        if step in (0, 4):  # the first is skipped
            with pytest.raises(ValueError, match=f"Stage 2 measured {max(0, step - 1)} batches, but needs 4"):
                peft_ila.attribution.samples_of(optimizer)
        scaler.scale(score.sum() * (math.inf if step == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    samples = peft_ila.attribution.samples_of(optimizer)
    assert torch.equal(samples[:, 0], torch.full((7,), -1.0))
    callback, control = peft_ila.attribution.StopWhenSettled(0.5), TrainerControl()
    callback.on_step_end(None, TrainerState(global_step=8), control, optimizer=optimizer)
    assert not control.should_training_stop


@pytest.mark.parametrize("save_only_model", [False, True])
def test_resumed_at_its_end_or_without_the_trainers_optimiser(tmp_path, tokenizer, dialogues, save_only_model):
    """A run that was killed after its last checkpoint; `save_only_model` is for stage 1."""
    saving = {"save_strategy": "steps", "save_steps": 5, "save_only_model": save_only_model}
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, **saving)
    trainer.train()
    expected = learn_gates(trainer, steps=10, min_agreement=None)
    again = learn_gates(trainer, steps=10, min_agreement=None, resume_from_checkpoint=True)
    assert again.scores == expected.scores and again.metadata == expected.metadata
    from_5 = str(tmp_path / "gates" / "checkpoint-5")
    again = learn_gates(trainer, steps=10, min_agreement=None, resume_from_checkpoint=from_5)
    assert again.scores == expected.scores and again.spread == expected.spread


@pytest.mark.support("Trainers", "resume from `checkpoint-N`, both stages")
def test_resumed_stages_end_as_unbroken_ones(tmp_path, tokenizer, dialogues):
    """Each stage is stopped half-way by an exception, and resumed by a new trainer from its checkpoint."""

    class Stop(Exception):
        pass

    class StopAt(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                raise Stop

    def trainer(directory, *callbacks):
        callbacks = [EpsilonStability(epsilon=0.05, window=2, patience=2), *callbacks]
        return sft_trainer(
            tmp_path / directory, tokenizer, dialogues, callbacks=callbacks, save_strategy="steps", save_steps=2
        )

    whole = trainer("whole")
    whole.train()
    expected = learn_gates(whole, steps=6)

    with pytest.raises(Stop):
        trainer("broken", StopAt(5)).train()
    broken = trainer("broken")
    broken.train(resume_from_checkpoint=True)
    assert broken.state.global_step == whole.state.global_step > 5
    for name, value in lora_weights(whole.model).items():
        assert torch.equal(broken.model.get_parameter(name), value)

    broken.add_callback(StopAt(5))
    monkeypatched = pytest.MonkeyPatch()
    with monkeypatched.context() as patch, pytest.raises(Stop):
        patch.setattr("peft_ila.training._LOGGING_CALLBACKS", (DefaultFlowCallback, StopAt))
        learn_gates(broken, steps=6)
    again = trainer("broken")
    again.model.load_state_dict(broken.model.state_dict())
    resumed = learn_gates(again, steps=6, resume_from_checkpoint=True)
    assert resumed.scores == expected.scores
    for name, value in lora_weights(whole.model).items():
        assert torch.equal(again.model.get_parameter(name), value)


@pytest.mark.support("Trainers", "gradient accumulation")
def test_gradient_accumulation_changes_nothing_but_the_memory(tmp_path, tokenizer, dialogues):
    model = ila()
    first = plain_trainer(tmp_path, tokenizer, dialogues, model=model, learning_rate=5e-3)
    first.train()
    whole = learn_gates(first, steps=6, loss_batches=100)  # all of them
    split = plain_trainer(
        tmp_path, tokenizer, dialogues, model=model, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    parts = learn_gates(split, steps=6, loss_batches=100)
    torch.testing.assert_close(torch.tensor(parts.scores), torch.tensor(whole.scores), rtol=1e-4, atol=1e-4)


def test_a_model_that_is_in_mode_soft_already(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues)
    trainer.train()
    expected = learn_gates(trainer, steps=4)
    trainer.model.set_gate_mode("soft")
    again = learn_gates(trainer, steps=4)
    assert again.scores == expected.scores and again.metadata == expected.metadata
    assert not any("lora_gate" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert any("lora_B" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_the_seed_rules_over_the_data_seed(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, data_seed=3)
    trainer.train()
    assert learn_gates(trainer, steps=4, seed=1).scores != learn_gates(trainer, steps=4, seed=2).scores


def test_a_loss_that_fails_leaves_the_model_as_it_was(tmp_path, tokenizer, dialogues, input_ids):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=ila(mode="joint"))
    trainer.train()
    model = trainer.model.train()
    outputs = model(input_ids).logits
    trainer.compute_loss = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        learn_gates(trainer, steps=4)
    assert model.training and model.peft_config["default"].gate_mode == "joint"
    assert torch.equal(model(input_ids).logits, outputs)


def test_the_layer_that_was_tuned_wins(tmp_path, tokenizer, dialogues):
    """Where only one layer has a delta, the ranking must find it."""
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, learning_rate=5e-3)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name and ".layers.1." not in name:
            parameter.data.zero_()
    importance = learn_gates(trainer, steps=20)
    assert importance.scores == pytest.approx([-1.0, 2.0, -1.0], abs=0.2)  # all of the gain is its own
    assert importance.scores[0] == importance.scores[2] == -1.0


def test_joint_gates_are_folded_first(tmp_path, tokenizer, dialogues, input_ids):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, model=ila(mode="joint"))
    trainer.train()
    model = trainer.model
    gates = {unit: gate.weight.item() for unit, gate in model.gates().items()}
    assert set(gates.values()) != {4.0}
    outputs, before = model.eval()(input_ids).logits, lora_weights(model)
    learn_gates(trainer, steps=4)
    torch.testing.assert_close(model.eval()(input_ids).logits, outputs, rtol=1e-4, atol=1e-5)
    for name, value in lora_weights(model).items():
        if "lora_A" in name:
            assert torch.equal(value, before[name])
        else:
            unit = name.removeprefix("base_model.model.")[: len("model.layers.0")]
            torch.testing.assert_close(value, before[name] * torch.sigmoid(torch.tensor(gates[unit])))


def test_only_logging_callbacks_run_in_stage_2(tmp_path, tokenizer, dialogues):
    class Counting(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

    counting = Counting()
    stability = EpsilonStability(epsilon=1e9, window=1, patience=1)
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, callbacks=[counting, stability])
    trainer.train()
    seen = counting.steps
    learn_gates(trainer, steps=6)
    assert counting.steps == seen


def test_stage_2_logs_as_the_trainer_does(tmp_path, tokenizer, dialogues, capsys):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, logging_steps=2)
    trainer.train()
    capsys.readouterr()
    learn_gates(trainer, steps=6)
    assert capsys.readouterr().out.count("'loss'") == 3


def test_modules_to_save_and_biases_do_not_move(tmp_path, tokenizer, dialogues):
    model = ila(modules_to_save=["lm_head"])
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=model)
    trainer.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_gate" not in name}
    learn_gates(trainer, steps=4)
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)
    assert any("modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)


def test_an_adapter_loaded_for_inference_can_be_ranked(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues)
    trainer.train()
    expected = learn_gates(trainer, steps=4)
    trainer.model.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    importance = learn_gates(plain_trainer(tmp_path, tokenizer, dialogues, model=model), steps=4)
    assert importance.scores == expected.scores
    assert not any(parameter.requires_grad for parameter in model.parameters())


def with_overrides(trainer, **methods):
    """The trainer of a user who overrides methods of it."""
    trainer.__class__ = type("Custom", (type(trainer),), methods)
    return trainer


def adam(self, model=None):
    parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
    self.optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=2e-2)
    return self.optimizer


def one_cycle(self, num_training_steps, optimizer=None):
    optimizer = optimizer or self.optimizer
    self.lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=num_training_steps)
    return self.lr_scheduler


@pytest.mark.parametrize("methods", [{"create_optimizer": adam}, {"create_scheduler": one_cycle}])
def test_trainers_with_an_optimiser_of_their_own(tmp_path, tokenizer, dialogues, methods):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues)
    trainer.train()
    expected = learn_gates(trainer, steps=4)
    assert learn_gates(with_overrides(trainer, **methods), steps=4).scores == expected.scores


def test_noise_on_the_embeddings_is_for_stage_1_only(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues)
    trainer.train()
    expected = learn_gates(trainer, steps=4)
    noisy = plain_trainer(tmp_path, tokenizer, dialogues, model=trainer.model, neftune_noise_alpha=5.0)
    assert learn_gates(noisy, steps=4).scores == expected.scores
    assert noisy.neftune_noise_alpha == 5.0


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_in_its_training_mode(tmp_path, tokenizer, dialogues, training):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues)
    trainer.train()
    trainer.model.train(training)
    learn_gates(trainer, steps=4)
    assert trainer.model.training == training


def test_what_was_measured_is_resumed_on_the_device_of_the_scores():
    """A trainer on one GPU loads the optimiser's state to the CPU."""
    scores = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for score in scores:
        score.grad = torch.ones(1)
    optimizer = GateAttribution(scores)
    optimizer.step()
    elsewhere = GateAttribution([torch.nn.Parameter(torch.zeros(1, device="meta")) for _ in range(2)])
    elsewhere.load_state_dict(optimizer.state_dict())
    assert elsewhere.param_groups[0]["samples"].device.type == "meta"
    assert torch.equal(optimizer.param_groups[0]["samples"], torch.full((1, 2), -1.0))


def test_measured_losses(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues)
    trainer.train()
    closed, opened = measure_losses(trainer, 100)  # all six batches
    losses = []
    trainer.model.eval()
    for context in (trainer.model.disable_adapter, torch.no_grad):
        with context(), torch.no_grad():
            trainer.model.eval()
            # all answers have one length, so the mean of the batches is the mean of the examples
            losses.append(trainer.model(**trainer.data_collator(list(trainer.train_dataset))).loss.item())
    assert [closed, opened] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 3}, "`steps` must be a whole number of at least 4, got 3"),
        ({"min_agreement": 1.5}, r"`min_agreement` must be in \(0, 1\], got 1.5"),
        ({"loss_batches": 0}, "`loss_batches` must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_arguments(tmp_path, tokenizer, dialogues, arguments, message):
    with pytest.raises(ValueError, match=message):
        learn_gates(sft_trainer(tmp_path, tokenizer, dialogues), **arguments)


def test_an_untrained_adapter_has_nothing_to_rank(tmp_path, tokenizer, dialogues):
    with pytest.raises(ValueError, match="does not lower the loss on its own training data"):
        learn_gates(plain_trainer(tmp_path, tokenizer, dialogues))


def test_a_masked_or_foreign_model_is_refused(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues)
    trainer.model.apply_mask(["model.layers.0"])
    with pytest.raises(ValueError, match="The adapter is masked"):
        learn_gates(trainer)
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="needs a trainer whose model was made by"):
        learn_gates(plain_trainer(tmp_path, tokenizer, dialogues, model=lora))


@pytest.mark.support("Trainers", "TRL `DPOTrainer`")
def test_gates_are_learned_on_the_dpo_loss(tmp_path, tokenizer, dialogues):
    from trl import DPOConfig, DPOTrainer

    rows = [
        {**row, "chosen": row["completion"], "rejected": [{"role": "assistant", "content": "w1 w2 w1 w2"}]}
        for row in dialogues
    ]
    dataset = Dataset.from_list(rows).select_columns(["prompt", "chosen", "rejected"])
    trainer = DPOTrainer(
        model=ila(),
        args=DPOConfig(**{"bf16": False, **options(tmp_path, max_steps=10)}),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    before = lora_weights(trainer.model)
    importance = learn_gates(trainer, steps=6)
    assert importance.metadata["learn_gates"]["loss_closed"] == pytest.approx(math.log(2), abs=1e-4)
    assert len(set(importance.scores)) == 3
    for name, value in lora_weights(trainer.model).items():
        assert torch.equal(value, before[name])
