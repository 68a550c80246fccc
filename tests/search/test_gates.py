import math

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from models import build
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from trainers import ila, lora_weights, options, plain_trainer, sft_trainer, trained_ila
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_ila import EpsilonStability, ILAConfig, LayerImportance, learn_gates


@pytest.mark.parametrize(
    "make, granularity",
    [
        pytest.param(sft_trainer, "layer", marks=pytest.mark.support("Trainers", "TRL `SFTTrainer`")),
        pytest.param(plain_trainer, "module", marks=pytest.mark.support("Trainers", "transformers `Trainer`")),
    ],
)
def test_both_stages(tmp_path, tokenizer, dialogues, input_ids, make, granularity):
    trainer = make(tmp_path, tokenizer, dialogues, model=ila(granularity=granularity))
    trainer.train()
    model = trainer.model
    before, outputs = lora_weights(model), model.eval()(input_ids).logits
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    logs, step = len(trainer.state.log_history), trainer.state.global_step

    importance = learn_gates(trainer, steps=np.int64(12))

    assert isinstance(importance, LayerImportance)
    assert len(importance.units) == (3 if granularity == "layer" else 21)
    assert len(set(importance.scores)) == len(importance.scores)
    for name, value in lora_weights(model).items():
        assert torch.equal(value, before[name])
    assert not model.training and torch.equal(model(input_ids).logits, outputs)
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
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, model=trained_ila(), data_seed=3)
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


@pytest.mark.parametrize("steps", [7, 8])
def test_the_scores_are_what_each_unit_is_worth_at_the_base_model(tmp_path, tokenizer, dialogues, steps):
    """Against an independent reference; each batch is the whole data set, so that their order does not matter."""
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, trained_ila(), per_device_train_batch_size=len(dialogues))
    importance = learn_gates(trainer, steps=steps, min_agreement=None)
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.eval()
    worth = -gradients_at(trainer.model, batch, 0.0)
    torch.testing.assert_close(torch.tensor(importance.scores), worth / worth.mean() - 1, rtol=1e-4, atol=1e-4)
    assert importance.spread == pytest.approx([0.0] * 3 if steps == 8 else [], abs=1e-3)  # the batches do not differ
    assert importance.metadata["learn_gates"]["attributed"] == pytest.approx(worth.sum().item(), rel=1e-4)


def test_deltas_that_raise_the_loss_at_first_cannot_be_ranked(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=trained_ila())
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.neg_()
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kwargs: (
        compute_loss(model, inputs, **kwargs) - 9 * any(gate.state == "open" for gate in model.gates().values())
    )
    with pytest.raises(ValueError, match="to first order it raises the loss: the attributions add up to -"):
        learn_gates(trainer, steps=4)
    assert set(trainer.model.base_model.layer_importance().scores) == {4.0}


def test_stops_when_the_ranking_has_settled(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, model=trained_ila())
    settled = learn_gates(trainer, steps=60, min_agreement=0.9)
    taken = settled.metadata["learn_gates"]["steps_taken"]
    assert 16 <= taken < 60 and taken % 4 == 0
    assert learn_gates(trainer, steps=taken, min_agreement=None).scores == settled.scores
    everything = learn_gates(trainer, steps=60, min_agreement=None)
    assert everything.metadata["learn_gates"]["steps_taken"] == 60
    assert everything.ranking() == settled.ranking()


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


def losses(trainer, batches):
    settings = learn_gates(trainer, steps=max(4, batches), loss_batches=batches, min_agreement=None).metadata
    return settings["learn_gates"]["loss_closed"], settings["learn_gates"]["loss_open"]


def test_batches_without_a_label_are_left_out(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=trained_ila(), per_device_train_batch_size=1)
    for row in trainer.train_dataset[::3]:
        row["labels"] = [-100] * len(row["labels"])
    found = losses(trainer, 32)
    for row in list(trainer.train_dataset):
        if set(row["labels"]) == {-100}:
            trainer.train_dataset.remove(row)
    expected = losses(trainer, 32)
    assert found == pytest.approx(expected) and math.isfinite(found[0])
    for row in trainer.train_dataset:
        row["labels"] = [-100] * len(row["labels"])
    with pytest.raises(ValueError, match="No training batch gives a loss"):
        learn_gates(trainer, steps=4)


def test_a_gradient_that_is_not_finite_is_an_error_and_the_scores_stay(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=trained_ila())
    before = trainer.model.base_model.layer_importance().scores
    compute_loss = trainer.compute_loss

    def broken(model, inputs, **kwargs):
        loss = compute_loss(model, inputs, **kwargs)
        return loss * math.nan if loss.requires_grad else loss

    trainer.compute_loss = broken
    with pytest.raises(ValueError, match="The gradient of the gates is not finite on a training batch"):
        learn_gates(trainer, steps=4, min_agreement=None)
    assert trainer.model.base_model.layer_importance().scores == before


def test_gradients_that_overflow_are_taken_once_more(tmp_path, tokenizer, dialogues):
    """As under fp16, whose first steps overflow."""
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=trained_ila())
    expected = learn_gates(trainer, steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    trainer.accelerator.scaler = scaler
    found = learn_gates(trainer, steps=4)
    assert found.scores == pytest.approx(expected.scores, rel=1e-4)
    assert scaler.get_scale() == 2.0**126


def test_a_stage_that_failed_is_repeated_with_the_same_scores(tmp_path, tokenizer, dialogues):
    """In a new trainer, as after a run that was killed, which has not trained."""
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, model=trained_ila())
    expected = learn_gates(trainer)
    trainer.model.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True)
    again = learn_gates(sft_trainer(tmp_path, tokenizer, dialogues, model=model))
    assert again.scores == expected.scores and again.spread == expected.spread


class Stream(torch.utils.data.IterableDataset):
    """Rows that can be read in each pass, or only once."""

    def __init__(self, rows, once):
        self.rows = iter(rows) if once else rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("once", [True, False])
def test_streams(tmp_path, tokenizer, dialogues, once):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=trained_ila())
    rows, trainer.train_dataset = trainer.train_dataset, Stream(trainer.train_dataset, once)
    whole = learn_gates(trainer, steps=6, min_agreement=None, loss_batches=6)
    assert whole.metadata["learn_gates"]["steps_taken"] == 6
    model = trainer.model.eval()
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        opened = model(**batch).loss.item()  # all answers have one length
        with model.disable_adapter():
            closed = model(**batch).loss.item()
    found = whole.metadata["learn_gates"]
    assert [found["loss_closed"], found["loss_open"]] == pytest.approx([closed, opened], rel=1e-5)
    if once:
        with pytest.raises(ValueError, match="No training batch gives a loss: there are no batches"):
            learn_gates(trainer, steps=6)
        trainer.train_dataset = Stream(rows[:24], once)
        with pytest.raises(ValueError, match="Stage 2 measured 3 batches, but needs 4: the training data ended too"):
            learn_gates(trainer, steps=6)
    else:
        assert learn_gates(trainer, steps=9, min_agreement=None).metadata["learn_gates"]["steps_taken"] == 9


DROPOUTS = {
    "gpt2": ["resid_pdrop", "embd_pdrop", "attn_pdrop"],
    "opt": ["dropout", "attention_dropout"],
    "bart": ["dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop"],
}


@pytest.mark.support("Trainers", "a model with dropout of its own")
@pytest.mark.parametrize("name, checkpointing", [("gpt2", False), ("opt", True), ("bart", True)])
def test_dropout_is_off(tmp_path, name, checkpointing):
    """Losses and gradients are those of the model without dropout, also where activations are checkpointed."""
    ids = [[i % 8 + 3, i % 8 * 3 + 5, i % 8 * 2 + 11] * 3 for i in range(16)]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    found, weights = [], None
    for rate in (0.0, 0.5):
        base = build(name)
        for option in DROPOUTS[name]:
            setattr(base.config, option, rate)
        model = type(base)(base.config)
        model.load_state_dict(base.state_dict())
        model = get_peft_model(model, ILAConfig(r=4, target_modules="all-linear", gate_mode="open"))
        settings = options(tmp_path, per_device_train_batch_size=16, max_steps=10)
        args = TrainingArguments(**settings, gradient_checkpointing=checkpointing)
        trainer = Trainer(model=model, args=args, train_dataset=rows)
        if weights is None:
            trainer.train()
            weights = get_peft_model_state_dict(model)
        set_peft_model_state_dict(model, weights)
        before = [(module, vars(module).copy()) for module in model.modules()]
        importance = learn_gates(trainer, steps=4)
        figures = importance.metadata["learn_gates"]
        found.append([*importance.scores, figures["attributed"], figures["loss_closed"], figures["loss_open"]])
        for module, variables in before:
            assert {k: v for k, v in variables.items() if isinstance(v, (float, bool))} == {
                k: v for k, v in vars(module).items() if isinstance(v, (float, bool)) and k in variables
            }
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.support("Trainers", "gradient accumulation")
def test_gradient_accumulation_changes_nothing_but_the_memory(tmp_path, tokenizer, dialogues):
    model = trained_ila()
    first = plain_trainer(tmp_path, tokenizer, dialogues, model=model)
    whole = learn_gates(first, steps=6, loss_batches=100)  # all of them
    split = plain_trainer(
        tmp_path, tokenizer, dialogues, model=model, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    parts = learn_gates(split, steps=6, loss_batches=100)
    torch.testing.assert_close(torch.tensor(parts.scores), torch.tensor(whole.scores), rtol=1e-4, atol=1e-4)


def per_label(outputs, labels, num_items_in_batch):
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return losses / num_items_in_batch


class DividedByHand(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return per_label(model(**inputs), labels, num_items_in_batch)


@pytest.mark.support("Trainers", "losses that need `num_items_in_batch`")
@pytest.mark.parametrize("by", ["compute_loss_func", "compute_loss"])
def test_losses_that_need_the_number_of_labels(tmp_path, tokenizer, dialogues, by):
    plain = plain_trainer(tmp_path, tokenizer, dialogues, model=trained_ila())
    expected = learn_gates(plain, steps=6, loss_batches=6)
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=plain.model, **args)
    if by == "compute_loss":
        trainer.__class__ = DividedByHand
    else:
        trainer.compute_loss_func = per_label
    found = learn_gates(trainer, steps=6, loss_batches=6)
    assert found.scores == pytest.approx(expected.scores, abs=1e-3)
    for figure in ("loss_closed", "loss_open", "attributed"):
        known = expected.metadata["learn_gates"][figure]
        assert found.metadata["learn_gates"][figure] == pytest.approx(known, rel=1e-3)


def test_a_model_that_is_in_mode_soft_already(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, model=trained_ila())
    expected = learn_gates(trainer, steps=4)
    trainer.model.set_gate_mode("soft")
    again = learn_gates(trainer, steps=4)
    assert again.scores == expected.scores and again.metadata == expected.metadata
    assert not any("lora_gate" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert any("lora_B" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_a_loss_that_fails_leaves_the_model_as_it_was(tmp_path, tokenizer, dialogues, input_ids):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=trained_ila("joint"))
    model = trainer.model.train()
    outputs = model(input_ids).logits
    trainer.compute_loss = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        learn_gates(trainer, steps=4)
    assert model.training and model.peft_config["default"].gate_mode == "joint"
    assert torch.equal(model(input_ids).logits, outputs)


def test_the_layer_that_was_tuned_wins(tmp_path, tokenizer, dialogues):
    """Where only one layer has a delta, the ranking must find it."""
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, model=trained_ila())
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name and ".layers.1." not in name:
            parameter.data.zero_()
    importance = learn_gates(trainer, steps=20)
    assert importance.scores == pytest.approx([-1.0, 2.0, -1.0], abs=0.2)  # all of the gain is its own
    assert importance.scores[0] == importance.scores[2] == -1.0


def test_joint_gates_are_folded_first(tmp_path, tokenizer, dialogues, input_ids):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, model=trained_ila("joint"))
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
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, model=trained_ila(), callbacks=[counting, stability])
    learn_gates(trainer, steps=6)
    assert counting.steps == 0


def test_stage_2_logs_as_the_trainer_does(tmp_path, tokenizer, dialogues, capsys):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, model=trained_ila(), logging_steps=2)
    capsys.readouterr()
    learn_gates(trainer, steps=6)
    assert capsys.readouterr().out.count("'loss'") == 3


def test_the_trainers_data_loader_is_given_back(tmp_path, tokenizer, dialogues):
    """A loader that was not read to its end would stay the active one, by whose length metrics are cut."""
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=trained_ila())
    before = list(trainer.accelerator.gradient_state.dataloader_references)
    learn_gates(trainer, steps=4)
    assert trainer.accelerator.gradient_state.dataloader_references == before


def test_what_else_trains_does_not_move_and_trains_again(tmp_path, tokenizer, dialogues):
    model = ila(modules_to_save=["lm_head"])
    model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)  # by hand
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=model)
    trainer.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_gate" not in name}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    learn_gates(trainer, steps=4)
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert any("modules_to_save" in name for name in trainable) and any("norm" in name for name in trainable)


def test_an_adapter_loaded_for_inference_can_be_ranked(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=trained_ila())
    expected = learn_gates(trainer, steps=4)
    trainer.model.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    importance = learn_gates(plain_trainer(tmp_path, tokenizer, dialogues, model=model), steps=4)
    assert importance.scores == expected.scores
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_noise_on_the_embeddings_is_for_stage_1_only(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=trained_ila())
    expected = learn_gates(trainer, steps=4)
    noisy = plain_trainer(tmp_path, tokenizer, dialogues, model=trainer.model, neftune_noise_alpha=5.0)
    assert learn_gates(noisy, steps=4).scores == expected.scores
    assert noisy.neftune_noise_alpha == 5.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 3}, "`steps` must be a whole number of at least 4, got 3"),
        ({"min_agreement": 1.5}, r"`min_agreement` must be in \(0, 1\], got 1.5"),
        ({"loss_batches": 0}, "`loss_batches` must be a whole number of at least 1, got 0"),
        ({"seed": -1}, r"`seed` must be a whole number from 0 to 2\*\*32 - 1, got -1"),
        ({"seed": 2**32}, "`seed` must be a whole number .* got 4294967296"),
        ({"seed": True}, "`seed` must be a whole number .* got True"),
        ({"seed": 1.5}, "`seed` must be a whole number .* got 1.5"),
        ({"method": "path"}, r"`method` must be one of \('attribution', 'descent', 'untrained'\), got 'path'"),
        ({"budget": 0.3}, r"\['budget'\] are settings of `method=\"descent\"`: pass it, or leave them out"),
        ({"method": "descent", "budget": 4}, "`budget` must be a whole number of units from 1 to 3, .* got 4"),
        ({"method": "descent", "budget": True}, "`budget` must be .* got True"),
        ({"method": "descent", "budget": 1.5}, "`budget` must be .* got 1.5"),
        ({"method": "descent", "learning_rate": 0.0}, "`learning_rate` must be greater than 0, got 0.0"),
        ({"method": "descent", "initial_score": math.inf}, "`initial_score` must be finite, got inf"),
    ],
)
def test_bad_arguments(tmp_path, tokenizer, dialogues, arguments, message):
    with pytest.raises(ValueError, match=message):
        learn_gates(plain_trainer(tmp_path, tokenizer, dialogues), **arguments)


def test_an_adapter_that_does_not_lower_the_loss_has_nothing_to_rank(tmp_path, tokenizer, dialogues):
    model = ila(init_lora_weights=False)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data *= 30
    with pytest.raises(ValueError, match="does not lower the loss on its own training data"):
        learn_gates(plain_trainer(tmp_path, tokenizer, dialogues, model=model))


def test_a_disabled_adapter_is_refused(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues)
    with (
        trainer.model.disable_adapter(),
        pytest.raises(ValueError, match=r"disabled; call `enable_adapter_layers\(\)`"),
    ):
        learn_gates(trainer)


def test_a_masked_or_foreign_model_is_refused(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues)
    trainer.model.apply_mask(["model.layers.0"])
    with pytest.raises(ValueError, match="The adapter is masked"):
        learn_gates(trainer)
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"made by .*or from a LoRA by `ILAModel.from_lora\(model\)`"):
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
