import logging
import math

import pytest
from trainers import plain_trainer, sft_trainer
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_ila import EpsilonStability


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
    assert "Training ended at step 4 before it was stable (4 losses were logged, but comparing needs 40" in caplog.text
    assert "nan" not in caplog.text


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
