"""DoRA: θ₀ + γ·(θ − θ₀), where θ is no product of A and B alone."""

import copy
import pickle

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from trainers import plain_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_ila import ILAConfig, ILAModel, learn_gates
from peft_ila.export.plain import export_adapter

OPTIONS = {"r": 4, "target_modules": "all-linear", "use_dora": True, "task_type": "CAUSAL_LM"}
UNITS = [f"model.layers.{i}" for i in range(3)]


def moved(model):
    """The same model with other LoRA weights and magnitudes, as after training."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
        if "lora_magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
    return model.eval()


def gated(granularity="layer", mode="open", **kwargs):
    return moved(get_peft_model(tiny_llama(), ILAConfig(**OPTIONS, granularity=granularity, gate_mode=mode, **kwargs)))


def dora():
    return moved(get_peft_model(tiny_llama(), LoraConfig(**OPTIONS)))


def between(gamma):
    """A plain Llama with the weights θ₀ + γ·(θ − θ₀), γ by unit."""
    base, other = tiny_llama().eval(), dora().merge_and_unload()
    for name, parameter in base.named_parameters():
        if unit := next((unit for unit in UNITS if name.startswith(f"{unit}.")), None):
            parameter.data.lerp_(other.get_parameter(name).data, gamma[unit])
    return base


@pytest.mark.support("Options of `LoraConfig`", "`use_dora`")
def test_open_is_dora(input_ids):
    ila, lora = gated(), dora()
    assert torch.equal(ila(input_ids).logits, lora(input_ids).logits)
    ila.train(), lora.train()
    losses = [model(input_ids, labels=input_ids).loss for model in (ila, lora)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    trainable = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert {name for name, p in ila.named_parameters() if p.requires_grad} == trainable
    for name in trainable:
        assert torch.equal(ila.get_parameter(name).grad, lora.get_parameter(name).grad)


@pytest.mark.parametrize("safe", [False, True])
def test_gates_and_masks_and_merging(input_ids, safe):
    model = gated(mode="soft")
    gammas = {"soft": {}, "hard": {unit: float(unit == UNITS[1]) for unit in UNITS}}
    for i, (unit, gate) in enumerate(model.gates().items()):
        gate.weight.data.fill_(i - 1.0)
        gammas["soft"][unit] = torch.sigmoid(gate.weight).item()
    for mode, gamma in gammas.items():
        if mode == "hard":
            model.apply_mask(UNITS[1:2])
        expected = between(gamma)(input_ids).logits
        torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-4, atol=1e-5)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            copied.merge_adapter(safe_merge=safe)
            torch.testing.assert_close(copied(input_ids).logits, expected, rtol=1e-4, atol=1e-5)
            copied.unmerge_adapter()
            torch.testing.assert_close(copied(input_ids).logits, expected, rtol=1e-4, atol=1e-5)
            merged = copied.merge_and_unload()
            torch.testing.assert_close(merged(input_ids).logits, expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids).logits, tiny_llama().eval()(input_ids).logits)


def test_the_probe_is_the_slope_at_the_base_model(input_ids):
    model = gated("layer", mode="soft")
    for gate in model.gates().values():
        gate.state = "probed"
    loss = model(input_ids, labels=input_ids).loss
    assert loss.item() == pytest.approx(tiny_llama().eval()(input_ids, labels=input_ids).loss.item())
    loss.backward()
    step = 1e-2
    for unit, gate in model.gates().items():
        with torch.no_grad():
            up, down = (
                between({other: sign * step * (other == unit) for other in UNITS})(input_ids, labels=input_ids).loss
                for sign in (1, -1)
            )
        assert gate.weight.grad.item() == pytest.approx((up - down).item() / (2 * step), rel=2e-2, abs=2e-4)
    moving = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(moving) == 3 and all("lora_gate" in name for name in moving)


def test_both_methods_rank_it(tmp_path, tokenizer, dialogues):
    model = get_peft_model(tiny_llama(), ILAConfig(**OPTIONS, granularity="module", gate_mode="open"))
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=model, max_steps=4)
    trainer.train()
    before = {k: p.detach().clone() for k, p in model.named_parameters() if "lora_gate" not in k}
    attribution, descent = learn_gates(trainer, steps=4), learn_gates(trainer, method="descent", steps=4)
    assert len(set(attribution.scores)) == len(set(descent.scores)) == 21
    assert all(torch.equal(model.get_parameter(k), value) for k, value in before.items())


@pytest.mark.parametrize("granularity, mode", [("layer", "open"), ("module", "hard")])
def test_saved_loaded_and_exported_as_the_dora_adapter_that_it_is(tmp_path, input_ids, granularity, mode):
    model = gated(granularity)
    if mode == "hard":
        model.apply_mask(list(model.gates())[::2])
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path / "ila")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ila").eval()
    assert torch.equal(loaded(input_ids).logits, expected)
    model.to_lora(tmp_path / "memory")
    export_adapter(tmp_path / "ila", tmp_path / "disk")
    for path in ("memory", "disk"):
        plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / path).eval()
        assert type(plain.peft_config["default"]) is LoraConfig and plain.peft_config["default"].use_dora
        torch.testing.assert_close(plain(input_ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_dora_adapter_is_gated_in_place_and_from_disk(tmp_path, input_ids):
    model = dora()
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    config = ILAConfig.from_lora(LoraConfig.from_pretrained(tmp_path), gate_mode="open")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config).eval()
    assert torch.equal(loaded(input_ids).logits, expected)
    ila = ILAModel.from_lora(model)
    assert torch.equal(ila(input_ids).logits, expected)
    for gated_model in (ila, loaded):
        gated_model.apply_mask(UNITS[:1])
        logits = between({unit: float(unit == UNITS[0]) for unit in UNITS})(input_ids).logits
        torch.testing.assert_close(gated_model(input_ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_what_has_no_meaning_is_refused(tmp_path, tokenizer, dialogues):
    model = gated(mode="joint")
    with pytest.raises(ValueError, match="A DoRA adapter with gates between 0 and 1 cannot be exported"):
        model.to_lora(tmp_path)
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=model)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    with pytest.raises(ValueError, match="is a DoRA adapter, so its gates cannot be multiplied into B"):
        learn_gates(trainer)
    assert all(torch.equal(p, before[k]) for k, p in model.named_parameters())
    assert model.peft_config["default"].gate_mode == "joint"


class Others(nn.Module):
    """The other layers that PEFT has DoRA for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, ids):
        return self.conv(self.embed(ids).transpose(1, 2))


def test_embeddings_and_convolutions():
    ids = torch.randint(0, 9, (2, 5))
    options = {"target_modules": ["embed", "conv"], "use_dora": True, "r": 2}
    models = [
        moved(get_peft_model(Others(), config))
        for config in (ILAConfig(**options, gate_mode="soft"), LoraConfig(**options))
    ]
    base, other = Others().eval(), models[1].merge_and_unload()
    for (name, gate), score in zip(models[0].gates().items(), (-1.0, 1.0)):
        gate.weight.data.fill_(score)
        weight = base.get_submodule(name).weight
        weight.data.lerp_(other.get_submodule(name).weight.data, torch.sigmoid(gate.weight).item())
    torch.testing.assert_close(models[0](ids), base(ids), rtol=1e-4, atol=1e-5)
    models[0].merge_adapter()
    torch.testing.assert_close(models[0](ids), base(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.support("Layers", "DoRA on bitsandbytes NF4")
def test_nf4(tmp_path, input_ids):
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load(config):
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
        torch.manual_seed(0)
        return base.eval() if config is None else moved(get_peft_model(base, config))

    ila, lora = load(ILAConfig(**OPTIONS, gate_mode="open")), load(LoraConfig(**OPTIONS))
    assert torch.equal(ila(input_ids).logits, lora(input_ids).logits)
    ila.set_gate_mode("soft")
    for gate in ila.gates().values():
        gate.weight.data.fill_(-30.0)
    torch.testing.assert_close(ila(input_ids).logits, load(None)(input_ids).logits, rtol=1e-4, atol=1e-5)
