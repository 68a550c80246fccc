"""The pytest plugin of `run.py`: ILA in LoRA's place, and a hub cache of tiny random models."""

import contextlib
import importlib.machinery
import os
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

ILA = os.environ.get("PEFT_SUITES_METHOD") == "ILA"
REFUSED = "refused: "
# the last two are PEFT's, for `PeftMixedModel`
REFUSALS = ("ILA does not support", "'ILA' is not compatible with", "PeftType.ILA is not supported for mixed models")
SEED = int(os.environ.get("PEFT_SUITES_SEED", 0))

# ---- the hub: stand-ins for the models that PEFT's tests download -------------------------------------------------

VOCAB = 1024
# ruff: noqa: C408  shapes read better as keyword arguments
_LLAMA = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
_HEAD = dict(head_dim=4)
_MOE = dict(num_local_experts=4, num_experts_per_tok=2, **_HEAD)
_BERT = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=5, num_attention_heads=4)
_DEBERTA = dict(**_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"])
_OPT = dict(hidden_size=16, word_embed_proj_dim=16, ffn_dim=4, num_hidden_layers=5, num_attention_heads=4)
_GPT2 = dict(n_embd=32, n_layer=5, n_head=4)
_T5 = dict(d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, decoder_start_token_id=0)
_HEADS = dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=4, decoder_ffn_dim=4)
_VISION = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=30)
_LLAVA = dict(
    vision_config=dict(model_type="clip_vision_model", patch_size=2, projection_dim=16, **_VISION),
    text_config=dict(model_type="llama", vocab_size=VOCAB, **_LLAMA),
)
# model class, shape, model ids
MODELS: list[tuple[str, dict[str, Any], str]] = [
    ("OPTForCausalLM", _OPT, "peft-internal-testing/tiny-random-OPTForCausalLM"),
    (
        "OPTForCausalLM",
        {**_OPT, "hidden_size": 768, "word_embed_proj_dim": 768, "num_hidden_layers": 12},
        "peft-internal-testing/opt-125m",
    ),
    (
        "LlamaForCausalLM",
        _LLAMA,
        "trl-internal-testing/tiny-random-LlamaForCausalLM peft-internal-testing/tiny-random-LlamaForCausalLM "
        "hf-internal-testing/tiny-random-LlamaForCausalLM",
    ),
    ("LlamaForSequenceClassification", _LLAMA, "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2"),
    ("MistralForCausalLM", _LLAMA, "hf-internal-testing/tiny-random-MistralForCausalLM"),
    ("Qwen2ForCausalLM", _LLAMA, "peft-internal-testing/tiny-dummy-qwen2 Qwen/Qwen2-0.5B"),
    ("Qwen3ForCausalLM", _LLAMA | _HEAD, "trl-internal-testing/tiny-Qwen3ForCausalLM"),
    ("Gemma3ForCausalLM", _LLAMA | _HEAD, "hf-internal-testing/tiny-random-Gemma3ForCausalLM"),
    (
        "Llama4ForCausalLM",
        _LLAMA | _MOE | {"intermediate_size_mlp": 64},
        "trl-internal-testing/tiny-Llama4ForCausalLM",
    ),
    ("GptOssForCausalLM", _LLAMA | _MOE, "trl-internal-testing/tiny-GptOssForCausalLM"),
    (
        "GPT2LMHeadModel",
        _GPT2,
        "peft-internal-testing/tiny-random-GPT2LMHeadModel peft-internal-testing/tiny-random-gpt2 "
        "hf-internal-testing/tiny-random-gpt2 gpt2",
    ),
    ("GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}, "peft-internal-testing/tiny-random-GPTJForCausalLM"),
    ("GPTNeoXForCausalLM", _BERT, "peft-internal-testing/tiny-random-GPTNeoXForCausalLM"),
    (
        "BloomForCausalLM",
        dict(hidden_size=32, n_layer=5, n_head=4),
        "peft-internal-testing/tiny-random-BloomForCausalLM",
    ),
    ("FalconMambaForCausalLM", dict(hidden_size=16, num_hidden_layers=2), "tiiuae/falcon-mamba-tiny-dev"),
    ("BertModel", _BERT, "peft-internal-testing/tiny-random-BertModel hf-internal-testing/tiny-random-BertModel"),
    ("BertForSequenceClassification", _BERT, "peft-internal-testing/tiny-random-BertForSequenceClassification"),
    ("RobertaModel", _BERT, "peft-internal-testing/tiny-random-RobertaModel"),
    ("RobertaForSequenceClassification", _BERT, "peft-internal-testing/tiny-random-RobertaForSequenceClassification"),
    ("DebertaModel", _DEBERTA, "peft-internal-testing/tiny-random-DebertaModel"),
    ("DebertaV2Model", _DEBERTA, "peft-internal-testing/tiny-random-DebertaV2Model"),
    (
        "T5ForConditionalGeneration",
        _T5,
        "peft-internal-testing/tiny-random-t5 peft-internal-testing/tiny-random-T5ForConditionalGeneration "
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated google/flan-t5-small",
    ),
    (
        "BartForConditionalGeneration",
        dict(d_model=16, encoder_layers=2, decoder_layers=2, **_HEADS),
        "peft-internal-testing/tiny-random-BartForConditionalGeneration",
    ),
    (
        "WhisperForConditionalGeneration",
        dict(d_model=16, encoder_layers=2, decoder_layers=2, pad_token_id=0, **_HEADS),
        "peft-internal-testing/tiny-random-Whisper",
    ),
    ("CLIPTextModelWithProjection", _BERT | {"projection_dim": 32}, "peft-internal-testing/tiny-clip-text-2"),
    (
        "ResNetForImageClassification",
        dict(embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], num_labels=3),
        "peft-internal-testing/tiny-random-ResNetForImageClassification",
    ),
    ("LlavaForConditionalGeneration", _LLAVA, "hf-internal-testing/tiny-random-LlavaForConditionalGeneration"),
]
# LoRA adapters: id, revision, base model, auto class, task
_OPT_ID = "peft-internal-testing/tiny-random-OPTForCausalLM"
ADAPTERS = [
    ("tiny-OPTForCausalLM-lora", "main", _OPT_ID, "AutoModelForCausalLM", "CAUSAL_LM"),
    ("tiny-opt-lora-revision", "test", _OPT_ID, "AutoModelForCausalLM", "CAUSAL_LM"),
    ("tiny_OPTForFeatureExtraction-lora", "main", _OPT_ID, "AutoModel", "FEATURE_EXTRACTION"),
    ("tiny_OPTForSequenceClassification-lora", "main", _OPT_ID, "AutoModelForSequenceClassification", "SEQ_CLS"),
    ("tiny_OPTForQuestionAnswering-lora", "main", _OPT_ID, "AutoModelForQuestionAnswering", "QUESTION_ANS"),
    ("tiny_GPT2ForTokenClassification-lora", "main", "gpt2", "AutoModelForTokenClassification", "TOKEN_CLS"),
    ("tiny_T5ForSeq2SeqLM-lora", "main", "google/flan-t5-small", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    ("gpt2-lora-random", "main", "gpt2", "AutoModelForCausalLM", "CAUSAL_LM"),
    (
        "tiny_WhisperForConditionalGeneration-lora",
        "main",
        "peft-internal-testing/tiny-random-Whisper",
        "AutoModelForSpeechSeq2Seq",
        None,
    ),
]


def build_hub(cache: Path) -> None:
    """Fill a Hugging Face cache folder, which `HF_HUB_CACHE` with `HF_HUB_OFFLINE=1` then serves."""
    import tokenizers
    import transformers

    def snapshot(model_id: str, revision: str = "main") -> Path:
        repo, commit = cache / f"models--{model_id.replace('/', '--')}", "0" * 40
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / revision).write_text(commit)
        return repo / "snapshots" / commit

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([Path(__file__).read_text()], VOCAB - 8, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    for class_name, shape, model_ids in MODELS:
        model_class = getattr(transformers, class_name)
        model = model_class(model_class.config_class(**{"vocab_size": VOCAB, **shape}))
        for model_id in model_ids.split():
            folder = snapshot(model_id)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    transformers.ConvNextImageProcessor().save_pretrained(
        next(cache.glob("*ResNetForImageClassification/snapshots/*"))
    )
    for name, revision, base, auto_class, task in ADAPTERS:
        base_model = getattr(transformers, auto_class).from_pretrained(
            next(cache.glob(f"models--{base.replace('/', '--')}/snapshots/*"))
        )
        base_model.config._name_or_path = base_model.name_or_path = base
        model = peft.get_peft_model(
            base_model, peft.LoraConfig(task_type=task, target_modules=None if task else ["q_proj"])
        )
        model.save_pretrained(snapshot(f"peft-internal-testing/{name}", revision), save_embedding_layers=False)


# ---- pytest -------------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "regression")
    # the test modules import a diffusers that only their image cases use
    diffusers: Any = types.ModuleType("diffusers")
    diffusers.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
    diffusers.__version__ = "0.0.0"
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = diffusers
    if ILA:
        import peft_ila

        peft.LoraConfig = peft_ila.ILAConfig  # type: ignore[misc]
    import datasets
    from PIL import Image

    from tests import testing_utils  # PEFT's

    quotes = datasets.Dataset.from_dict({"quote": ["Be yourself."] * 16, "author": ["?"] * 16, "tags": [[]] * 16})
    testing_utils.load_dataset_english_quotes = lambda: datasets.DatasetDict(train=quotes)
    testing_utils.load_cat_image = lambda: Image.effect_noise((64, 64), 50).convert("RGB")
    testing_utils.hub_online_once = lambda model_id: contextlib.nullcontext()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the cases of other methods."""

    def method(value: Any) -> type | None:
        value = value[0] if isinstance(value, tuple) and value else value
        kind = value if isinstance(value, type) else type(value)
        return kind if issubclass(kind, peft.PeftConfig) else None

    keep, drop = [], []
    for item in items:
        methods = {method(value) for value in getattr(getattr(item, "callspec", None), "params", {}).values()} - {None}
        (drop if methods and peft.LoraConfig not in methods else keep).append(item)
    config.hook.pytest_deselected(items=drop)
    items[:] = keep


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(SEED)  # most tests leave the weights to chance; LoRA and ILA shall get the same


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    message = str(call.excinfo.value) if call.excinfo else ""
    if report.failed and any(refusal in message for refusal in REFUSALS):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: {REFUSED}{message}")
    return report
