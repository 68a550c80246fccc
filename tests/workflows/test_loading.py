"""Adapters that others made: with the names of older transformers, of other models, of other vocabularies."""

import pytest
import torch
from conftest import tiny_llama
from models import LLAVA, SMALL
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from trainers import ila, lora_weights, plain_trainer
from transformers import (
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    MixtralConfig,
    Qwen3MoeConfig,
)

from peft_ila import ILAConfig, ILAModel
from peft_ila.workflows.rank import rank
from peft_ila.workflows.training import load_adapter, train_or_resume

IDS = torch.arange(1, 9)[None]
SMALL = {**SMALL, "num_hidden_layers": 2}
QWEN = {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
# a model, the prefix of its layers' old names, and the modules in each with their sizes out and in
OLD = {
    "mixtral": (
        lambda: AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=2)),
        "model.layers",
        {"self_attn.q_proj": (16, 16), "block_sparse_moe.gate": (2, 16)}
        | {f"block_sparse_moe.experts.{i}.{w}": (32, 16) for i in range(2) for w in ("w1", "w3")}
        | {f"block_sparse_moe.experts.{i}.w2": (16, 32) for i in range(2)},
    ),
    "qwen3_moe": (
        lambda: AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SMALL, **QWEN)),
        "model.layers",
        {f"mlp.experts.{i}.{w}": (8, 16) for i in range(2) for w in ("gate_proj", "up_proj")}
        | {f"mlp.experts.{i}.down_proj": (16, 8) for i in range(2)},
    ),
    "llava": (
        lambda: LlavaForConditionalGeneration(LLAVA),
        "language_model.model.layers",
        {"self_attn.o_proj": (16, 16), "mlp.down_proj": (16, 32)},
    ),
}


def old(name):
    """A model, and the weights of an adapter with its old names."""
    make, prefix, modules = OLD[name]
    torch.manual_seed(0)
    model, weights = make().eval(), {}
    for layer in range(len(model.get_decoder().layers)):
        for module, (rows, columns) in modules.items():
            key = f"base_model.model.{prefix}.{layer}.{module}"
            weights[f"{key}.lora_A.weight"] = torch.randn(2, columns)
            weights[f"{key}.lora_B.weight"] = torch.randn(rows, 2)
    return model, weights


@pytest.mark.support("Operations", "rank a LoRA with the names of transformers 4")
@pytest.mark.parametrize("name", OLD)
def test_old_names_compute_what_plain_lora_computes(tmp_path, tokenizer, dialogues, name):
    _, weights = old(name)
    targets = {key.partition(".lora_")[0].rpartition(".")[2] for key in weights}
    lora = LoraConfig(r=2, target_modules=sorted(targets), task_type="CAUSAL_LM")
    lora.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    plain = PeftModel.from_pretrained(old(name)[0], tmp_path)
    expected = plain(input_ids=IDS).logits
    assert not torch.allclose(expected, old(name)[0](input_ids=IDS).logits, atol=1e-3)
    assert torch.equal(ILAModel.from_lora(plain)(input_ids=IDS).logits, expected)

    config = ILAConfig.from_lora(LoraConfig.from_pretrained(tmp_path), gate_mode="open")
    loaded = PeftModel.from_pretrained(old(name)[0], tmp_path, config=config)
    assert torch.equal(loaded(input_ids=IDS).logits, expected)
    fresh = get_peft_model(old(name)[0], ILAConfig.from_lora(LoraConfig.from_pretrained(tmp_path), gate_mode="open"))
    trainer = plain_trainer(tmp_path / "out", tokenizer, dialogues, model=fresh)
    load_adapter(trainer, tmp_path)
    assert torch.equal(fresh.eval()(input_ids=IDS).logits, expected)

    loaded.save_pretrained(tmp_path / "gated")
    again = PeftModel.from_pretrained(old(name)[0], tmp_path / "gated")
    assert torch.equal(again(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("layers, other", [(2, 2), (4, 3)])
def test_a_lora_of_another_depth_is_not_ranked(tmp_path, tokenizer, dialogues, layers, other):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(layers=layers), config).save_pretrained(tmp_path / "lora")
    message = rf"adapter .* does not fit .*: 14 weights are missing in the file or unknown .* as 'base_.*\.{other}\."
    with pytest.raises(ValueError, match=message):
        rank(plain_trainer(tmp_path / "out", tokenizer, dialogues), adapter=str(tmp_path / "lora"))


@pytest.mark.parametrize("indices", [[1, 70], {"lm_head": [1, 70]}])
def test_trained_tokens_of_another_vocabulary(tmp_path, indices):
    config = ILAConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    get_peft_model(tiny_llama(vocab_size=80), config).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_llama(vocab_size=80), tmp_path)
    message = "has the token 70, but the model has 64 tokens. Pass a model with the adapter's vocabulary"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    model = get_peft_model(tiny_llama(), ILAConfig(target_modules=["q_proj"], trainable_token_indices=[3]))
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "second")


def test_whole_modules_that_are_missing(tmp_path, tokenizer, dialogues):
    model = ila(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(path).items() if "lm_head" not in key}, path)
    trainer = plain_trainer(tmp_path / "out", tokenizer, dialogues, model=model)
    with pytest.raises(ValueError, match=r"adapter .*lora lacks the weight 'base_model\.model\.lm_head\.weight'\."):
        load_adapter(trainer, tmp_path / "lora")


def test_a_checkpoint_of_other_targets_is_not_resumed(tmp_path, tokenizer, dialogues):
    """Of the same sizes, so that the optimiser's state would fit too."""

    def trainer(target, directory, **kwargs):
        config = LoraConfig(r=4, target_modules=[target])
        options = {"save_strategy": "steps", "save_steps": 2, **kwargs}
        return plain_trainer(directory, tokenizer, dialogues, model=get_peft_model(tiny_llama(), config), **options)

    first = trainer("q_proj", tmp_path / "first", max_steps=2)
    first.train()
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    other = trainer("o_proj", tmp_path / "second", max_steps=4, resume_from_checkpoint=checkpoint)
    message = r"checkpoint-2 does not fit .*: 12 weights are missing in the file or unknown to the model"
    with pytest.raises(ValueError, match=message):
        train_or_resume(other)
    assert not train_or_resume(trainer("q_proj", tmp_path / "first", max_steps=2, resume_from_checkpoint=checkpoint))
    assert train_or_resume(trainer("q_proj", tmp_path / "first", max_steps=4, resume_from_checkpoint=checkpoint))


@pytest.mark.support("Operations", "a masked run is resumed with its own mask only")
def test_a_masked_run_is_not_resumed_with_another_mask(tmp_path, tokenizer, dialogues):
    """Masks of one size: Adam's moments of one layer would be taken for those of another."""

    def trainer(layer, **kwargs):
        model = ila()
        model.apply_mask([f"model.layers.{layer}"])
        return plain_trainer(
            tmp_path, tokenizer, dialogues, model=model, save_strategy="steps", save_steps=2, **kwargs
        )

    trainer(0, max_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    other = trainer(1, max_steps=4)
    before = lora_weights(other.model)
    message = r"another mask: it trained '.*layers\.0.*', which .* mask closes, but not '.*layers\.1.*', which"
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(value, before[name]) for name, value in lora_weights(other.model).items())
    own = trainer(0, max_steps=4)
    own.train(resume_from_checkpoint=checkpoint)
    whole = trainer(0, max_steps=4)
    whole.train()
    expected = lora_weights(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in lora_weights(own.model).items())

    # weights from elsewhere, and another mask on purpose
    fresh = ila()
    for name, parameter in fresh.named_parameters():
        if ".lora_A." in name:
            parameter.data.mul_(2)
    fresh.apply_mask(["model.layers.1"])
    fresh.load_adapter(checkpoint, "default", is_trainable=True)
    loaded = PeftModel.from_pretrained(tiny_llama(), checkpoint, is_trainable=True)
    loaded.apply_mask(["model.layers.1"])
