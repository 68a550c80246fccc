"""Experts that transformers fuses into parameters, and what else `target_parameters` reaches."""

import copy

import pytest
import torch
from conftest import tiny_llama
from models import SMALL, adapted, ranked
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from trainers import plain_trainer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from peft_ila import ILAConfig, ILAModel, LayerImportance, learn_gates
from peft_ila.export.plain import export_adapter
from peft_ila.tuner.layer import is_gated, target_name
from peft_ila.units import unit_of

BASE = {**SMALL, "num_hidden_layers": 3}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "qk_nope_head_dim": 4,
    "moe_intermediate_size": 8,
}
QWEN = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [0]}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# and the arguments that reach their experts
MODELS = {
    "mixtral": (MixtralConfig(**BASE, num_local_experts=2), {"target_modules": "all-linear"}),
    "qwen3_moe": (Qwen3MoeConfig(**BASE, **QWEN), {"target_modules": "all-linear"}),
    "deepseek_v3": (DeepseekV3Config(**BASE, **DEEPSEEK), {"target_modules": "all-linear"}),
    "gpt_oss": (
        GptOssConfig(**BASE, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
        {"target_modules": "all-linear", "target_parameters": EXPERTS},
    ),
    "llama4": (
        Llama4TextConfig(**BASE, head_dim=8, intermediate_size_mlp=32, num_local_experts=2),
        {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS},
    ),
}
IDS = torch.randint(1, 32, (2, 7), generator=torch.Generator().manual_seed(0))
PREFIX = "base_model.model."


def build(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name][0])).eval()


def options(name):
    return {"r": 2, "init_lora_weights": False, **copy.deepcopy(MODELS[name][1])}


def gated(name, granularity="module", mode="open", **kwargs):
    model = build(name)
    torch.manual_seed(1)
    return get_peft_model(model, ILAConfig(**options(name), granularity=granularity, gate_mode=mode, **kwargs)).eval()


def outputs(model):
    with torch.no_grad():
        return model(IDS).logits


marks = {name: pytest.mark.support("Architectures", f"fused experts of `{name}`") for name in MODELS}
every_model = pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in MODELS])


@every_model
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_adapts_what_lora_adapts(name, granularity):
    torch.manual_seed(1)
    lora = get_peft_model(build(name), LoraConfig(**options(name))).eval()
    ila = gated(name, granularity)
    assert adapted(ila) == adapted(lora)
    assert any(isinstance(module, ParamWrapper) for module in ila.modules())
    torch.manual_seed(2)
    for key, parameter in lora.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(0, 0.1)
            ila.get_parameter(key).data.copy_(parameter.data)
    assert torch.equal(outputs(ila), outputs(lora))  # "open" is LoRA, bit for bit
    units = ila.layer_importance().units
    expected = {f"model.layers.{i}" for i in range(3)} if granularity == "layer" else adapted(lora)
    assert set(units) == expected


@every_model
def test_gates_and_masks(name):
    """Against LoRA whose B is multiplied by hand."""
    model = gated(name, mode="soft")
    torch.manual_seed(2)
    scores = {unit: torch.randn(()).item() for unit in model.gates()}
    for unit, gate in model.gates().items():
        gate.weight.data.fill_(scores[unit])
    kept = list(scores)[::2]
    for mode in ("soft", "hard"):
        if mode == "hard":
            model.apply_mask(kept)
        lora = gated(name)
        for (_, unit, own), (*_, other) in zip(lora._gated_layers("default"), model._gated_layers("default")):
            gamma = torch.tensor(scores[unit]).sigmoid() if mode == "soft" else float(unit in kept)
            own.lora_A["default"].weight.data.copy_(other.lora_A["default"].weight)
            own.lora_B["default"].weight.data.copy_(other.lora_B["default"].weight * gamma)
        torch.testing.assert_close(outputs(model), outputs(lora), rtol=1e-4, atol=1e-5)
        merged = copy.deepcopy(model)
        merged.merge_adapter()
        torch.testing.assert_close(outputs(merged), outputs(model), rtol=1e-4, atol=1e-5)
        merged.unmerge_adapter()
        torch.testing.assert_close(outputs(merged), outputs(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(model), outputs(gated(name)), atol=1e-3)


@every_model
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_the_probe_is_the_slope_at_the_base_model(name, granularity):
    """Against PEFT's LoRA whose B is multiplied by one leaf for each unit, at 0."""
    model = gated(name, granularity, mode="soft")
    for gate in model.gates().values():
        gate.state = "probed"
    model(IDS, labels=IDS).loss.backward()
    found = torch.stack([gate.weight.grad[0] for gate in model.gates().values()])

    lora = get_peft_model(build(name), LoraConfig(**options(name))).eval()
    lora.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_gate" not in k})
    leaves = {unit: torch.zeros((), requires_grad=True) for unit in model.gates()}
    weights = {}
    for path, module in lora.named_modules():
        if hasattr(module, "lora_A"):
            leaf = leaves[unit_of(target_name(path.removeprefix(PREFIX), module), granularity)]
            key = f"{path}.lora_B.default.weight"
            weights[key] = lora.get_parameter(key).detach() * leaf
    torch.func.functional_call(lora, weights, args=(IDS,), kwargs={"labels": IDS}).loss.backward()
    expected = torch.stack([leaf.grad for leaf in leaves.values()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert (expected != 0).any()


@every_model
def test_learn_gates(tmp_path, tokenizer, dialogues, name):
    model = build(name)
    model.resize_token_embeddings(64)
    config = ILAConfig(r=2, granularity="module", gate_mode="open", **copy.deepcopy(MODELS[name][1]))
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=get_peft_model(model, config), max_steps=4)
    trainer.train()
    before = {k: p.detach().clone() for k, p in trainer.model.named_parameters() if "lora_gate" not in k}
    importance = learn_gates(trainer, steps=4)
    assert all(torch.equal(trainer.model.get_parameter(k), value) for k, value in before.items())
    experts = [importance.scores[i] for i, unit in enumerate(importance.units) if "experts." in unit]
    assert len(set(experts)) == len(experts) > 0 and any(score != -1 for score in experts)
    descent = learn_gates(trainer, method="descent", steps=4)
    assert any(score != 4.0 for unit, score in zip(descent.units, descent.scores) if "experts." in unit)


@pytest.mark.support("Quantisation", "NF4 with fused experts, which stay as they are")
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_experts_beside_4_bit_modules(tmp_path, tokenizer, dialogues, name):
    pytest.importorskip("bitsandbytes")
    model = build(name)
    model.resize_token_embeddings(64)
    model.save_pretrained(tmp_path / "model")

    def load():
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", dtype=torch.float32, device_map="cpu", quantization_config=nf4
        )

    assert any(type(module).__name__ == "Linear4bit" for module in load().modules())
    torch.manual_seed(1)
    lora = get_peft_model(load(), LoraConfig(**options(name))).eval()
    torch.manual_seed(1)
    model = get_peft_model(load(), ILAConfig(**options(name), granularity="module", gate_mode="open")).eval()
    assert adapted(model) == adapted(lora)
    for key, parameter in lora.named_parameters():
        if "lora_" in key:
            model.get_parameter(key).data.copy_(parameter.data)
    assert torch.equal(outputs(model), outputs(lora))

    config = ILAConfig(r=2, granularity="module", gate_mode="open", **copy.deepcopy(MODELS[name][1]))
    model = get_peft_model(load(), config)
    trainer = plain_trainer(tmp_path / "out", tokenizer, dialogues, model=model, max_steps=4)
    trainer.train()
    before = outputs(model.eval())
    importance = learn_gates(trainer, steps=4)
    assert {type(score) for score in importance.scores} == {float} and set(importance.units) == adapted(lora)
    model.apply_mask(importance.select(top_p=0.4))
    model.to_lora(tmp_path / "plain")
    plain = PeftModel.from_pretrained(load(), tmp_path / "plain").eval()
    torch.testing.assert_close(outputs(plain), outputs(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(model), before, atol=1e-4)


@every_model
@pytest.mark.parametrize(
    "granularity, mode", [("module", "soft"), ("module", "hard"), ("module", "hard one"), ("layer", "hard")]
)
def test_the_plain_adapter_computes_the_same(tmp_path, name, granularity, mode):
    model = gated(name, granularity)
    torch.manual_seed(2)
    for gate in model.gates().values():
        gate.weight.data.normal_()
    if mode.startswith("hard"):
        importance = model.layer_importance()
        experts = [unit for unit in importance.ranking() if "expert" in unit] or importance.ranking()
        model.apply_mask(experts[:1] if mode == "hard one" else importance.select(top_p=0.4))
    else:
        model.set_gate_mode(mode)
    model.to_lora(tmp_path / "memory")
    model.save_pretrained(tmp_path / "ila")
    export_adapter(tmp_path / "ila", tmp_path / "disk")
    assert (outputs(model) - outputs(build(name))).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(build(name), tmp_path / "ila")
    assert torch.equal(outputs(loaded), outputs(model))
    for path in ("memory", "disk"):
        plain = PeftModel.from_pretrained(build(name), tmp_path / path).eval()
        assert type(plain.peft_config["default"]) is LoraConfig
        torch.testing.assert_close(outputs(plain), outputs(model), rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_exactly_the_selected_are_injected(tmp_path, name, granularity):
    importance = ranked(build(name), granularity, **copy.deepcopy(MODELS[name][1]))
    importance.save(tmp_path / "importance.json")
    importance = LayerImportance.load(tmp_path / "importance.json")
    assert importance.parameters and importance.metadata["model_type"]
    ranks = {}
    full = get_peft_model(build(name), LoraConfig(**options(name)))
    for path, module in full.named_modules():
        if hasattr(module, "lora_A"):
            ranks[target_name(path.removeprefix(PREFIX), module)] = (module.r["default"], module.scaling["default"])
    for share in (0.3, 1.0):
        selected = importance.select(top_p=share)
        expected = {module for unit in selected for module in importance.modules[unit]}
        for model in (None, build(name), build(name).config):
            config = importance.to_lora_config(top_p=share, r=2, model=model)
            config.save_pretrained(tmp_path)
            plain = get_peft_model(build(name), LoraConfig.from_pretrained(tmp_path))
            assert adapted(plain) == expected
            for path, module in plain.named_modules():
                if hasattr(module, "lora_A"):
                    unit = target_name(path.removeprefix(PREFIX), module)
                    assert (module.r["default"], module.scaling["default"]) == ranks[unit]


def test_shared_experts_are_reached_as_parameters():
    """PEFT takes their names in `target_modules` for the fused experts; as the ranking is, so is its configuration."""
    shared = [f"model.layers.{i}.mlp.shared_experts.{n}_proj.weight" for i in (1, 2) for n in ("gate", "up", "down")]
    options = {"target_modules": ["o_proj"], "target_parameters": shared}
    importance = ranked(build("deepseek_v3"), "module", **options)
    assert set(shared) < set(importance.units)
    for model in (None, build("deepseek_v3")):
        config = importance.to_lora_config(top_p=1.0, model=model)
        assert adapted(get_peft_model(build("deepseek_v3"), config)) == set(importance.units)


@pytest.mark.parametrize("at_hand", [False, True])
def test_a_ranking_of_modules_that_peft_cannot_name_is_refused(at_hand):
    units = [f"model.layers.{i}.mlp.shared_experts.up_proj" for i in (1, 2)]
    importance = LayerImportance(units, [1.0, 0.0], {"model_type": "deepseek_v3"})
    with pytest.raises(
        ValueError, match=r"no way to target exactly .* Rank the weights of such modules as parameters"
    ):
        importance.to_lora_config(top_k=1, model=build("deepseek_v3") if at_hand else None)


def test_lora_on_experts_is_gated_in_place_and_from_disk(tmp_path):
    torch.manual_seed(1)
    lora = get_peft_model(build("qwen3_moe"), LoraConfig(**options("qwen3_moe"))).eval()
    expected, targets = outputs(lora), adapted(lora)
    lora.save_pretrained(tmp_path)
    ila = ILAModel.from_lora(lora, granularity="module")
    assert set(ila.gates()) == targets and torch.equal(outputs(ila), expected)
    config = ILAConfig.from_lora(LoraConfig.from_pretrained(tmp_path), granularity="layer", gate_mode="open")
    loaded = PeftModel.from_pretrained(build("qwen3_moe"), tmp_path, config=config)
    torch.testing.assert_close(outputs(loaded), expected)
    assert list(loaded.gates()) == [f"model.layers.{i}" for i in range(3)]


def test_two_adapters():
    model = gated("mixtral")
    first = outputs(model)
    torch.manual_seed(5)
    model.add_adapter("other", ILAConfig(**options("mixtral"), granularity="layer", gate_mode="open"))
    assert torch.equal(outputs(model), first)
    model.set_adapter("other")
    assert len(model.gates()) == 3
    other = outputs(model)
    model.apply_mask(["model.layers.1"])
    assert not torch.equal(outputs(model), other)
    model.base_model.set_adapter(["default", "other"])
    for adapter in ("default", "other"):
        model.set_gate_mode("open", adapter)
    both = outputs(model)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize("how", ["deleted", "adapted again"])
def test_a_name_used_again_starts_anew(tmp_path, how, granularity):
    model = gated("mixtral", "module", "soft", gate_init=-2.0)
    config = ILAConfig(**options("mixtral"), granularity=granularity, gate_mode="soft", gate_init=-1.0)
    if how == "deleted":
        model.delete_adapter("default")
        model.add_adapter("default", config)
        model.set_adapter("default")
    else:
        model = get_peft_model(model.get_base_model(), config)
    fresh = gated("mixtral", granularity, "soft")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(model.eval()), outputs(fresh))
    assert len(set(map(id, model.gates().values()))) == len(fresh.gates())
    model.to_lora(tmp_path)
    plain = PeftModel.from_pretrained(build("mixtral"), tmp_path).eval()
    torch.testing.assert_close(outputs(plain), outputs(model), rtol=1e-4, atol=1e-5)


def test_unselected_experts_are_frozen():
    importance = ranked(build("mixtral"), "module", target_modules="all-linear")
    model = build("mixtral")
    frozen = importance.freeze_unselected(model, top_p=0.5)
    selected = set(importance.select(top_p=0.5))
    assert {name for name in importance.parameters if name not in selected} <= set(frozen)
    for name, parameter in model.named_parameters():
        own = name if name in importance.parameters else name.removesuffix(".weight")
        assert parameter.requires_grad == (own in selected)


class Stack(nn.Module):
    """A parameter of two dimensions, and a module with two parameters, one of which is targeted."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Parameter(torch.randn(6, 5) / 3)
        self.cube = nn.Parameter(torch.randn(2, 6, 4) / 3)

    def forward(self, x):
        return torch.einsum("bi,eio->beo", torch.tanh(x @ self.flat.T), self.cube).sum(1)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Stack() for _ in range(2))

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


@pytest.mark.parametrize("targets", [["flat"], ["cube", "flat"]])
def test_any_parameter(tmp_path, targets):
    x = torch.randn(3, 5)
    options = {"target_parameters": targets, "init_lora_weights": False, "r": 2}
    model = get_peft_model(Layers(), ILAConfig(**options, granularity="module", gate_mode="soft"))
    assert set(model.gates()) == {f"layers.{i}.{name}" for i in range(2) for name in targets}
    model(x).sum().backward()
    assert all(gate.weight.grad != 0 for gate in model.gates().values())
    assert {name.rpartition(".lora_gate")[0] for name, p in model.named_parameters() if p.grad is not None} == {
        name.rpartition(".lora_gate")[0] for name, _ in model.named_parameters() if "lora_gate" in name
    }
    model.apply_mask(["layers.1.flat"])
    model.to_lora(tmp_path)
    plain = PeftModel.from_pretrained(Layers(), tmp_path)
    torch.testing.assert_close(plain(x), model(x))
    assert adapted(plain) == {"layers.1.flat"}


def test_dropout_is_refused_as_by_lora():
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        get_peft_model(build("mixtral"), ILAConfig(target_modules="all-linear", lora_dropout=0.1))


def test_models_without_experts_stay_as_they_were():
    model = get_peft_model(tiny_llama(), ILAConfig(target_modules="all-linear", granularity="module"))
    importance = model.layer_importance()
    assert importance.parameters == {} and model.peft_config["default"].gated_parameters is None
    assert sum(is_gated(module) for module in model.modules()) == 21
