"""Adapters without some of their directions: equal to what a dense SVD leaves of each delta, loaded by plain PEFT."""

import copy
import json

import pytest
import torch
from conftest import tiny_llama
from models import build
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_ila import ILAConfig
from peft_ila.search.directions import Directions, singular_directions

LINEAR = ["q_proj", "v_proj", "down_proj"]
OPTIONS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 3},
    "`rank_pattern`, `alpha_pattern`": {
        "rank_pattern": {"q_proj": 6, r"layers\.1.*v_proj": 2},
        "alpha_pattern": {"v_proj": 5},
    },
    "a rank above the width of a module": {"r": 40},
    "`modules_to_save`": {"modules_to_save": ["lm_head"]},
    "trained biases": {"bias": "lora_only"},
    "embeddings": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
    "gates of layers": {"granularity": "layer"},
    "a regular expression as target": {"target_modules": r".*\.(q_proj|up_proj)"},
    "a single target": {"target_modules": ["q_proj"]},
}


def refused(row: str):
    return pytest.mark.support("Pruning", row, refused=True)


def gated(model, **options):
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "granularity": "module", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, ILAConfig(init_lora_weights=False, gate_mode="open", **{**config, **options}))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or (name.endswith(".base_layer.bias") and parameter.requires_grad):
            parameter.data.normal_(std=0.1)
        if "lora_" in name and "_B" in name:
            parameter.data *= 0.2
    return model.eval()


def assert_same(outputs: torch.Tensor, expected: torch.Tensor) -> None:
    assert (outputs - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))


def random_gates(directions: Directions) -> torch.Tensor:
    """Half of the directions off, at least one whole module, the rest on with any γ."""
    generator = torch.Generator().manual_seed(2)
    gates = torch.rand(len(directions.modules), generator=generator) * 2
    gates[torch.rand(len(gates), generator=generator) < 0.5] = 0
    gates[[name == directions.modules[0] for name in directions.modules]] = 0
    return gates


def by_dense_svd(model, gates: torch.Tensor):
    """The base model with Σ γ_k·s_k·u_k·v_kᵀ added to each adapted weight, of the SVD of PEFT's own dense delta."""
    merged = copy.deepcopy(model)
    rest = gates
    for layer in list(merged.base_model.model.modules()):
        if not hasattr(layer, "gates"):
            continue
        delta = layer.get_delta_weight("default").double()
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        rank = layer.r["default"]
        own, rest = rest[:rank].double(), rest[rank:]
        known = min(rank, len(s))
        layer.get_base_layer().weight.data += ((u[:, :known] * s[:known] * own[:known]) @ vh[:known]).float()
        for factor in (layer.lora_B, layer.lora_embedding_B):
            for weight in factor.parameters():
                weight.data.zero_()
    return merged


@pytest.mark.parametrize(
    "options, ranks",
    [
        *(
            pytest.param(options, "mixed", id=name, marks=pytest.mark.support("Pruning", name))
            for name, options in OPTIONS.items()
        ),
        pytest.param(OPTIONS["`rank_pattern`, `alpha_pattern`"], "uniform", id="one rank for all"),
    ],
)
def test_a_pruned_adapter_is_the_gated_model_and_loads_as_plain_lora(tmp_path, input_ids, options, ranks):
    bias = {"attention_bias": True} if "bias" in options else {}
    model = gated(tiny_llama(**bias), **options)
    reference = copy.deepcopy(model)
    directions = Directions(model.base_model)
    assert_same(model(input_ids).logits, reference(input_ids).logits)
    gates = random_gates(directions)
    directions.set_gates(gates)
    expected = by_dense_svd(reference, gates)(input_ids).logits
    torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-5, atol=5e-6)

    config = model.to_lora(tmp_path, ranks=ranks)

    plain = PeftModel.from_pretrained(tiny_llama(**bias), tmp_path).eval()
    assert_same(plain(input_ids).logits, model(input_ids).logits)
    merged = plain.merge_and_unload()(input_ids).logits
    torch.testing.assert_close(merged, model(input_ids).logits, rtol=1e-5, atol=5e-6)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert type(config) is LoraConfig and saved["peft_type"] == "LORA"
    # α/r is 1 in every module, whoever reads it
    assert saved["lora_alpha"] == saved["r"] and saved["alpha_pattern"] == saved["rank_pattern"]
    assert not saved["use_rslora"]
    ranks_of = {
        name: layer.r["default"]
        for name, layer in PeftModel.from_pretrained(tiny_llama(**bias), tmp_path).base_model.model.named_modules()
        if hasattr(layer, "r") and isinstance(layer.r, dict)
    }
    on = (gates * directions.singular_values != 0).tolist()
    left = {module: sum(o for o, name in zip(on, directions.modules) if name == module) for module in ranks_of}
    assert directions.modules[0] not in ranks_of
    assert ranks_of == (left if ranks == "mixed" else dict.fromkeys(left, max(left.values())))


@pytest.mark.parametrize("mode", ["hard", "soft", "joint"])
def test_gates_that_are_not_open_are_never_dropped(tmp_path, input_ids, mode):
    model = gated(tiny_llama())
    if mode == "hard":
        model.apply_mask(list(model.gates())[:4])
    else:
        model.set_gate_mode(mode)
    with pytest.raises(ValueError, match="`ranks='uniform'` needs open gates"):
        model.to_lora(tmp_path, ranks="uniform")
    if mode != "hard":
        expected = model(input_ids).logits
        model.fold_gates()
        model.to_lora(tmp_path, ranks="uniform")
        assert_same(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()(input_ids).logits, expected)


@pytest.mark.support("Pruning", "`Conv1D`")
def test_conv1d(tmp_path):
    ids = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(0))
    model = gated(build("gpt2"), target_modules=["c_attn", "c_proj"])
    before = model(ids).logits
    directions = Directions(model.base_model)
    assert_same(model(ids).logits, before)
    directions.set_gates(random_gates(directions))
    model.to_lora(tmp_path, ranks="mixed")
    plain = PeftModel.from_pretrained(build("gpt2"), tmp_path).eval()
    assert_same(plain(ids).logits, model(ids).logits)


def test_layer_1_is_not_layer_11(tmp_path, input_ids):
    model = gated(tiny_llama(layers=12), target_modules=["q_proj"])
    directions = Directions(model.base_model)
    gates = torch.ones(len(directions.modules))
    ends = {"model.layers.1.self_attn.q_proj": 1, "model.layers.11.self_attn.q_proj": 3}
    for module, rank in ends.items():
        places = [i for i, name in enumerate(directions.modules) if name == module]
        gates[places[rank:]] = 0
    directions.set_gates(gates)
    model.to_lora(tmp_path, ranks="mixed")
    plain = PeftModel.from_pretrained(tiny_llama(layers=12), tmp_path).eval()
    found = {n: m.r["default"] for n, m in plain.base_model.model.named_modules() if n.endswith("q_proj")}
    assert found == {f"model.layers.{i}.self_attn.q_proj": {1: 1, 11: 3}.get(i, 4) for i in range(12)}
    assert_same(plain(input_ids).logits, model(input_ids).logits)


@pytest.mark.support("Pruning", "bf16 and NF4, `AutoPeftModel`, `load_adapter` of transformers")
def test_bf16_nf4_and_auto_classes(tmp_path, input_ids):
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"
    tiny_llama(hidden_size=64).save_pretrained(base)
    for number, options in enumerate(
        ({"dtype": torch.bfloat16}, {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)})
    ):

        def load(options=options):
            return AutoModelForCausalLM.from_pretrained(base, **{"dtype": torch.float32, **options})

        model = gated(load())
        directions = Directions(model.base_model)
        directions.set_gates(random_gates(directions))
        adapter = tmp_path / str(number)
        model.to_lora(adapter, ranks="mixed")
        expected = model(input_ids).logits
        tolerance = {"rtol": 0, "atol": 2e-2 if "dtype" in options else 1e-6}
        torch.testing.assert_close(PeftModel.from_pretrained(load(), adapter)(input_ids).logits, expected, **tolerance)
        auto = AutoPeftModelForCausalLM.from_pretrained(adapter, **{"dtype": torch.float32, **options}).eval()
        torch.testing.assert_close(auto(input_ids).logits, expected, **tolerance)
        by_transformers = load()
        by_transformers.load_adapter(str(adapter))
        torch.testing.assert_close(by_transformers(input_ids).logits, expected, **tolerance)


def test_singular_directions_never_make_the_product():
    a, b = torch.randn(4, 300), torch.randn(200, 4)
    new_a, new_b, values = singular_directions(a, b)
    torch.testing.assert_close(values, torch.linalg.svdvals(b.double() @ a.double())[:4].float())
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new_b.T @ new_b, torch.diag(values), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(new_a @ new_a.T, torch.diag(values), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        pytest.param("llama", {"use_dora": True}, "DoRA", marks=refused("DoRA")),
        pytest.param("mixtral", {"target_modules": "all-linear"}, r"experts \(", marks=refused("fused experts")),
        pytest.param("convolution", {"target_modules": ["0"]}, r"a convolution \(0\)", marks=refused("convolutions")),
    ],
)
def test_what_has_no_directions_of_its_own_is_refused(tmp_path, model, options, reason):
    base = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)) if model == "convolution" else build(model)
    kind = {"task_type": None} if model == "convolution" else {}
    model = gated(base, **options, **kind)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for use in (lambda: Directions(model.base_model), lambda: model.to_lora(tmp_path, ranks="mixed")):
        with pytest.raises(ValueError, match=f"This adapter cannot be pruned: it is of {reason}"):
            use()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before))
