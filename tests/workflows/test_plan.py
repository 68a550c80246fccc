"""What `peft-ila plan` says against what autograd and bitsandbytes really keep."""

import json
import weakref

import pytest
import torch
from conftest import tiny_llama
from models import SMALL
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
)

from peft_ila import ILAConfig, LayerImportance
from peft_ila.cli import main
from peft_ila.export.skeleton import meta_skeleton
from peft_ila.measure import saved_tensors
from peft_ila.workflows.plan import Step, plan, table

SIZES = {**SMALL, "hidden_size": 64, "vocab_size": 512, "num_hidden_layers": 3}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16),
    "gpt2": GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=512, bos_token_id=1, eos_token_id=1),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
}
IDS = torch.zeros(2, 64, dtype=torch.long)
OPTIONS = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def kept(model, checkpointing=False) -> int:
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with saved_tensors(model) as saved, torch.autocast("cpu", torch.bfloat16):  # as trainers take a step
        model(input_ids=IDS, labels=IDS)
    return saved.bytes()


def ranking(config) -> LayerImportance:
    """Of the layers, the last one first."""
    model = get_peft_model(AutoModelForCausalLM.from_config(config), ILAConfig(**OPTIONS))
    for position, gate in enumerate(model.gates().values()):
        gate.weight.data.fill_(position)
    return model.layer_importance()


@pytest.mark.support("Operations", "`peft-ila plan`: memory from a configuration")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_kept_is_counted(name, checkpointing):
    config = CONFIGS[name]
    importance = ranking(config)
    planned = plan(config, importance, 2, 64, gradient_checkpointing=checkpointing, shares=(1.0, 0.5), r=8)
    gradients_of_logits = 2 * (2 * 64 * 512 * 4)
    for share in (1.0, 0.5):
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16),
            importance.to_lora_config(top_p=share, r=8),
        )
        memory = planned[f"{share:.0%}"]
        expected = kept(model, checkpointing)
        if checkpointing and share == 1:  # the layers are all alike
            plain = get_peft_model(
                AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), LoraConfig(**OPTIONS)
            )
            # but the first, whose input needs no gradient there
            assert (kept(plain) - expected) / 3 <= memory.recomputed <= 1.2 * kept(plain) / 3
        assert checkpointing or memory.recomputed == 0
        assert memory.activations + memory.logits - gradients_of_logits == pytest.approx(expected, rel=0.05)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert memory.trainable == trained
        assert (memory.adapter, memory.gradients, memory.optimizer) == (4 * trained, 4 * trained, 8 * trained)
        base = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora_" not in n)
        assert memory.weights == base
    search, whole = planned["rank, stage 2"], planned["100%"]
    assert search.adapter == whole.adapter + 4 * 3 and search.trainable == 3  # one gate for each layer
    assert search.activations + search.recomputed < whole.activations + whole.recomputed


def test_stage_2(input_ids):
    config = CONFIGS["llama"]
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), ILAConfig(**OPTIONS, gate_mode="soft")
    )
    for gate in model.gates().values():
        gate.state = "probed"
    planned = plan(config, batch_size=2, max_length=64, gradient_checkpointing=False, shares=(0.5,), r=8)
    assert [line.split("  ")[0] for line in table(planned).splitlines()] == [
        "GB",
        "50%",
        "rank",
        "rank, stage 2",
        "Not counted: the GPU's context, the kernels' workspaces, the allocator's losses.",
    ]
    memory = planned["rank, stage 2"]
    assert memory.activations + memory.logits - 2 * (2 * 64 * 512 * 4) == pytest.approx(kept(model), rel=0.05)
    assert memory.trainable == 3


def test_the_search_without_training():
    config = CONFIGS["llama"]
    model = get_peft_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), LoraConfig(**OPTIONS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)  # as `learn_gates(method="untrained")` has it
    memory = plan(config, batch_size=2, max_length=64, gradient_checkpointing=False, shares=(1.0,), r=8)["rank"]
    assert memory.activations + memory.logits - 2 * (2 * 64 * 512 * 4) == pytest.approx(kept(model), rel=0.05)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (memory.trainable, memory.gradients, memory.optimizer) == (trained, 4 * trained, 0)


def test_4_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    real = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map="cpu", quantization_config=nf4
    )
    scales = sum(
        parameter.quant_state.absmax.numel() * 4
        for parameter in real.parameters()
        if hasattr(parameter, "quant_state")
    )
    weights = sum(parameter.numel() * parameter.element_size() for parameter in real.parameters()) + scales
    planned = plan(
        model.config, batch_size=2, max_length=64, load_in_4bit=True, gradient_checkpointing=False, shares=(1.0,), r=8
    )
    assert planned["100%"].weights == weights
    lora = get_peft_model(real, LoraConfig(**OPTIONS))
    memory = planned["100%"]
    assert memory.activations + memory.logits - 2 * (2 * 64 * 64 * 4) == pytest.approx(kept(lora), rel=0.05)


def test_the_command(tmp_path, capsys):
    tiny_llama(layers=2).save_pretrained(tmp_path)
    arguments = ["plan", "--model_name_or_path", str(tmp_path)]
    main([*arguments, "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert list(figures) == ["100%", "75%", "50%", "30%", "10%", "rank", "rank, stage 2"]
    own = figures["50%"]
    held = sum(own[key] for key in ("weights", "adapter", "optimizer", "activations"))
    assert own["total"] == held + max(own["logits"], own["recomputed"] + own["gradients"])
    own = plan(tiny_llama(layers=2).config)  # by the same defaults
    assert figures == {row: {**vars(m), "total": m.total} for row, m in own.items()}
    with pytest.raises(SystemExit, match="The batch size and the length must be at least 1, got 0 and 32"):
        main([*arguments, "--max_length", "32", "--per_device_train_batch_size", "0"])


def test_weights_in_fp32_under_autocast():
    """What `tune --memory_budget` counts."""
    config, importance = CONFIGS["llama"], ranking(CONFIGS["llama"])
    lora = importance.to_lora_config(top_k=2, r=8)
    model = get_peft_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), lora)
    with torch.autocast("cpu", torch.bfloat16):
        counted = Step(meta_skeleton(config), 2, 64, False, False, torch.float32).memory(lora)
    assert counted.activations + counted.logits - 2 * (2 * 64 * 512 * 4) == kept(model)


class Alive(TorchDispatchMode):
    """The most bytes that are alive at once of the tensors that are made in the block."""

    def __init__(self, model):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return result

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    "config, checkpointing", [(LoraConfig(**OPTIONS), True), (ILAConfig(**OPTIONS, gate_mode="soft"), False)]
)
def test_the_total_is_the_peak_of_a_step(config, checkpointing):
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 8, "vocab_size": 500}  # Llama-2-7B's
    base = LlamaConfig(**{**SMALL, **sizes, "num_attention_heads": 4, "num_key_value_heads": 4})
    model = get_peft_model(AutoModelForCausalLM.from_config(base, dtype=torch.bfloat16), config).train()
    for gate in model.gates().values() if config.peft_type == "ILA" else ():
        gate.state = "probed"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with Alive(model) as alive:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
    planned = plan(base, None, 2, 64, gradient_checkpointing=checkpointing, shares=(1.0,), r=8)
    memory = planned["100%" if config.peft_type == "LORA" else "rank, stage 2"]
    held = memory.weights + memory.adapter + memory.optimizer
    assert memory.total - held == pytest.approx(alive.most, rel=0.1)
