"""Adapters that PEFT writes are read, whatever is in them."""

import copy
import json

import pytest
import torch
from conftest import tiny_llama
from models import build
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_ila import ILAConfig
from peft_ila.export.adapters import read_adapter
from peft_ila.export.plain import export_adapter


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.norm = nn.BatchNorm1d(8)
        self.embed = nn.Embedding(5, 8)
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.head = nn.Linear(8, 3)


def resized():
    model = tiny_llama()
    model.resize_token_embeddings(70)
    return model


ADAPTERS = {
    "attention": (Network, {"target_modules": ["attn"]}),
    "embedding": (Network, {"target_modules": ["embed", "head"]}),
    "convolution": (Network, {"target_modules": ["conv"]}),
    "whole modules": (Network, {"target_modules": ["head"], "modules_to_save": ["norm"]}),
    "biases": (lambda: build("opt"), {"target_modules": ["q_proj"], "bias": "all"}),
    "DoRA": (lambda: build("opt"), {"target_modules": ["q_proj"], "use_dora": True, "bias": "lora_only"}),
    "ranks": (lambda: build("llama"), {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 4}}),
    "pattern": (lambda: build("llama"), {"target_modules": r".*\.[12]\..*proj"}),
    "layers": (lambda: build("llama"), {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "experts": (lambda: build("mixtral"), {"target_modules": "all-linear"}),
    "parameters": (lambda: build("mixtral"), {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "resized": (resized, {"target_modules": ["q_proj", "embed_tokens"]}),
    "classifier": (lambda: build("bert"), {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "tokens": (lambda: build("llama"), {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
}


@pytest.mark.parametrize("kind", [LoraConfig, ILAConfig])
@pytest.mark.parametrize("name", ADAPTERS)
def test_what_peft_writes_is_read(tmp_path, name, kind):
    torch.manual_seed(0)
    make, options = ADAPTERS[name]
    model = get_peft_model(make(), kind(r=2, **options))
    model.save_pretrained(tmp_path, save_embedding_layers=name == "resized" or "auto")
    config, tensors = read_adapter(tmp_path)
    assert type(config) is kind and any("lora_" in key for key in tensors)


@pytest.mark.parametrize("name", ADAPTERS)
def test_only_an_adapter_of_the_ranks_in_its_configuration_is_exported(tmp_path, name):
    make, options = ADAPTERS[name]
    model = get_peft_model(make(), ILAConfig(r=2, gate_mode="open", **options))
    model.save_pretrained(tmp_path, save_embedding_layers=name == "resized" or "auto")
    assert export_adapter(tmp_path, tmp_path / "plain").r == 2
    if model.peft_config["default"].target_modules:
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 10**12, "rank_pattern": {}}))
        with pytest.raises(ValueError, match=r"has the rank \[\d\], but the adapter's configuration says 10{12}"):
            export_adapter(tmp_path, tmp_path / "again")


def test_embeddings_that_are_closed_keep_their_new_rows(tmp_path, input_ids):
    torch.manual_seed(0)
    model = resized()
    model.get_input_embeddings().weight.data[64:].normal_()
    model = get_peft_model(model, ILAConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False))
    model.apply_mask(["model.layers.0"])
    model.to_lora(tmp_path)
    plain = PeftModel.from_pretrained(resized(), tmp_path).eval()
    ids = torch.cat([input_ids, torch.tensor([[64, 69]]).expand(len(input_ids), 2)], 1)
    torch.testing.assert_close(plain(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-6)


def test_without_a_module_the_exported_adapter_computes_the_same(tmp_path, input_ids):
    """The file does not tell a damaged adapter from one of a model whose layers differ. PEFT warns of both files."""
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["q_proj", "up_proj"], "gate_mode": "soft"}
    model = get_peft_model(tiny_llama(), ILAConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "gated")
    path = tmp_path / "gated" / "adapter_model.safetensors"
    lost = "model.layers.0.mlp.up_proj."
    save_file({key: tensor for key, tensor in load_file(path).items() if lost not in key}, path)
    export_adapter(tmp_path / "gated", tmp_path / "plain")
    logits = []
    for directory in ("gated", "plain"):
        with pytest.warns(UserWarning, match="Found missing adapter keys"):
            loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / directory).eval()
        logits.append(loaded(input_ids).logits)
    torch.testing.assert_close(logits[1], logits[0])
    whole = model.eval()(input_ids).logits
    assert not torch.allclose(logits[0], whole, atol=1e-3)
    model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight").data.zero_()
    torch.testing.assert_close(logits[0], model(input_ids).logits)


@pytest.mark.parametrize("indices", [[1, 2], []])
def test_tokens_that_are_trained_have_weights(tmp_path, indices):
    """Without them PEFT cannot load the adapter."""
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: t for key, t in tensors.items() if "token" not in key}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lacks the weights of the tokens in `trainable_token_indices`"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("ranks", ["mixed", "uniform"])
def test_both_layers_of_an_attention_module_get_one_rank(tmp_path, ranks):
    """PEFT adapts its output projection by a second layer."""
    torch.manual_seed(0)
    network = Network()
    options = {"r": 3, "target_modules": ["attn", "head"], "gate_mode": "open", "init_lora_weights": False}
    model = get_peft_model(copy.deepcopy(network), ILAConfig(**options))
    inner, outer = (model.get_submodule(f"base_model.model.attn{part}") for part in (".base_layer.out_proj", ""))
    inner.lora_B["default"].weight.data[:, :2] = 0
    outer.lora_B["default"].weight.data[:, 0] = 0
    config = model.base_model.to_lora(tmp_path, ranks=ranks)
    loaded = PeftModel.from_pretrained(copy.deepcopy(network), tmp_path)
    assert config.r == {"mixed": 2, "uniform": 3}[ranks]
    x = torch.randn(4, 2, 8)
    expected, found = (m.eval().base_model.model.attn(x, x, x)[0] for m in (model, loaded))
    torch.testing.assert_close(found, expected)
