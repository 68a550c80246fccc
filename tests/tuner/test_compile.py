"""`torch.compile` sees no more graph breaks than in LoRA, and compiles once for each mode."""

import pytest
import torch
import torch._dynamo as dynamo
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter

from peft_ila import ILAConfig

OPTIONS = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}


@pytest.mark.support("Operations", "`torch.compile`")
def test_graph_breaks(input_ids):
    dynamo.reset()
    lora = get_peft_model(tiny_llama(layers=1), LoraConfig(**OPTIONS))
    assert dynamo.explain(lora)(input_ids).graph_break_count == 0
    model = get_peft_model(tiny_llama(layers=1), ILAConfig(**OPTIONS, gate_mask=["model.layers.0"]))
    for mode in ("joint", "open", "soft", "hard"):
        dynamo.reset()
        model.set_gate_mode(mode)
        assert dynamo.explain(model)(input_ids).graph_break_count == 0


@pytest.mark.support("Operations", "`torch.compile`")
def test_probed_gates(input_ids):
    dynamo.reset()
    model = get_peft_model(tiny_llama(layers=1), ILAConfig(**OPTIONS, gate_mode="soft"))
    for gate in model.gates().values():
        gate.state = "probed"
    gradients = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        forward(input_ids, labels=input_ids).loss.backward()
        gradients.append(torch.cat([gate.weight.grad for gate in model.gates().values()]))
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])
    assert (gradients[0] != 0).all()


@pytest.mark.support("Operations", "`torch.compile`")
def test_one_compilation_for_each_mode(input_ids):
    dynamo.reset()
    model = get_peft_model(tiny_llama(layers=1), ILAConfig(**OPTIONS))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for repetition in range(2):
        for number, mode in enumerate(("joint", "open", "soft"), start=1):
            model.set_gate_mode(mode)
            torch.testing.assert_close(compiled(input_ids).logits, model(input_ids).logits)
            assert counter.frame_count == (number if repetition == 0 else 3)
    for gate in model.gates().values():
        gate.weight.data.fill_(0.3)
    torch.testing.assert_close(compiled(input_ids).logits, model(input_ids).logits)
    assert counter.frame_count == 3
