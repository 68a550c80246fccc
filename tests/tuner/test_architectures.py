"""Gates act on exactly their unit in every architecture, also where stacks share indices."""

import pytest
import torch
from conftest import tiny_llama
from models import MODELS, build
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from peft_ila import ILAConfig
from peft_ila.units import unit_of

IDS = torch.tensor([[3, 7, 4, 9, 11]])


def inputs(name):
    if name in ("t5", "bart"):
        return {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    return {"input_ids": IDS}


def output(model, name):
    result = model(**inputs(name))
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.mark.parametrize("name, granularity", [*((name, "layer") for name in MODELS), ("t5", "module")])
def test_a_mask_keeps_exactly_its_units(name, granularity):
    # LoRA takes the experts, which are parameters, to be "linear" too
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if name in ("mixtral", "olmoe") else "all-linear"
    options = {"r": 2, "target_modules": targets, "init_lora_weights": False}
    torch.manual_seed(1)
    ila = get_peft_model(build(name), ILAConfig(**options, granularity=granularity, gate_mode="open")).eval()
    torch.manual_seed(1)
    lora = get_peft_model(build(name), LoraConfig(**options)).eval()
    assert torch.equal(output(ila, name), output(lora, name))

    units = list(ila.gates())
    assert len(set(units)) == len(units)
    kept = units[1::3]
    ila.apply_mask(kept)
    closed = 0
    for key, module in lora.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and unit_of(key, granularity) not in kept:
            module.lora_B["default"].weight.data.zero_()
            closed += 1
    assert closed
    torch.testing.assert_close(output(ila, name), output(lora, name))


def test_two_stacks_are_gated_apart():
    model = get_peft_model(build("t5"), ILAConfig(r=2, target_modules=["q", "v"], init_lora_weights=False))
    assert {"encoder.block.0", "decoder.block.0"} <= set(model.gates()) and len(model.gates()) == 10
    model.set_gate_mode("soft")
    model(**inputs("t5"), labels=IDS).loss.backward()
    gradients = {unit: gate.weight.grad.item() for unit, gate in model.gates().items()}
    assert all(gradients.values()) and len(set(gradients.values())) == 10


@pytest.mark.support("Operations", "transformers' `add_adapter`")
def test_add_adapter_of_transformers(input_ids):
    model = tiny_llama()
    base = model(input_ids).logits
    model.add_adapter(ILAConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, gate_mode="soft"))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 3 and all("lora_gate" in name for name in trainable)
    assert not torch.equal(model(input_ids).logits, base)
    model.disable_adapters()
    assert torch.equal(model(input_ids).logits, base)
