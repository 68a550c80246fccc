import shutil
import weakref

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import peft_ila.search.delta
from peft_ila.search.delta import extract_lora


@pytest.fixture
def checkpoints(tmp_path):
    """A base model and one whose every weight was changed a little, the deltas of low rank but for some noise."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    for _, parameter in base.named_parameters():
        if parameter.dim() == 2:
            out, inn = parameter.shape
            low = torch.randn(out, 3, generator=generator) @ torch.randn(3, inn, generator=generator)
            parameter.data += 0.02 * low + 0.002 * torch.randn(out, inn, generator=generator)
    base.save_pretrained(tmp_path / "tuned")
    return tmp_path


def linear_names(model):
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]


def weights(path, name):
    return load_file(path / "model.safetensors")[f"{name}.weight"]


def test_the_whole_delta(checkpoints, input_ids):
    report = extract_lora(
        str(checkpoints / "base"),
        str(checkpoints / "tuned"),
        LoraConfig(target_modules="all-linear"),
        checkpoints / "x",
    )
    assert report["energy_kept"] == pytest.approx(1, abs=1e-12) and report["not_compared"] == []
    model = PeftModel.from_pretrained(tiny_llama(), checkpoints / "x")
    inside = outside = 0.0
    for name in linear_names(tiny_llama()):
        expected = weights(checkpoints / "tuned", name) - weights(checkpoints / "base", name)
        assert torch.equal(model.base_model.model.get_submodule(name).get_delta_weight("default"), expected)
        inside += float(expected.square().sum())
    for name in ("lm_head", "model.embed_tokens"):
        outside += float((weights(checkpoints / "tuned", name) - weights(checkpoints / "base", name)).square().sum())
    assert report["energy_outside"] == pytest.approx(outside / (inside + outside))

    tuned = tiny_llama()
    tuned.load_state_dict(
        {
            key: value if key.removesuffix(".weight") in linear_names(tuned) else tuned.state_dict()[key]
            for key, value in load_file(checkpoints / "tuned" / "model.safetensors").items()
        }
    )
    torch.testing.assert_close(model(input_ids).logits, tuned(input_ids).logits, rtol=1e-4, atol=1e-5)


def test_the_layers_of_the_configuration_alone(checkpoints):
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])
    extract_lora(str(checkpoints / "base"), str(checkpoints / "tuned"), config, checkpoints / "x")
    assert LoraConfig.from_pretrained(checkpoints / "x").target_modules == {"model.layers.1.self_attn.q_proj"}


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_truncated_to_a_rank(checkpoints, rank):
    report = extract_lora(
        str(checkpoints / "base"),
        str(checkpoints / "tuned"),
        LoraConfig(target_modules=["q_proj", "k_proj", "up_proj"]),
        checkpoints / "x",
        rank=rank,
    )
    model = PeftModel.from_pretrained(tiny_llama(), checkpoints / "x")
    kept = total = 0.0
    for name in model.base_model.targeted_module_names:
        delta = weights(checkpoints / "tuned", name) - weights(checkpoints / "base", name)
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        layer = model.base_model.model.get_submodule(name)
        assert layer.r["default"] == rank and layer.scaling["default"] == 1
        best = (u[:, :rank] * s[:rank] @ vh[:rank]).float()
        # the randomised decomposition is as good as the best one, if not the same
        error = (layer.get_delta_weight("default") - delta).norm()
        assert error <= 1.01 * (best - delta).norm() + 1e-6
        kept += float(s[:rank].square().sum())
        total += float(s.square().sum())
    assert report["energy_kept"] == pytest.approx(kept / total, abs=1e-3)
    assert report["energy_kept"] > (0.97 if rank >= 3 else 0.4)


def test_one_module_at_a_time(checkpoints, monkeypatch):
    alive, most = weakref.WeakSet(), 0

    class Watched(torch.Tensor):
        __hash__ = object.__hash__

    read = peft_ila.search.delta._read

    def watched(where):
        nonlocal most
        tensor = read(where).as_subclass(Watched)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(peft_ila.search.delta, "_read", watched)
    config = LoraConfig(target_modules="all-linear")
    extract_lora(str(checkpoints / "base"), str(checkpoints / "tuned"), config, checkpoints / "x", rank=2)
    assert most == 2  # of one module, before and after


def test_shards_and_a_missing_prefix(checkpoints):
    """A tuned model in several files, saved without its head."""
    tensors = load_file(checkpoints / "tuned" / "model.safetensors")
    (checkpoints / "shards").mkdir()
    for i, (key, tensor) in enumerate(tensors.items()):
        if key.startswith("model."):
            path = checkpoints / "shards" / f"model-0000{i % 3 + 1}-of-00003.safetensors"
            earlier = load_file(path) if path.exists() else {}
            save_file({**earlier, key.removeprefix("model."): tensor}, path)
    config = LoraConfig(target_modules="all-linear")
    report = extract_lora(str(checkpoints / "base"), str(checkpoints / "shards"), config, checkpoints / "x")
    assert report["not_compared"] == ["lm_head.weight"]
    extract_lora(str(checkpoints / "base"), str(checkpoints / "tuned"), config, checkpoints / "y")
    one, other = (load_file(checkpoints / name / "adapter_model.safetensors") for name in "xy")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_embeddings_with_more_tokens_are_not_compared(checkpoints):
    tuned = type(tiny_llama()).from_pretrained(checkpoints / "tuned")
    tuned.resize_token_embeddings(70)
    tuned.save_pretrained(checkpoints / "longer")
    config = LoraConfig(target_modules="all-linear")
    report = extract_lora(str(checkpoints / "base"), str(checkpoints / "longer"), config, checkpoints / "x")
    assert report["not_compared"] == ["lm_head.weight", "model.embed_tokens.weight"]
    extract_lora(str(checkpoints / "base"), str(checkpoints / "tuned"), config, checkpoints / "y")
    one, other = (load_file(checkpoints / name / "adapter_model.safetensors") for name in "xy")
    assert all(torch.equal(one[key], other[key]) for key in one | other)


def test_transposed_weights(tmp_path, input_ids):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64)).eval()
    base.save_pretrained(tmp_path / "base")
    for name, parameter in base.named_parameters():
        if name.endswith("c_attn.weight"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    base.save_pretrained(tmp_path / "tuned")
    expected = base(input_ids).logits
    for rank in (None, 15):
        extract_lora(
            str(tmp_path / "base"),
            str(tmp_path / "tuned"),
            LoraConfig(target_modules=["c_attn"]),
            tmp_path / "x",
            rank,
        )
        model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "x").eval()
        tolerance = 1e-4 if rank is None else 0.1
        torch.testing.assert_close(model(input_ids).logits, expected, rtol=tolerance, atol=tolerance)


def test_bad_checkpoints(checkpoints):
    def extract(base="base", tuned="tuned", target_modules="all-linear", **kwargs):
        config = LoraConfig(target_modules=target_modules)
        extract_lora(str(checkpoints / base), str(checkpoints / tuned), config, checkpoints / "x", **kwargs)

    tiny_llama(layers=2).save_pretrained(checkpoints / "short")
    tiny_llama(intermediate_size=32).save_pretrained(checkpoints / "narrow")
    broken = tiny_llama()
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    broken.save_pretrained(checkpoints / "broken")
    (checkpoints / "empty").mkdir()
    shutil.copytree(checkpoints / "base", checkpoints / "truncated")
    weights = checkpoints / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    for arguments, message in (
        ({"tuned": "short"}, r"do not both hold 'model\.layers\.2\.[a-z_.]+\.weight' \(7 weights missing\)"),
        ({"tuned": "narrow"}, r"has the shape \(64, 32\) in .*base, but \(32, 32\) in .*narrow"),
        ({"tuned": "broken"}, r"delta of 'model\.layers\.0\.mlp\.up_proj\.weight' is not finite"),
        ({"tuned": "base"}, "does not differ from .* in any target module"),
        ({"tuned": "empty"}, r"empty holds no model\.safetensors"),
        ({"tuned": "truncated"}, r"truncated/model\.safetensors is damaged or not a safetensors file"),
        ({"base": "truncated"}, r"truncated/model\.safetensors is damaged or not a safetensors file"),
        ({"target_modules": ["embed_tokens"]}, "Only deltas of linear modules can be factorised, but 'model.embed"),
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(**arguments)
    assert not (checkpoints / "x").exists()
