"""Tiny random models of many architectures, rankings of them, and what PEFT injects into them."""

import random

import torch
import transformers
from peft import get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import (
    BartConfig,
    BertConfig,
    BloomConfig,
    CLIPVisionConfig,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from peft_ila import ILAConfig, LayerImportance

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
}
GPT2 = GPT2Config(n_embd=16, n_layer=5, n_head=2, vocab_size=32)
OPT = OPTConfig(
    hidden_size=16, ffn_dim=32, num_hidden_layers=5, num_attention_heads=2, vocab_size=32, word_embed_proj_dim=16
)
T5 = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=5, num_heads=2, vocab_size=32)
BART = BartConfig(
    d_model=16,
    encoder_layers=5,
    decoder_layers=5,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    vocab_size=32,
)
LLAVA = LlavaConfig(
    vision_config=CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2, image_size=8, patch_size=4
    ),
    text_config=LlamaConfig(**SMALL),
)
MODELS = {
    "llama": ("LlamaForCausalLM", LlamaConfig(**SMALL)),
    "bare_llama": ("LlamaModel", LlamaConfig(**SMALL)),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bare_gpt2": ("GPT2Model", GPT2),
    "opt": ("OPTForCausalLM", OPT),
    "gpt_neox": ("GPTNeoXForCausalLM", GPTNeoXConfig(**SMALL)),
    "gemma": ("GemmaForCausalLM", GemmaConfig(**SMALL, head_dim=8)),
    "mistral": ("MistralForCausalLM", MistralConfig(**SMALL)),
    "qwen2": ("Qwen2ForCausalLM", Qwen2Config(**SMALL)),
    "qwen3": ("Qwen3ForCausalLM", Qwen3Config(**SMALL, head_dim=8)),
    "phi3": ("Phi3ForCausalLM", Phi3Config(**SMALL)),
    "bloom": ("BloomForCausalLM", BloomConfig(hidden_size=16, n_layer=5, n_head=2, vocab_size=32)),
    "falcon": ("FalconForCausalLM", FalconConfig(**SMALL)),
    "mixtral": ("MixtralForCausalLM", MixtralConfig(**SMALL, num_local_experts=2)),
    "olmoe": ("OlmoeForCausalLM", OlmoeConfig(**SMALL, num_experts=2, num_experts_per_tok=1)),
    "t5": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", BART),
    "bert": ("BertForSequenceClassification", BertConfig(**{**SMALL, "num_key_value_heads": None})),
    "llava": ("LlavaForConditionalGeneration", LLAVA),
}


def build(name) -> nn.Module:
    torch.manual_seed(0)
    class_name, config = MODELS[name]
    return getattr(transformers, class_name)(config)


def ranked(model, granularity="layer", seed=0, **kwargs) -> LayerImportance:
    """A ranking with random scores, as an ILA model gives it."""
    ila = get_peft_model(model, ILAConfig(r=2, granularity=granularity, **{"target_modules": "all-linear", **kwargs}))
    scores = random.Random(seed)
    for gate in ila.gates().values():
        gate.weight.data.fill_(scores.uniform(-3, 3))
    return ila.layer_importance()


def adapted(model) -> set[str]:
    """The modules and parameters that LoRA adapts, read from the model itself."""
    found = set()
    for path, module in model.named_modules():
        path = path.removeprefix("base_model.model.")
        if isinstance(module, ParamWrapper):
            found.add(f"{path.replace('.base_layer', '')}.{module.parameter_name}")
        elif hasattr(module, "lora_A") and ".base_layer." not in path:
            found.add(path)
    return found


def injected(model, config) -> set[str]:
    """The modules and parameters that PEFT adapts by a configuration."""
    return adapted(get_peft_model(model, config))
