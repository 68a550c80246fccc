"""Adapters that PEFT writes are read, whatever is in them."""

import pytest
import torch
from conftest import tiny_llama
from models import build
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_ila import ILAConfig
from peft_ila.export.adapters import read_adapter


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
