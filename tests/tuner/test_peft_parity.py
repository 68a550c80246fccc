"""What PEFT does for adapters of the type LORA only, so that ILA does not get it by inheritance."""

import pytest
import torch
from conftest import tiny_llama
from models import adapted, build
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from transformers import FalconMambaConfig, FalconMambaForCausalLM

from peft_ila import ILAConfig


def test_mamba_modules_whose_weight_is_read_directly_are_refused():
    model = FalconMambaForCausalLM(FalconMambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=64))
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        get_peft_model(model, ILAConfig(target_modules=["out_proj"]))


def test_saving_a_shard_warns(llama, tmp_path):
    model = get_peft_model(llama, ILAConfig(target_modules=["q_proj"], r=4))
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
    q_proj.lora_A["default"].weight.data = torch.zeros(128)  # as ZeRO-3 leaves it
    with pytest.warns(UserWarning, match="ZeRO-3 / FSDP shards"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "w1", "w2", "w3"], r".*\.(q_proj|w2)"])
def test_experts_that_lora_reaches_are_reached(targets):
    lora = get_peft_model(build("mixtral"), LoraConfig(target_modules=targets))
    assert lora.base_model.targeted_parameter_names
    model = get_peft_model(build("mixtral"), ILAConfig(target_modules=targets, granularity="module"))
    assert set(model.gates()) == adapted(model) == adapted(lora)


def test_gated_layers_are_printed_as_those_of_lora(llama):
    model = get_peft_model(llama, ILAConfig(target_modules=["q_proj"]))
    assert str(type(model.model.model.layers[0].self_attn.q_proj)) == "<class 'peft.tuners.lora.layer.Linear'>"


@pytest.mark.support("Operations", "`create_lorafa_optimizer`")
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_lorafa_takes_the_same_steps(input_ids, granularity):
    options = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}
    trained = []
    for config in (
        LoraConfig(**options),
        ILAConfig(**options, granularity=granularity, gate_mode="open"),
        ILAConfig(**options, granularity=granularity),
    ):
        model = tiny_llama()
        torch.manual_seed(0)
        model = get_peft_model(model, config)
        optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=0.01)
        for _ in range(2):
            model(input_ids, labels=input_ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(dict(model.named_parameters()))
    lora, ila, joint = trained
    for name, parameter in ila.items():
        assert torch.equal(parameter, torch.tensor([4.0]) if "lora_gate" in name else lora[name])
    moved = {name for name, parameter in joint.items() if not torch.equal(parameter, ila[name])}
    assert {name for name in ila if "lora_B" in name or "lora_gate" in name} <= moved
