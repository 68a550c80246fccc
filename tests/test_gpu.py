"""What only a GPU can show: CUDA's kernels, attention backends, inductor, fp16, and both stages there."""

import pytest
import torch
import torch._dynamo as dynamo
from conftest import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainers import ila, lora_weights, plain_trainer, sft_trainer, write_model_and_data
from transformers import BitsAndBytesConfig
from transformers.models.llama import modeling_llama

from peft_ila import EpsilonStability, ILAConfig, LayerImportance, learn_gates, rank
from peft_ila.cli import main

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPTIONS = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
KINDS = ("fp32", "bf16", "NF4")


def base(kind="fp32", **kwargs):
    model = tiny_llama(hidden_size=64, intermediate_size=128, **kwargs)
    if kind != "NF4":
        return model.to(DEVICE, torch.float32 if kind == "fp32" else torch.bfloat16)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    options = {"dtype": torch.bfloat16, "quantization_config": nf4, "device_map": {"": DEVICE}}
    return type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), **options)


def lora_and_ila(kind="fp32", **kwargs):
    """The same adapter, without gates and with them."""
    lora = get_peft_model(base(kind, **kwargs), LoraConfig(**OPTIONS))
    gated = get_peft_model(base(kind, **kwargs), ILAConfig(**OPTIONS, gate_mode="open"))
    assert not gated.load_state_dict(lora_weights(lora), strict=False).unexpected_keys
    return lora, gated


def set_gates(model, mode, probed=False, score=None):
    model.set_gate_mode(mode)
    for gate in model.gates().values():
        gate.state = "probed" if probed else gate.state
        if score is not None:
            gate.weight.data.fill_(score)


def gate_gradients(model, ids):
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = torch.cat([gate.weight.grad.clone() for gate in model.gates().values()])
    model.zero_grad()
    return found


@pytest.fixture
def ids(input_ids):
    return input_ids.to(DEVICE)


@pytest.mark.support("Devices", "CUDA: gates on fp32, bf16 and NF4")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_open_is_lora_and_closed_is_the_base_model(kind, autocast, ids):
    lora, gated = lora_and_ila(kind)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        plain, opened = base(kind)(ids).logits, lora(ids).logits
        assert not torch.equal(plain, opened)
        assert torch.equal(gated(ids).logits, opened)
        set_gates(gated, "soft", score=-1e9)
        assert torch.equal(gated(ids).logits, plain)
        set_gates(gated, "soft", probed=True)
        assert torch.equal(gated(ids).logits, plain)
        set_gates(gated, "soft", score=1e9)
        torch.testing.assert_close(gated(ids).logits, opened, rtol=2e-2, atol=2e-2)


@pytest.mark.support("Devices", "CUDA: gates on fp32, bf16 and NF4")
@pytest.mark.parametrize("kind", KINDS)
def test_open_trains_as_lora(kind, ids):
    models = lora_and_ila(kind)
    for model in models:
        model(ids, labels=ids).loss.backward()
    expected, found = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.support("Devices", "CUDA: `learn_gates`")
@pytest.mark.parametrize("method", ["attribution", "untrained"])
@pytest.mark.parametrize("kind", ["bf16", "NF4"])
def test_learn_gates(kind, method, tmp_path, tokenizer, dialogues):
    model = ila(model=base(kind))
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model, use_cpu=False, bf16=True, learning_rate=1e-2)
    if method == "attribution":
        trainer.train()
    before = lora_weights(model)
    settings = {"steps": 8, "min_agreement": None, "method": method}
    importance = learn_gates(trainer, **settings)
    assert len(importance.scores) == 3 and torch.tensor(importance.scores).isfinite().all()
    assert sum(importance.scores) == pytest.approx(0, abs=1e-4) and any(importance.scores)
    for name, weight in lora_weights(model).items():
        assert torch.equal(weight, before[name])
    again = learn_gates(trainer, **settings) if method == "attribution" else importance
    assert again.scores == pytest.approx(importance.scores, rel=0.05, abs=0.02)


@pytest.mark.support("Devices", "CUDA: `learn_gates`")
def test_the_scores_are_those_of_the_cpu(tmp_path, tokenizer, dialogues):
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, max_steps=20, learning_rate=1e-2)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")
    expected = learn_gates(trainer, steps=8, min_agreement=None)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True)
    found = learn_gates(
        plain_trainer(tmp_path, tokenizer, dialogues, model, use_cpu=DEVICE == "cpu"), steps=8, min_agreement=None
    )
    assert model.device.type == DEVICE
    assert found.scores == pytest.approx(expected.scores, rel=1e-3, abs=1e-3)


@pytest.mark.support("Devices", "CUDA: attention backends")
@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_attention_backends(backend, ids):
    """Each of them alone, against the attention that is written out."""
    lora, gated = lora_and_ila("bf16")
    eager = lora_and_ila("bf16", attn_implementation="eager")[1]
    eager.load_state_dict(gated.state_dict())
    set_gates(eager, "soft", probed=True)
    expected = gate_gradients(eager, ids)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        try:
            opened = lora(ids).logits
        except RuntimeError as error:
            pytest.skip(f"not on this device: {error}")
        assert torch.equal(gated(ids).logits, opened)
        set_gates(gated, "soft", probed=True)
        found = gate_gradients(gated, ids)
    assert found.isfinite().all() and (found != 0).all()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@pytest.mark.support("Devices", "CUDA: FlashAttention 2")
def test_flash_attention_2(ids):
    pytest.importorskip("flash_attn")
    lora, gated = lora_and_ila("bf16", attn_implementation="flash_attention_2")
    assert torch.equal(gated(ids).logits, lora(ids).logits)
    set_gates(gated, "soft", probed=True)
    assert gate_gradients(gated, ids).isfinite().all()


@pytest.mark.support("Devices", "CUDA: Liger's kernels")
def test_liger(tmp_path, tokenizer, dialogues, monkeypatch):
    pytest.importorskip("liger_kernel")
    # Liger replaces some functions of the module, for good
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    model = ila(model=base("bf16"))
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model, use_cpu=False, bf16=True, use_liger_kernel=True)
    trainer.train()
    assert torch.tensor(learn_gates(trainer, steps=8).scores).isfinite().all()


@pytest.mark.support("Devices", "CUDA: `torch.compile` with inductor")
@pytest.mark.parametrize("mode", ["open", "soft", "probed"])
def test_inductor(mode, ids):
    dynamo.reset()
    model = lora_and_ila()[1]
    set_gates(model, "open" if mode == "open" else "soft", probed=mode == "probed", score=0.3)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    if mode != "open":
        torch.testing.assert_close(gate_gradients(compiled, ids), gate_gradients(model, ids), rtol=1e-2, atol=1e-3)


@pytest.mark.support("Devices", "CUDA: `torch.compile` with inductor")
def test_gates_break_no_graph_of_nf4(ids):
    lora, gated = lora_and_ila("NF4", layers=1)
    dynamo.reset()
    expected = dynamo.explain(lora)(ids).graph_break_count
    for mode, probed in (("open", False), ("soft", False), ("soft", True)):
        set_gates(gated, mode, probed)
        dynamo.reset()
        assert dynamo.explain(gated)(ids).graph_break_count <= expected


@pytest.mark.support("Devices", "CUDA: fp16 with a gradient scaler")
def test_overflow_in_fp16(tmp_path, tokenizer, dialogues):
    model = ila(model=base())
    trainer = plain_trainer(tmp_path, tokenizer, dialogues, model, use_cpu=False, fp16=True, learning_rate=1e-2)
    trainer.train()
    before = lora_weights(model)
    expected = learn_gates(trainer, steps=4)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40)
    trainer.accelerator.scaler = scaler
    found = learn_gates(trainer, steps=4)
    assert found.scores == pytest.approx(expected.scores, rel=0.05, abs=0.05)
    assert scaler.get_scale() == 2.0**40
    assert all(torch.equal(weight, before[name]) for name, weight in lora_weights(model).items())


@pytest.mark.support("Devices", "CUDA: `rank`, `peft-ila rank` on NF4")
def test_rank(tmp_path, tokenizer, dialogues):
    pytest.importorskip("matplotlib")
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, use_cpu=False, bf16=True, learning_rate=1e-2)
    importance = rank(trainer, EpsilonStability(epsilon=0.5, window=2), steps=8)
    assert trainer.model.device.type == DEVICE
    written = LayerImportance.load(tmp_path / "importance.json")
    assert written.scores == importance.scores and importance.metadata["stage_1"]["steps"] <= 40
    ranked = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    for name, weight in lora_weights(ranked).items():
        assert torch.equal(weight, lora_weights(trainer.model)[name].cpu())


@pytest.mark.support("Devices", "CUDA: `rank`, `peft-ila rank` on NF4")
def test_the_command_on_nf4(tmp_path, tokenizer, dialogues):
    pytest.importorskip("matplotlib")
    write_model_and_data(tmp_path, tokenizer, dialogues)
    common = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data.jsonl")]
    common += ["--load_in_4bit", "True", "--max_steps", "20", "--learning_rate", "2e-2", "--report_to", "none"]
    main(
        [
            "rank",
            *common,
            "--output_dir",
            str(tmp_path / "out"),
            "--lora_r",
            "4",
            "--gate_steps",
            "8",
            "--method",
            "attribution",
        ]
    )
    importance = LayerImportance.load(tmp_path / "out" / "importance.json")
    assert torch.tensor(importance.scores).isfinite().all()
    selection = ["--importance", str(tmp_path / "out" / "importance.json"), "--top_k", "1"]
    main(["tune", *common, *selection, "--output_dir", str(tmp_path / "tuned")])
    tuned = PeftModel.from_pretrained(tiny_llama(), tmp_path / "tuned")
    adapted = {name.partition(".self_attn.")[0].partition(".mlp.")[0] for name in lora_weights(tuned)}
    assert adapted == {f"base_model.model.{importance.ranking()[0]}"}
