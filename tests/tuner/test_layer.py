"""The gate inside a LoRA layer, against references computed without peft-ila."""

import copy
import pickle

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ila import ILAConfig
from peft_ila.tuner.layer import Gate, is_gated
from peft_ila.units import unit_of

OPTIONS = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}


def gated_and_lora(dtype=torch.float32, **options):
    """An ILA model and a LoRA model with the same weights."""
    models = []
    for config in (ILAConfig(**OPTIONS, **options), LoraConfig(**OPTIONS)):
        base = tiny_llama().to(dtype)
        torch.manual_seed(1)
        models.append(get_peft_model(base, config, autocast_adapter_dtype=False))
    return models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_open_is_lora_bit_for_bit(dtype, granularity, input_ids):
    ila, lora = gated_and_lora(dtype, granularity=granularity, gate_mode="open")
    outputs = [model(input_ids, labels=input_ids) for model in (ila, lora)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    gradients = dict(lora.named_parameters())
    for name, parameter in ila.named_parameters():
        if "lora_gate" in name:
            assert parameter.grad is None and not parameter.requires_grad
        elif parameter.requires_grad:
            assert torch.equal(parameter.grad, gradients[name].grad)


class ReferenceLinear(nn.Module):
    """base + γ·(α/r)·B·A·x, written down anew."""

    def __init__(self, lora_layer, gamma):
        super().__init__()
        self.base = lora_layer.base_layer
        self.a = lora_layer.lora_A["default"].weight.detach()
        self.b = lora_layer.lora_B["default"].weight.detach()
        self.scale = OPTIONS["lora_alpha"] / OPTIONS["r"]
        self.gamma = gamma

    def forward(self, x):
        return self.base(x) + self.gamma * (self.scale * (x @ (self.b @ self.a).T))


def replace_by_reference(lora, gammas, granularity):
    """The base model of a LoRA model, with `ReferenceLinear` in place of the LoRA layers."""
    reference = lora.base_model.model
    for name, module in list(reference.named_modules()):
        if hasattr(module, "lora_A"):
            parent, _, child = name.rpartition(".")
            gamma = gammas[unit_of(name, granularity)]
            setattr(reference.get_submodule(parent), child, ReferenceLinear(module, gamma))
    return reference


@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize("mode", ["soft", "joint"])
def test_score_gradients_match_a_float64_reference(granularity, mode, input_ids):
    ila, lora = gated_and_lora(torch.float64, granularity=granularity, gate_mode=mode)
    gates = ila.gates()
    generator = torch.Generator().manual_seed(3)
    values = {unit: torch.randn(1, generator=generator, dtype=torch.float64) * 2 for unit in gates}
    for unit, gate in gates.items():
        gate.weight.data = values[unit].clone()

    scores = {unit: value.clone().requires_grad_() for unit, value in values.items()}
    gammas = {unit: 1 / (1 + torch.exp(-score)) for unit, score in scores.items()}
    reference = replace_by_reference(lora, gammas, granularity)

    output = ila(input_ids, labels=input_ids)
    expected = reference(input_ids, labels=input_ids)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-12, atol=1e-12)
    output.loss.backward()
    expected.loss.backward()
    assert len(gates) == (3 if granularity == "layer" else 21)
    for unit, gate in gates.items():
        torch.testing.assert_close(gate.weight.grad, scores[unit].grad, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_soft_goes_through_a_lora_b_that_others_changed(how, input_ids):
    ila, _ = gated_and_lora(gate_mode="soft")
    expected = ila(input_ids).logits
    calls = change_lora_b(ila, how)
    torch.testing.assert_close(ila(input_ids).logits, expected)
    assert len(calls) == len(set(calls)) == 21


def change_lora_b(ila, how):
    """As FSDP does, which gathers weights in hooks, and accelerate, which replaces `forward`."""
    calls = []
    for module in [module for name, module in ila.named_modules() if name.endswith("lora_B.default")]:
        if how == "hook":
            module.register_forward_hook(lambda module, args, output: calls.append(module))
        elif how == "pre-hook":
            module.register_forward_pre_hook(lambda module, args: calls.append(module))
        elif how == "forward":
            module.forward = lambda x, own=module, forward=module.forward: calls.append(own) or forward(x)
    return calls


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 4, 8), (0, 8)])
def test_soft_takes_inputs_of_any_shape(shape):
    config = ILAConfig(r=2, target_modules=["0"], gate_mode="soft", gate_init=0.0, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 5)), config)
    layer = model.base_model.model[0]
    x = torch.randn(shape)
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(model(x), layer.base_layer(x) + x @ delta.T / 2)


@pytest.mark.parametrize("autocast", [True, False])
def test_soft_with_an_adapter_in_fp32_on_a_bf16_base(autocast, input_ids):
    ila, lora = gated_and_lora(torch.bfloat16, granularity="module", gate_mode="soft", gate_init=0.0)
    for model in (ila, lora):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    for name, module in lora.named_modules():
        if name.endswith("lora_B.default"):
            module.weight.data /= 2  # σ(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, expected = ila(input_ids).logits, lora(input_ids).logits
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)


def test_two_active_adapters_in_soft(input_ids):
    ila, _ = gated_and_lora(gate_mode="soft")
    ila.add_adapter("other", ILAConfig(**OPTIONS, gate_mode="soft"))
    with torch.no_grad():
        ila.base_model.set_adapter(["default", "other"])
        both = ila(input_ids).logits
        ila.merge_adapter()
        torch.testing.assert_close(both, ila(input_ids).logits)


# ---------------------------------------------------------------------------------------------------------------------
# Probed gates
# ---------------------------------------------------------------------------------------------------------------------


def probe(model):
    model.set_gate_mode("soft")
    for gate in model.gates().values():
        gate.state = "probed"
    return model


@pytest.mark.parametrize("changed", [None, "hook", "pre-hook", "forward"])
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_probed_gates_are_closed_and_have_their_gradient_at_zero(granularity, changed, input_ids):
    ila, lora = gated_and_lora(torch.float64, granularity=granularity)
    with torch.no_grad(), lora.disable_adapter():
        base = lora(input_ids).logits
    gammas = {unit: torch.zeros(1, dtype=torch.float64, requires_grad=True) for unit in ila.gates()}
    replace_by_reference(lora, gammas, granularity)(input_ids, labels=input_ids).loss.backward()

    probe(ila)
    calls = change_lora_b(ila, changed)
    output = ila(input_ids, labels=input_ids)
    assert torch.equal(output.logits, base)
    output.loss.backward()
    for unit, gate in ila.gates().items():
        torch.testing.assert_close(gate.weight.grad, gammas[unit].grad, rtol=1e-5, atol=1e-9)
    assert len(calls) == len(set(calls)) == (21 if changed else 0)


@pytest.mark.parametrize("autocast", [True, False])
def test_probed_gates_in_bf16(autocast, input_ids):
    """An adapter in fp32, as PEFT makes it, on a bf16 model, against the same weights in fp32."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        ila, _ = gated_and_lora(torch.bfloat16, granularity="module")
        for name, parameter in ila.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "lora_" in name else dtype)
        probe(ila)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            output = ila(input_ids, labels=input_ids)
        output.loss.backward()
        assert all(gate.weight.grad.dtype == torch.float32 for gate in ila.gates().values())
        gradients.append(torch.cat([gate.weight.grad for gate in ila.gates().values()]))
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 4, 8), (0, 8)])
def test_probed_gates_take_inputs_of_any_shape_and_outputs_changed_in_place(shape):
    config = ILAConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = probe(get_peft_model(nn.Sequential(nn.Linear(8, 5), nn.ReLU(inplace=True)), config))
    layer, gate = model.base_model.model[0], model.gates()["0"]
    x = torch.randn(shape)
    output = model(x)
    assert torch.equal(output, layer.base_layer(x).relu())
    output.sum().backward()
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(gate.weight.grad, ((x @ delta.T) * (output > 0)).sum().reshape(1))


@pytest.mark.parametrize("probed", [False, True])
def test_no_gradient_but_the_scores_and_none_below_the_first_gated_layer(probed, input_ids):
    options = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2], "lora_dropout": 0.5}
    model = get_peft_model(tiny_llama(), ILAConfig(**{**OPTIONS, **options}, gate_mode="soft"))
    if probed:
        probe(model)
    carries = []
    for layer in model.base_model.model.model.layers:
        layer.register_forward_hook(lambda module, args, output: carries.append(output.requires_grad))
    model.train()
    first, second = (model(input_ids, labels=input_ids).loss for _ in range(2))
    assert carries == [False, True, True] * 2
    assert first == second  # no dropout
    first.backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(g.weight) for g in model.gates().values()}


def test_probed_gates_of_an_adapter_that_is_off(input_ids):
    ila, lora = gated_and_lora()
    probe(ila)
    with ila.disable_adapter(), lora.disable_adapter():
        output = ila(input_ids).logits
        assert torch.equal(output, lora(input_ids).logits) and not output.requires_grad


def test_a_closed_gate_hides_what_is_not_finite(input_ids):
    ila, _ = gated_and_lora()
    for name, module in ila.named_modules():
        if name.endswith("lora_A.default") and ".layers.0." in name:
            module.weight.data.fill_(float("inf"))
    ila.apply_mask(["model.layers.1"])
    assert torch.isfinite(ila(input_ids).logits).all()


@pytest.mark.support("Operations", "gradient checkpointing, reentrant and not")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("probed", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, probed, input_ids):
    ila, _ = gated_and_lora(gate_mode="soft")
    if probed:
        probe(ila)
    ila.train()
    ila(input_ids, labels=input_ids).loss.backward()
    expected = [gate.weight.grad.clone() for gate in ila.gates().values()]
    ila.zero_grad()
    ila.enable_input_require_grads()
    ila.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ila(input_ids, labels=input_ids).loss.backward()
    for gate, gradient in zip(ila.gates().values(), expected):
        torch.testing.assert_close(gate.weight.grad, gradient)


@pytest.mark.support("Operations", "deepcopy, pickle")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_copies_are_whole_and_apart(duplicate, granularity, input_ids):
    ila, _ = gated_and_lora(granularity=granularity)
    expected = ila(input_ids).logits
    twin = duplicate(ila)
    assert torch.equal(twin(input_ids).logits, expected)
    gates, theirs = ila.gates(), twin.gates()
    assert gates.keys() == theirs.keys()
    assert not {id(gate) for gate in gates.values()} & {id(gate) for gate in theirs.values()}
    for gate in theirs.values():
        gate.weight.data.fill_(-50.0)
    assert torch.equal(ila(input_ids).logits, expected)
    with ila.disable_adapter():
        torch.testing.assert_close(twin(input_ids).logits, ila(input_ids).logits)


def test_bf16_activations_stay_bf16():
    gate = Gate(4.0)
    assert gate(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert gate.weight.shape == (1,) and gate.weight.dtype == torch.float32


@pytest.mark.support("Operations", "autocast")
def test_autocast(input_ids):
    ila, lora = gated_and_lora(gate_mode="open")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ila(input_ids).logits, lora(input_ids).logits)
        ila.set_gate_mode("soft")
        ila(input_ids, labels=input_ids).loss.backward()
    assert all(gate.weight.grad.dtype == torch.float32 for gate in ila.gates().values())


class Layers(nn.Module):
    """Every layer type that PEFT's LoRA has, besides the quantised ones."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.linear = nn.Linear(8, 8)
        self.conv1d = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2d = nn.Conv2d(1, 1, 3, padding=1)
        self.conv3d = nn.Conv3d(1, 1, 3, padding=1)
        self.transposed = Conv1D(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.linear(self.embedding(x))
        x = self.conv1d(x.transpose(1, 2)).transpose(1, 2)
        x = self.conv2d(x[:, None])[:, 0]
        x = self.conv3d(x[:, None, None])[:, 0, 0]
        x = self.transposed(x)
        return self.attention(x, x, x)[0]


LAYER_TYPES = {
    "embedding": "`Embedding`",
    "linear": "`Linear`",
    "conv1d": "`Conv1d`",
    "conv2d": "`Conv2d`",
    "conv3d": "`Conv3d`",
    "transposed": "transformers `Conv1D`",
    "attention": "`MultiheadAttention`",
}


def layer_types(*targets):
    return [
        pytest.param(target, marks=pytest.mark.support("Layer types", LAYER_TYPES[target]), id=target)
        for target in targets
    ]


@pytest.mark.parametrize("target", layer_types("embedding", "linear", "conv1d", "conv2d", "conv3d", "transposed"))
def test_mixed_adapter_batches_are_gated(target):
    x = torch.arange(10).reshape(2, 5)
    torch.manual_seed(0)
    config = ILAConfig(r=4, target_modules=[target], init_lora_weights=False)
    model = get_peft_model(Layers(), config).eval()
    model.add_adapter("other", config)
    expected = []
    for name, score in (("default", -1.0), ("other", 0.5)):
        model.set_adapter(name)
        for gate in model.gates().values():
            gate.weight.data.fill_(score)
        expected.append(model(x))
    mixed = model(torch.cat([x, x, x]), adapter_names=["other"] * 2 + ["__base__"] * 2 + ["default"] * 2)
    with model.disable_adapter():
        base = model(x)
    torch.testing.assert_close(mixed, torch.cat([expected[1], base, expected[0]]))


@pytest.mark.parametrize("target", layer_types(*LAYER_TYPES))
def test_every_layer_type_is_gated(target):
    x = torch.arange(10).reshape(2, 5)
    models = []
    for config in (
        ILAConfig(r=4, target_modules=[target], init_lora_weights=False, gate_mode="open"),
        LoraConfig(r=4, target_modules=[target], init_lora_weights=False),
    ):
        torch.manual_seed(0)
        models.append(get_peft_model(Layers(), config).eval())
    ila, lora = models
    assert any(is_gated(module) for module in ila.modules())
    with torch.no_grad():
        with lora.disable_adapter():
            base = lora(x)
        assert torch.equal(ila(x), lora(x))
        ila.set_gate_mode("soft")
        for gate in ila.gates().values():
            gate.weight.fill_(-0.7)
        for module in lora.modules():
            if hasattr(module, "scaling"):
                module.scaling["default"] *= torch.sigmoid(torch.tensor(-0.7)).item()
        output = ila(x)
        torch.testing.assert_close(output, lora(x))
        assert not torch.equal(output, base)
        merged = copy.deepcopy(ila).merge_and_unload()
        torch.testing.assert_close(merged(x), output)
    assert list(ila.gates()) == [target]
    gate = ila.gates()[target]
    ila(x).sum().backward()
    assert gate.weight.grad.abs() > 0
    # near γ = 0, where the gradient of the score is γ times that of γ
    gate.weight.grad, gate.weight.data = None, torch.tensor([-12.0])
    ila(x).square().sum().backward()
    expected = gate.weight.grad / torch.sigmoid(gate.weight)
    gate.weight.grad = None
    output = probe(ila)(x)
    torch.testing.assert_close(output, base)
    output.square().sum().backward()
    torch.testing.assert_close(gate.weight.grad, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("how", ["deleted", "adapted again", "adapted by LoRA"])
@pytest.mark.parametrize("target", LAYER_TYPES)
def test_a_name_used_again_starts_anew(target, how):
    x = torch.arange(10).reshape(2, 5)
    options = {"r": 4, "target_modules": [target], "init_lora_weights": False}
    torch.manual_seed(0)
    model = get_peft_model(Layers(), ILAConfig(**options, gate_init=-1.0))
    model.add_adapter("other", ILAConfig(**options))
    config = LoraConfig(**options) if "LoRA" in how else ILAConfig(**options, gate_init=-0.7)
    if how == "deleted":
        model.delete_adapter("default")
        assert not any(".default" in name for name, _ in model.named_modules())
        model.add_adapter("default", config)
        model.set_adapter("default")
        model.delete_adapter("other")
    else:
        model.delete_adapter("other")
        model = get_peft_model(model.get_base_model(), config)
    model.eval()
    torch.manual_seed(0)
    lora = get_peft_model(Layers(), LoraConfig(**options)).eval()
    state = model.state_dict()
    scores = [state.pop(name) for name in list(state) if "lora_gate" in name]
    assert scores == ([] if "LoRA" in how else [torch.tensor([-0.7])])
    lora.load_state_dict(state)
    for module in lora.modules():
        if hasattr(module, "scaling") and scores:
            module.scaling["default"] *= torch.sigmoid(scores[0]).item()
    with torch.no_grad():
        expected = lora(x)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model.merge_and_unload()(x), expected)
