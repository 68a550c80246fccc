"""Pruning with any trainer: what is measured, what is kept, what moves, and what is written."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from peft import PeftModel
from trainers import ila, lora_weights, sft_trainer
from trl import DPOConfig, DPOTrainer

import peft_ila.workflows.prune
from peft_ila import ILAModel, LayerImportance, learn_gates
from peft_ila.search.directions import Directions
from peft_ila.search.measurement import FACTORS, measuring
from peft_ila.search.pruning import SHARES, HeldOut
from peft_ila.workflows.prune import prune


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer, dialogues):
    """A LoRA adapter on disk, trained on the dialogues but the last eight."""
    directory = tmp_path_factory.mktemp("trained")
    trainer = sft_trainer(directory, tokenizer, dialogues[:40], model=ila(granularity="module"))
    trainer.train()
    trainer.model.to_lora(directory / "lora")
    return directory / "lora"


def trainer_on(trained, tmp_path, tokenizer, dialogues, held_out=True, granularity="layer", **kwargs):
    lora = PeftModel.from_pretrained(tiny_llama(), trained, is_trainable=True)
    model = ILAModel.from_lora(lora, granularity=granularity)
    options = {"model": model, "per_device_eval_batch_size": 1, "gradient_checkpointing": False, **kwargs}
    trainer = sft_trainer(tmp_path / "run", tokenizer, dialogues[:40], **options)
    if held_out:
        trainer.eval_dataset = sft_trainer(tmp_path / "run", tokenizer, dialogues[40:], model=model).train_dataset
    return trainer


def test_attributions_are_the_gradients_of_gates_on_each_direction(trained, tmp_path, tokenizer, dialogues):
    trainer = trainer_on(trained, tmp_path, tokenizer, dialogues)
    with measuring(trainer, trainer.model.base_model, 0, FACTORS) as measurement:
        directions = Directions(trainer.model.base_model)
        (step,) = [step for step, _ in zip(measurement.steps(), range(1))]
        for gamma in (0.0, 0.7):
            slope = directions.slope(measurement, step, torch.full((len(directions.modules),), gamma))
            # by functional_call of the model with B·diag(γ) in place of B
            leaves, weights = [], {}
            for name, parameter in trainer.model.named_parameters():
                weights[name] = parameter.detach()
            names = [name for name in weights if ".lora_B." in name]
            for name, (_, _, a, _), b in zip(names, directions._factors, directions._b):
                leaves.append(torch.full((a.shape[0],), gamma, requires_grad=True))
                weights[name] = b * leaves[-1]
            batch = {key: value for key, value in step.batches[0].items() if torch.is_tensor(value)}
            torch.func.functional_call(trainer.model, weights, kwargs=batch).loss.backward()
            torch.testing.assert_close(slope, torch.cat([leaf.grad for leaf in leaves]), rtol=1e-3, atol=1e-6)


def test_the_sum_of_a_modules_directions_is_what_attribution_says_of_the_module(
    trained, tmp_path, tokenizer, dialogues
):
    trainer = trainer_on(trained, tmp_path, tokenizer, dialogues, granularity="module")
    reference = learn_gates(trainer, steps=4, min_agreement=None, seed=0)
    pruning = prune(trainer, top_p=0.5, steps=4, gate_steps=0, seed=0)
    assert pruning.importance.units == reference.units
    assert pruning.importance.scores == pytest.approx(reference.scores, abs=1e-4)


def test_pruned_adapter(trained, tmp_path, tokenizer, dialogues, input_ids):
    trainer = trainer_on(trained, tmp_path, tokenizer, dialogues)
    whole = trainer.evaluate()["eval_loss"]
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}

    pruning = prune(trainer, tmp_path / "small", top_p=np.float64(0.2), steps=np.int64(4), gate_steps=8)

    assert 0.1 < pruning.share <= 0.2
    assert [point.share for point in pruning.curve] == list(SHARES)
    assert pruning.curve[-1].gain == 1 and pruning.curve[-1].loss == pytest.approx(whole, abs=1e-4)
    assert pruning.result.gain >= next(point.gain for point in pruning.curve if point.share == 0.2)
    assert sum(pruning.ranks.values()) == sum(row["gate"] != 0 for row in pruning.directions)
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trainable
    # the trainer's model is the pruned one, and so is what plain PEFT loads
    assert trainer.evaluate()["eval_loss"] == pytest.approx(pruning.result.loss, abs=1e-4)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "small").eval()
    expected = trainer.model.eval()(input_ids).logits
    torch.testing.assert_close(plain(input_ids).logits, expected, rtol=0, atol=1e-5)
    count = {
        name: sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        for name, model in (("small", plain), ("whole", PeftModel.from_pretrained(tiny_llama(), trained)))
    }
    assert count["small"] / count["whole"] == pytest.approx(pruning.share)
    saved = json.loads((tmp_path / "small" / "pruning.json").read_text())
    assert saved["share"] == pruning.share and saved["ranks"] == pruning.ranks
    assert LayerImportance.load(tmp_path / "small" / "importance.json") == pruning.importance
    assert {path.name for path in (tmp_path / "small").iterdir()} >= {"kept.png", "ranks.png", "README.md"}
    assert "| 20.0% |" in (tmp_path / "small" / "README.md").read_text()


def test_only_gates_are_learned(trained, tmp_path, tokenizer, dialogues):
    trainer = trainer_on(trained, tmp_path, tokenizer, dialogues)
    ila_model = trainer.model.base_model
    with measuring(trainer, ila_model, 0, FACTORS) as measurement:
        directions = Directions(ila_model)
        before = lora_weights(trainer.model)
        kept = torch.arange(len(directions.modules))
        kept[::3] = -1
        gates = directions.learn_gates(measurement, measurement.steps(), kept, 6, 0.05)
        directions.set_gates(gates)
    assert (gates[::3] == 0).all() and len(set(gates.tolist())) > len(gates) / 2
    rest = iter(gates.split([4] * 21))
    for name, weight in lora_weights(trainer.model).items():
        own = before[name] if "lora_A" in name else before[name] * next(rest)
        assert torch.equal(weight, own)


@pytest.mark.parametrize(("granularity", "units"), [("module", 21), ("layer", 3)])
def test_whole_modules_and_layers(trained, tmp_path, tokenizer, dialogues, granularity, units):
    trainer = trainer_on(trained, tmp_path, tokenizer, dialogues)
    pruning = prune(trainer, top_p=0.5, granularity=granularity, steps=4, gate_steps=4)
    assert set(pruning.ranks.values()) == {0, 4}
    gates = {}
    for row in pruning.directions:
        unit = row["module"] if granularity == "module" else row["module"][: len("model.layers.0")]
        gates.setdefault(unit, set()).add(row["gate"])
    assert len(gates) == units and all(len(own) == 1 for own in gates.values())


def test_held_out_data_decide():
    def losses(*values):
        return torch.tensor([[value, 2.0] for value in values])

    base, noise = losses(3.0, 5.0, 4.0, 4.0), 0.02
    shares = {
        0.1: losses(2.5, 4.5, 3.5, 3.5),
        0.5: losses(2.0 + noise, 4.0 - noise, 3.0, 3.0 + noise),
        1.0: losses(2.0, 4.0, 3.0, 3.0),
    }
    held_out = HeldOut(base, shares)
    assert [point.gain for point in held_out.curve()] == pytest.approx([0.5, 0.995, 1.0])
    assert held_out.smallest(None) == 0.5  # the pairs differ by 0.005 ± 0.01
    assert held_out.smallest(0.4) == 0.1 and held_out.smallest(0.9999) == 1.0
    with pytest.raises(ValueError, match="does not lower the held-out loss"):
        HeldOut(shares[1.0], {1.0: base})
    nan = losses(math.nan)  # of a batch without labels
    padded = HeldOut(torch.cat([nan, base]), {share: torch.cat([nan, own]) for share, own in shares.items()})
    assert padded.curve() == held_out.curve() and padded.smallest(None) == 0.5
    with pytest.raises(ValueError, match="No batch of the held-out data gives a finite loss"):
        HeldOut(nan, {1.0: nan})


def test_without_held_out_data_a_quarter_is_kept_and_said_to_be_unchecked(trained, tmp_path, tokenizer, dialogues):
    trainer = trainer_on(trained, tmp_path, tokenizer, dialogues, held_out=False)
    (tmp_path / "small").mkdir()
    for name in ("adapter_config.json", "pruning.json", "kept.png", "notes.txt"):
        (tmp_path / "small" / name).write_text("earlier")
    pruning = prune(trainer, tmp_path / "small", steps=4, gate_steps=0)
    assert not (tmp_path / "small" / "kept.png").exists() and (tmp_path / "small" / "notes.txt").exists()
    assert pruning.share == pytest.approx(0.25, abs=0.02) and pruning.curve == [] and pruning.result is None
    assert "nothing was checked" in (tmp_path / "small" / "README.md").read_text()


def test_dpo(trained, tmp_path, tokenizer, dialogues):
    rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["prompt"]} for r in dialogues]
    rows = [{**row, "rejected": [{"role": "assistant", "content": "w5 w6"}]} for row in rows]
    model = ILAModel.from_lora(PeftModel.from_pretrained(tiny_llama(), trained, is_trainable=True))
    args = DPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    data = Dataset.from_list(rows)
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=data.select(range(40)),
        eval_dataset=data.select(range(40, 48)),
        processing_class=tokenizer,
    )
    pruning = prune(trainer, tmp_path / "small", top_p=0.3, steps=4, gate_steps=2)
    assert pruning.curve[-1].loss == pytest.approx(math.log(2), abs=1e-3)  # TRL's reference is the adapter as it was
    assert pruning.base_loss > 0.7
    assert pruning.result.gain > 0.5


def test_data_that_cannot_be_measured_on(trained, tmp_path, tokenizer, dialogues, monkeypatch):
    trainer = trainer_on(trained, tmp_path, tokenizer, dialogues)
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "prediction_step", lambda *args, **kwargs: (None, None, None))
        with pytest.raises(ValueError, match=r"no loss on the held-out data, whose batches have \[.*'labels'"):
            prune(trainer, steps=2)
    with monkeypatch.context() as patched:
        batch = {"names": ["a", "b"], "input_ids": torch.ones(2, 4)}
        patched.setattr(trainer, "get_eval_dataloader", lambda: [batch])
        patched.setattr(trainer, "prediction_step", lambda *args, **kwargs: (torch.tensor(3.0), None, None))
        with measuring(trainer, trainer.model.base_model) as measurement:
            assert measurement.evaluate().tolist() == [[3, 2]]
    trainer.args.dataloader_drop_last = True
    trainer.args.per_device_eval_batch_size = 100
    with pytest.raises(ValueError, match="The held-out data give no batch"):
        prune(trainer, steps=2)
    trainer.train_dataset = trainer.train_dataset.select(range(4))
    with pytest.raises(ValueError, match="The training data have no batch left"):
        prune(trainer, steps=2)


def test_several_gpus_in_one_process_are_refused(trained, tmp_path, tokenizer, dialogues):
    trainer = trainer_on(trained, tmp_path, tokenizer, dialogues)
    trainer.args._n_gpu = 2
    for search in (prune, learn_gates):
        with pytest.raises(ValueError, match="splits each batch over 2 GPUs"):
            search(trainer)


def test_checkpointing_is_on_in_every_search(trained, tmp_path, tokenizer, dialogues):
    trainer = trainer_on(trained, tmp_path, tokenizer, dialogues, gradient_checkpointing=True)
    trainer.evaluate()  # prepares the model
    for _ in range(2):
        with measuring(trainer, trainer.model.base_model, 0, FACTORS):
            assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has not been trained"),
        ({"init_lora_weights": False, "use_dora": True}, "cannot be pruned: it is of DoRA"),
    ],
)
def test_adapters_that_are_refused(tmp_path, tokenizer, dialogues, options, message):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, model=ila(**options))
    before = lora_weights(trainer.model)
    with pytest.raises(ValueError, match=message):
        prune(trainer)
    assert all(torch.equal(weight, before[name]) for name, weight in lora_weights(trainer.model).items())


def test_settings_that_are_refused(trained, tmp_path, tokenizer, dialogues):
    trainer = trainer_on(trained, tmp_path, tokenizer, dialogues, held_out=False)
    for settings, message in (
        ({"top_p": 0.5, "min_kept": 0.5}, "not both"),
        ({"top_p": 1.5}, "`top_p` must be in"),
        ({"granularity": "head"}, "`granularity` must be one of"),
        ({"steps": 0}, "`steps` must be"),
        ({"gate_steps": 1.5}, "`gate_steps` must be"),
        ({"gate_learning_rate": 0}, "`gate_learning_rate` must be"),
        ({"min_kept": 0.9}, "`min_kept` needs held-out data"),
        ({"top_p": 0.5, "output_dir": trained}, "holds an adapter that would be replaced"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(trainer, **settings)


@pytest.mark.parametrize("place", [(Directions, "learn_gates"), (peft_ila.workflows.prune, "draw")])
def test_after_an_error_the_adapter_is_as_before(trained, tmp_path, tokenizer, dialogues, monkeypatch, place):
    trainer = trainer_on(trained, tmp_path, tokenizer, dialogues)
    before = lora_weights(trainer.model)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(*place, fail)
    with pytest.raises(KeyboardInterrupt):
        prune(trainer, tmp_path / "small", top_p=0.5, steps=4)
    assert all(torch.equal(weight, before[name]) for name, weight in lora_weights(trainer.model).items())
    assert not (tmp_path / "small").exists()
