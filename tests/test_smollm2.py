"""On a real language model, in fp32 and in NF4 (bitsandbytes quantises on the CPU too)."""

import copy
from functools import cache

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from peft_ila import ILAConfig, learn_gates
from peft_ila.embedded import dialogues, smollm2
from peft_ila.measure import saved_tensors

pytestmark = pytest.mark.smollm2

OPTIONS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def directory():
    return smollm2()


@cache  # to quantise takes 20 times as long as to copy
def loaded(directory, nf4):
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=NF4 if nf4 else None
    )


def load(directory, nf4=False):
    return copy.deepcopy(loaded(directory, nf4))


@pytest.fixture(scope="module")
def short_ids():
    return torch.randint(100, 40000, (2, 16), generator=torch.Generator().manual_seed(0))


def test_the_embedded_model_speaks(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = load(directory)
    assert not getattr(model, "is_quantized", False)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])


def test_the_embedded_data_has_no_repeated_question():
    rows = dialogues()
    assert len({row["prompt"][0]["content"] for row in rows}) == len(rows) == 749


@pytest.mark.parametrize("nf4", [False, True], ids=["fp32", "NF4"])
def test_bytes_that_a_step_keeps(directory, nf4):
    ids = torch.randint(0, 49152, (4, 128), generator=torch.Generator().manual_seed(0))

    def count(model):
        model.train()
        with saved_tensors(model) as saved:
            model(input_ids=ids, labels=ids)
        return saved.bytes()

    lora = count(get_peft_model(load(directory, nf4), LoraConfig(**OPTIONS)))
    model = get_peft_model(load(directory, nf4), ILAConfig(**OPTIONS))
    model.set_gate_mode("open")
    assert count(model) == lora
    model.set_gate_mode("soft")
    assert count(model) <= 0.80 * lora
    for gate in model.gates().values():
        gate.state = "probed"
    assert count(model) <= 0.80 * lora


@pytest.mark.parametrize("granularity, number", [("layer", 30), ("module", 210)])
def test_nf4_gates_act_and_are_saved(directory, short_ids, tmp_path, granularity, number):
    config = ILAConfig(**OPTIONS, granularity=granularity, init_lora_weights=False)
    model = get_peft_model(load(directory, nf4=True), config)
    assert type(model.base_model.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    for gate, value in zip(model.gates().values(), torch.linspace(-3, 3, number)):
        gate.weight.data.fill_(value)
    outputs = {}
    for mode in ("soft", "open"):
        model.set_gate_mode(mode)
        with torch.no_grad():
            outputs[mode] = model(short_ids).logits
    model.apply_mask(list(model.gates())[::3])
    with torch.no_grad():
        outputs["hard"] = model(short_ids).logits
    assert not torch.equal(outputs["soft"], outputs["open"])

    # plain LoRA computes the same, bit for bit where γ is 1
    lora = get_peft_model(load(directory, nf4=True), LoraConfig(**OPTIONS))
    weights = {name: p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    for name, parameter in weights.items():
        lora.get_parameter(name).data.copy_(parameter)
    with torch.no_grad():
        assert torch.equal(lora(short_ids).logits, outputs["open"])

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(directory, nf4=True), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(short_ids).logits, outputs["hard"])
        again.set_gate_mode("soft")
        assert torch.equal(again(short_ids).logits, outputs["soft"])


def test_nf4_merging(directory, short_ids):
    model = get_peft_model(load(directory, nf4=True), ILAConfig(**OPTIONS, init_lora_weights=False))
    for parameter in (p for name, p in model.named_parameters() if "lora_B" in name):
        parameter.data *= 0.05  # a delta of the size that training makes
    layer = model.base_model.model.model.layers[3].mlp.up_proj
    for gate in model.gates().values():
        gate.weight.data.fill_(-1.0)
    gamma = torch.sigmoid(torch.tensor(-1.0))
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer.get_delta_weight("default"), gamma * 2.0 * product)
    with torch.no_grad():
        expected = model(short_ids).logits
        merged = model.merge_and_unload()(short_ids).logits
    # merging requantises the weights to 4 bits
    assert torch.nn.functional.cosine_similarity(merged.flatten(), expected.flatten(), dim=0) > 0.95


@pytest.mark.support("Trainers", "QLoRA (NF4) in TRL, SmolLM2")
def test_qlora_in_trl(directory, tmp_path):
    """Both stages on a 4-bit model, where SFTTrainer casts all trainable parameters to bf16."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    base = prepare_model_for_kbit_training(load(directory, nf4=True), use_gradient_checkpointing=False)
    config = ILAConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=get_peft_model(base, config),
        args=SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_length=48,
            max_steps=6,
            learning_rate=2e-3,
            logging_steps=1,
            report_to="none",
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(dialogues()[:64]),
        processing_class=tokenizer,
    )
    model = trainer.model
    assert {gate.weight.dtype for gate in model.gates().values()} == {torch.bfloat16}  # TRL's cast
    trainer.train()
    model.fold_gates()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_gate" not in name}
    importance = learn_gates(trainer, steps=4, loss_batches=3)
    assert {gate.weight.dtype for gate in model.gates().values()} == {torch.float32}
    assert len(set(importance.scores)) == 30
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)
    lora = importance.to_lora_config(top_p=0.3, r=4, model=model)
    assert len(lora.layers_to_transform) == 9
