"""What units promise before training: (α/r)·‖∂L/∂B‖₁, against plain LoRA."""

import copy

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trainers import ila, lora_weights, options, plain_trainer, sft_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from peft_ila import ILAConfig, LayerImportance, learn_gates, rank
from peft_ila.units import unit_of


@pytest.mark.support("Trainers", "a ranking before any training, `method='untrained'`")
@pytest.mark.parametrize("granularity, accumulation", [("layer", 1), ("module", 2)])
def test_the_scores_are_norms_of_plain_loras_gradients(tmp_path, tokenizer, dialogues, granularity, accumulation):
    accumulated = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, model=ila(granularity=granularity), **accumulated)
    lora = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    lora.load_state_dict({k: v for k, v in trainer.model.state_dict().items() if "lora_gate" not in k})
    before = {k: v.clone() for k, v in trainer.model.state_dict().items() if "lora_gate" not in k}
    importance = learn_gates(trainer, steps=4, method="untrained")
    assert all(torch.equal(trainer.model.state_dict()[k], v) for k, v in before.items())
    assert trainer.model.peft_config["default"].gate_mode == "open"

    reference = SFTTrainer(
        model=lora.eval(),
        args=SFTConfig(bf16=False, **options(tmp_path, **accumulated)),
        train_dataset=Dataset.from_list(dialogues),
        processing_class=tokenizer,
    )
    torch.manual_seed(reference.args.seed)
    batches = iter(reference.get_train_dataloader())
    norms = {unit: torch.zeros(4) for unit in importance.units}
    for step in range(4):
        lora.zero_grad()
        examples = [next(batches) for _ in range(accumulation)]
        labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in examples)
        for batch in examples:
            (lora(**batch, num_items_in_batch=torch.tensor(labels)).loss).backward()
        for name, parameter in lora.named_parameters():
            if ".lora_B." in name:
                module = name.removeprefix("base_model.model.").partition(".lora_B.")[0]
                norms[unit_of(module, granularity)][step] += 8 / 4 * parameter.grad.abs().sum()
    mean = torch.stack(list(norms.values())).mean(1)
    torch.testing.assert_close(torch.tensor(importance.scores), mean / mean.mean() - 1, rtol=1e-4, atol=1e-5)
    facts = importance.metadata["learn_gates"]
    assert facts["method"] == "untrained" and facts["loss_closed"] == facts["loss_open"] > 0


BAD = [{"role": "assistant", "content": "w1 w2 w1 w2"}]
GROUPS = {"num_generations": 4, "max_completion_length": 8}
ALIKE = {"precompute_ref_log_probs": True}
# a trainer whose loss runs the model without the adapter, or with a copy of it; what its data have beside prompts;
# and options by which it does not, of the same loss: the reference is the fresh model, where KL's gradient is 0
REFERENCES = {
    "DPO": (DPOTrainer, DPOConfig, lambda row, i: {"chosen": row["completion"], "rejected": BAD}, {}, ALIKE),
    "KTO": (KTOTrainer, KTOConfig, lambda row, i: {"completion": row["completion"], "label": i % 2 == 0}, {}, ALIKE),
    "GRPO": (GRPOTrainer, GRPOConfig, lambda row, i: {}, {**GROUPS, "beta": 0.1}, {**GROUPS, "beta": 0.0}),
}


@pytest.mark.support("Trainers", "a ranking before any training on TRL's DPO, KTO and GRPO losses")
# TRL copies the adapter of a model that has one already
@pytest.mark.parametrize("name, copied", [("DPO", True), ("KTO", False), ("GRPO", True), ("GRPO", False)])
def test_losses_with_a_reference(tmp_path, tokenizer, dialogues, name, copied):
    make, config, columns, *both = REFERENCES[name]
    data = Dataset.from_list([{"prompt": row["prompt"], **columns(row, i)} for i, row in enumerate(dialogues)])
    extra = (
        {"reward_funcs": lambda completions, **_: [len(str(c)) % 7.0 for c in completions]} if name == "GRPO" else {}
    )
    found = []
    for own in both:
        model = ila() if copied else tiny_llama()
        torch.manual_seed(1)
        trainer = make(
            model=model,
            args=config(**{"bf16": False, **options(tmp_path, **own)}),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=None if copied else ILAConfig(r=4, target_modules="all-linear", gate_mode="open"),
            **extra,
        )
        trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        found.append(learn_gates(trainer, steps=4, method="untrained").scores)
        assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trainable
    assert found[0] == found[1] and len(set(found[0])) == 3


def test_embeddings_move_by_their_other_factor(tmp_path, tokenizer, dialogues):
    """PEFT begins them with A = 0."""
    torch.manual_seed(0)
    config = ILAConfig(r=4, target_modules=["q_proj", "embed_tokens"], granularity="module", gate_mode="open")
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=get_peft_model(tiny_llama(), config), max_steps=2)
    importance = learn_gates(trainer, steps=4)
    assert importance.metadata["learn_gates"]["method"] == "untrained"
    assert dict(zip(importance.units, importance.scores))["model.embed_tokens"] > -1
    trainer.train()
    with pytest.raises(ValueError, match="needs a fresh adapter with B = 0"):
        learn_gates(trainer, steps=4, method="untrained")


def test_settles_and_says_how_sure_it_is(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, model=ila(granularity="module"))
    importance = learn_gates(trainer, method="untrained")
    assert 8 <= importance.metadata["learn_gates"]["steps_taken"] <= 16
    assert len(importance.spread) == 21 and all(error > 0 for error in importance.spread)
    assert importance.probability(top_p=0.3)
    again = sft_trainer(tmp_path, tokenizer, dialogues, model=ila(granularity="module"))
    assert learn_gates(again, method="untrained").scores == importance.scores


def test_errors_both_ways(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, max_steps=4)
    for method in ("attribution", "descent"):
        with pytest.raises(ValueError, match='no delta to measure. Fine-tune first. .*"untrained"'):
            learn_gates(trainer, method=method)
    trainer.train()
    weights = lora_weights(trainer.model)
    with pytest.raises(ValueError, match="needs a fresh adapter with B = 0, but this one has been trained"):
        learn_gates(trainer, method="untrained")
    assert all(torch.equal(value, weights[name]) for name, value in lora_weights(trainer.model).items())


def test_the_method_fits_the_adapter(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, max_steps=4)
    for method in ("untrained", "attribution"):
        importance = learn_gates(trainer, steps=4)
        assert importance.metadata["learn_gates"]["method"] == method
        assert importance.scores == learn_gates(trainer, steps=4, method=method).scores
        trainer.train()


@pytest.mark.parametrize("mode", ["joint", "soft"])
def test_training_can_follow(tmp_path, tokenizer, dialogues, mode):
    """A is the same, B is 0, and stage 1 trains as it would have."""
    expected = plain_trainer(tmp_path, tokenizer, dialogues, max_steps=4)
    expected.train()
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model=ila(mode), max_steps=4)
    learn_gates(trainer, steps=4, method="untrained")
    trainer.train()
    found = lora_weights(trainer.model)
    assert all(torch.equal(found[name], value) for name, value in lora_weights(expected.model).items())


@pytest.mark.support("Quantisation", "a ranking before any training on NF4")
def test_on_4_bit(tmp_path, tokenizer, dialogues):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    found = {}
    for name, nf4 in (("NF4", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")), ("fp32", None)):
        base = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", dtype=torch.float32, device_map="cpu", quantization_config=nf4
        )
        trainer = plain_trainer(tmp_path / name, tokenizer, dialogues, model=ila(granularity="module", model=base))
        found[name] = learn_gates(trainer, steps=4, method="untrained")
    assert found["NF4"].spearman(found["fp32"]) > 0.9 and found["NF4"].scores != found["fp32"].scores


@pytest.mark.parametrize("dora", [False, True])
def test_experts_and_dora(tmp_path, tokenizer, dialogues, dora):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**small, num_key_value_heads=2, vocab_size=64, num_local_experts=2)
    targets = ["q_proj", "v_proj"] if dora else "all-linear"
    own = ILAConfig(r=2, target_modules=targets, use_dora=dora, granularity="module", gate_mode="open")
    model = get_peft_model(AutoModelForCausalLM.from_config(config), own)
    before = copy.deepcopy(model.state_dict())
    importance = learn_gates(plain_trainer(tmp_path, tokenizer, dialogues, model=model), steps=4, method="untrained")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "lora_gate" not in k)
    assert all(score > -1 for score in importance.scores)
    assert bool(importance.parameters) != dora


def test_the_whole_of_rank_without_stage_1(tmp_path, tokenizer, dialogues):
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, save_strategy="steps", save_steps=1)
    importance = rank(trainer, steps=4)
    assert trainer.state.global_step == 0
    assert importance.metadata["stage_1"] == {"steps": 0, "stable": False}
    assert LayerImportance.load(tmp_path / "importance.json") == importance
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "importance.json", "importance.png", "_run.json"}
    resumed = sft_trainer(tmp_path, tokenizer, dialogues, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="holds a run with another `untrained`: True, now False"):
        rank(resumed, method="attribution")
    assert rank(resumed, steps=4).scores == importance.scores
