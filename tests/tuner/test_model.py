import re

import pytest
import torch
from conftest import tiny_llama
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PeftType,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_ila import ILAConfig, ILAModel

LORA = ("lora_A", "lora_B")


def config(**kwargs) -> ILAConfig:
    return ILAConfig(
        **{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False, **kwargs}
    )


def spread_scores(model, low=-3.0, high=3.0):
    gates = model.gates()
    for gate, value in zip(gates.values(), torch.linspace(low, high, len(gates))):
        gate.weight.data.fill_(value)


def moved_by_a_step(model, input_ids) -> set[str]:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()
    model(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("granularity, number", [("layer", 3), ("module", 21)])
def test_one_score_per_unit(llama, granularity, number):
    model = get_peft_model(llama, config(granularity=granularity))
    assert isinstance(model.base_model, ILAModel)
    scores = [name for name, _ in model.named_parameters() if "lora_gate" in name]
    assert len(scores) == number == len(model.gates())
    assert all(name.endswith(".lora_gate.default.weight") for name in scores)
    if granularity == "layer":
        # the first target module of a decoder layer owns the score
        assert [".q_proj." in name for name in scores] == [True] * 3
        assert list(model.gates()) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert all(gate.weight.item() == 4.0 for gate in model.gates().values())


@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize(
    "mode, moving",
    [("joint", {*LORA, "lora_gate"}), ("open", set(LORA)), ("soft", {"lora_gate"})],
)
def test_what_trains_in_each_mode(llama, input_ids, granularity, mode, moving):
    model = get_peft_model(llama, config(granularity=granularity))
    model.set_gate_mode(mode)
    expected = {name for name, _ in model.named_parameters() if any(f".{part}." in name for part in moving)}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    assert moved_by_a_step(model, input_ids) == expected


def test_what_trains_under_a_mask(llama, input_ids):
    model = get_peft_model(llama, config())
    model.apply_mask(["model.layers.2", "model.layers.0"])
    expected = {
        name
        for name, _ in model.named_parameters()
        if (".lora_A." in name or ".lora_B." in name) and ".layers.1." not in name
    }
    assert moved_by_a_step(model, input_ids) == expected
    assert model.peft_config["default"].gate_mask == ["model.layers.0", "model.layers.2"]


def test_peft_calls_that_activate_adapters_keep_the_mode(llama):
    model = get_peft_model(llama, config(modules_to_save=["lm_head"], bias="all"))
    model.set_gate_mode("soft")
    expected = {name for name, _ in model.named_parameters() if "lora_gate" in name}

    def trainable():
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trainable() == expected
    with model.disable_adapter():
        pass
    assert trainable() == expected
    model.set_adapter("default")
    assert trainable() == expected
    model.set_gate_mode("open")
    assert any("modules_to_save" in name for name in trainable())
    assert not trainable() & expected


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}])
def test_nothing_but_the_scores_trains_in_soft_whatever_peft_activates(tmp_path, options):
    soft = config(target_modules=["q_proj"], gate_mode="soft", **options)
    get_peft_model(tiny_llama(), soft).save_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), soft)

    def check():
        names = [name for name, p in model.named_parameters() if p.requires_grad and ".other" not in name]
        assert len(names) == 3 and all(".lora_gate.default." in name for name in names)

    model.add_adapter("other", config(target_modules=["q_proj"], **options))
    model.set_adapter("other")
    model.set_adapter("default")
    check()
    model.set_adapter("other")
    model.delete_adapter("other")
    check()
    model.set_requires_grad("default")
    check()
    model.load_adapter(tmp_path, "other", is_trainable=True)
    check()
    assert sum(p.requires_grad for p in model.parameters()) == 6  # the scores of both
    model.set_adapter("other")
    model.delete_adapter("default")
    assert sum(p.requires_grad for p in model.parameters()) == 3
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    check()


@pytest.mark.parametrize("mode", ["open", "joint", "soft", "hard"])
def test_status(llama, mode):
    model = get_peft_model(llama, config())
    model.add_adapter("other", config())
    units = list(model.gates())
    model.apply_mask(units[:2]) if mode == "hard" else model.set_gate_mode(mode)
    lora = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    lora.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    status, expected = (either.get_model_status() for either in (model, lora))
    if mode == "open":
        assert status.trainable_params == expected.trainable_params
    if mode in ("open", "joint"):  # in the others some train and some do not
        assert status.requires_grad == expected.requires_grad == {"default": True, "other": False}
    assert (status.enabled, status.available_adapters) == (True, ["default", "other"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        assert not any(p.requires_grad for p in model.parameters())
    model.set_adapter("other")
    model.set_adapter("default")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_modes_can_be_left_and_entered(llama, input_ids):
    model = get_peft_model(llama, config())
    spread_scores(model)
    soft = model(input_ids).logits
    model.apply_mask(["model.layers.1"])
    hard = model(input_ids).logits
    model.set_gate_mode("open")
    opened = model(input_ids).logits
    assert not torch.equal(soft, hard) and not torch.equal(hard, opened)
    model.set_gate_mode("hard")
    assert torch.equal(model(input_ids).logits, hard)
    model.set_gate_mode("soft")
    assert torch.equal(model(input_ids).logits, soft)


def test_one_configuration_serves_several_models():
    """A mode is a state of its model: a configuration that is used once more makes what it made first."""
    config = ILAConfig(target_modules=["q_proj"], gate_mode="open")
    first = get_peft_model(tiny_llama(), config)
    assert first.peft_config["default"] is config  # as PEFT has it
    first.apply_mask(["model.layers.0"])
    first.set_gate_mode("soft")
    second = get_peft_model(tiny_llama(), config)
    assert (config.gate_mode, config.gate_mask) == ("open", None)
    assert second.peft_config["default"].gate_mode == "open"
    assert all("lora_A" in name or "lora_B" in name for name, p in second.named_parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in second.parameters()) == 6
    assert first.peft_config["default"].gate_mode == "soft"


def test_bad_modes_and_masks(llama):
    model = get_peft_model(llama, config())
    with pytest.raises(ValueError, match="must be one of .* got 'close'"):
        model.set_gate_mode("close")
    with pytest.raises(ValueError, match="needs at least one unit in `gate_mask`; use `apply_mask`"):
        model.set_gate_mode("hard")
    with pytest.raises(ValueError, match=r"has no units \['model.layers.9'\] \(1 of 2 are unknown\)"):
        model.apply_mask(["model.layers.9", "model.layers.1"])
    with pytest.raises(ValueError, match="needs at least one unit in `gate_mask`"):
        model.apply_mask([])
    with pytest.raises(TypeError, match=r"got the string 'model\.layers\.1'"):
        model.apply_mask("model.layers.1")
    with pytest.raises(ValueError, match="Adapter 'other' does not exist"):
        model.set_gate_mode("open", "other")
    assert model.peft_config["default"].gate_mode == "joint"
    model.apply_mask(["model.layers.0"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged; call `unmerge_adapter` to change its gates"):
        model.apply_mask(["model.layers.1"])
    assert model.peft_config["default"].gate_mask == ["model.layers.0"]


@pytest.mark.support("Operations", "save, load, `low_cpu_mem_usage`, transformers' `load_adapter`")
@pytest.mark.parametrize(
    "granularity, mode", [*(("layer", mode) for mode in ("joint", "open", "soft", "hard")), ("module", "hard")]
)
def test_saved_and_loaded_bit_for_bit(tmp_path, input_ids, mode, granularity):
    model = get_peft_model(tiny_llama(), config(granularity=granularity))
    spread_scores(model)
    model.apply_mask(list(model.gates())[::2]) if mode == "hard" else model.set_gate_mode(mode)
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("lora_gate" in key for key in saved) == len(model.gates())

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded(input_ids).logits, expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.peft_config["default"].gate_mode == mode
    assert loaded.peft_config["default"].gate_mask == model.peft_config["default"].gate_mask

    low_memory = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(low_memory(input_ids).logits, expected)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in low_memory.named_parameters() if parameter.requires_grad} == trainable

    second = get_peft_model(tiny_llama(), config())
    second.load_adapter(tmp_path, "second")
    second.set_adapter("second")
    assert torch.equal(second(input_ids).logits, expected)

    transformers_model = tiny_llama()
    transformers_model.load_adapter(str(tmp_path))
    assert torch.equal(transformers_model(input_ids).logits, expected)


@pytest.mark.support("Operations", "`AutoPeftModel`")
def test_auto_peft_model(tmp_path, input_ids):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = tiny_llama().from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config())
    spread_scores(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    assert loaded.layer_importance().units == model.layer_importance().units


@pytest.mark.parametrize(
    "other, message",
    [
        (tiny_llama(layers=2), r"adapter has 3 gates, but the model has 2 .*'model\.layers\.2\."),
        (tiny_llama(layers=4), r"adapter has 3 gates, but the model has 4 .*'model\.layers\.3\."),
        (GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=64)), "_proj.* not found in the base"),
    ],
)
def test_an_adapter_of_another_architecture_is_refused(tmp_path, llama, other, message):
    get_peft_model(llama, config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.support("Operations", "merge, safe merge, unmerge, `merge_and_unload`")
@pytest.mark.parametrize("mode", ["joint", "open", "soft", "hard"])
@pytest.mark.parametrize("safe_merge", [True, False])
def test_merging_equals_the_forward_pass(llama, input_ids, mode, safe_merge):
    model = get_peft_model(llama, config())
    spread_scores(model)
    model.apply_mask(["model.layers.1"]) if mode == "hard" else model.set_gate_mode(mode)
    with torch.no_grad():
        expected = model(input_ids).logits
        with model.disable_adapter():
            base = model(input_ids).logits
        model.merge_adapter(safe_merge=safe_merge)
        torch.testing.assert_close(model(input_ids).logits, expected)
        with pytest.raises(ValueError, match="is merged; call `unmerge_adapter` to change its gates"):
            model.set_gate_mode("soft")
        model.unmerge_adapter()
        torch.testing.assert_close(model(input_ids).logits, expected)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids).logits, base)
        plain = model.merge_and_unload(safe_merge=safe_merge)
        torch.testing.assert_close(plain(input_ids).logits, expected)
    assert not any("lora" in name for name, _ in plain.named_modules())


@pytest.mark.support("Operations", "unload")
def test_unload_gives_the_base_model_back(input_ids):
    expected = tiny_llama()(input_ids).logits
    model = get_peft_model(tiny_llama(), config())
    assert torch.equal(model.unload()(input_ids).logits, expected)


@pytest.mark.support("Operations", "several adapters, switching, deleting, mixed batches")
def test_several_adapters(llama, input_ids):
    model = get_peft_model(llama, config())
    model.add_adapter("fine", config(granularity="module", target_modules=["q_proj", "up_proj"]))
    spread_scores(model)
    first = model(input_ids).logits
    model.set_adapter("fine")
    assert len(model.gates()) == 6 and len(model.gates("default")) == 3
    spread_scores(model)
    model.set_gate_mode("soft")
    second = model(input_ids).logits
    assert [name for name, p in model.named_parameters() if p.requires_grad and ".fine." not in name] == []
    model.set_adapter("default")
    assert torch.equal(model(input_ids).logits, first)

    mixed = model.eval()(torch.cat([input_ids, input_ids]), adapter_names=["default"] * 2 + ["fine"] * 2).logits
    torch.testing.assert_close(mixed, torch.cat([first, second]))

    model.base_model.set_adapter(["default", "fine"])
    with pytest.raises(ValueError, match="2 adapters are active"):
        model.layer_importance()
    model.delete_adapter("fine")
    assert torch.equal(model(input_ids).logits, first)
    assert not any(".fine." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize("how", ["add", "load", "adapt again", "load again", "fewer targets"])
def test_a_name_used_again_starts_anew(tmp_path, input_ids, how, granularity):
    own = config(granularity=granularity, **({"target_modules": ["v_proj"]} if how == "fewer targets" else {}))
    fresh = get_peft_model(tiny_llama(), own)
    spread_scores(fresh)
    fresh.save_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), config(granularity="module" if granularity == "layer" else "layer"))
    spread_scores(model, -5.0, -4.0)
    if how in ("add", "load"):
        model.delete_adapter("default")
        assert not any("default" in name for name, _ in model.named_modules())
        model.add_adapter("default", own) if how == "add" else model.load_adapter(tmp_path, "default")
        model.set_adapter("default")
    elif how == "load again":
        model = PeftModel.from_pretrained(model.get_base_model(), tmp_path)
    else:
        model = get_peft_model(model.get_base_model(), own)
    spread_scores(model)
    weights, expected = ({k: v for k, v in m.state_dict().items() if "lora_" in k} for m in (model, fresh))
    assert weights.keys() == expected.keys()
    fresh.load_state_dict(weights, strict=False)
    assert torch.equal(model(input_ids).logits, fresh(input_ids).logits)
    assert model.layer_importance() == fresh.layer_importance()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(input_ids).logits, model(input_ids).logits)


def test_a_merged_adapter_is_not_replaced(llama):
    model = get_peft_model(llama, config())
    model.merge_adapter()
    with pytest.raises(ValueError, match="Adapter 'default' is merged; call `unmerge_adapter` to change its gates"):
        get_peft_model(model.get_base_model(), config())


COMBINATIONS = ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
COMBINATIONS += ["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]


@pytest.mark.support("Operations", "`add_weighted_adapter`, `get_delta_weight`")
@pytest.mark.parametrize("mode", ["joint", "hard"])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_weighted_adapters_are_gated(input_ids, combination, mode):
    """Against plain LoRA whose B is multiplied by hand, under a name whose gates were others before."""
    targets = ["q_proj", "up_proj", "embed_tokens"]
    model = get_peft_model(tiny_llama(), config(target_modules=targets))
    for name in ("other", "sum"):
        model.add_adapter(name, config(target_modules=targets))
    plain = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    lora = get_peft_model(tiny_llama(), plain)
    lora.add_adapter("other", plain)
    for name, mask in (("sum", [0]), ("other", [0, 3]), ("default", [1, 3])):
        model.set_adapter(name)
        spread_scores(model)
        units = list(model.gates())
        if mode == "hard":
            model.apply_mask([units[i] for i in mask])
    model.delete_adapter("sum")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in lora.named_parameters():
        parameter.data.copy_(before[name])
        if "lora_B" in name or "lora_embedding_B" in name:
            adapter = "other" if "other" in name else "default"
            (unit,) = (unit for unit in model.gates(adapter) if f".{unit}." in name)
            gate = model.gates(adapter)[unit]
            kept = float(unit in (model.peft_config[adapter].gate_mask or []))
            parameter.data *= kept if mode == "hard" else torch.sigmoid(gate.weight).item()

    options = {"combination_type": combination}
    if combination not in ("linear", "cat", "svd"):
        options["density"] = 0.5
    for either in (model, lora):
        torch.manual_seed(0)
        either.add_weighted_adapter(["default", "other"], [0.7, 0.2], "sum", **options)
        either.set_adapter("sum")
    torch.testing.assert_close(model(input_ids).logits, lora(input_ids).logits)
    with lora.disable_adapter():
        assert not torch.allclose(model(input_ids).logits, lora(input_ids).logits, atol=1e-3)
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)
    assert model.peft_config["sum"].gate_mode == "open"
    assert [model.peft_config[name].gate_mode for name in ("default", "other")] == [mode] * 2
    states = {gate.state for name in ("default", "other") for gate in model.gates(name).values()}
    assert states == ({"open", "closed"} if mode == "hard" else {mode})


def test_weighted_adapters_that_peft_refuses_leave_all_as_it_was(llama, input_ids):
    model = get_peft_model(llama, config())
    model.add_adapter("dora", config(use_dora=True))
    spread_scores(model)
    expected = model(input_ids).logits
    for names, message in ((["default", "dora"], "is a DoRA adapter"), (["default", "none"], "'none' does not exist")):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(names, [1.0, 1.0], "sum", combination_type="linear")
        assert torch.equal(model(input_ids).logits, expected)
    single = get_peft_model(tiny_llama(), config())
    single.load_state_dict({k: v for k, v in model.state_dict().items() if "dora" not in k})
    twice = single.base_model
    twice.add_weighted_adapter(["default", "default"], [0.5, 0.5], "copy", combination_type="cat")
    assert torch.equal(single(input_ids).logits, expected)
    twice.set_adapter("copy")
    torch.testing.assert_close(single(input_ids).logits, expected)


def test_folding_keeps_the_outputs(llama, input_ids):
    model = get_peft_model(llama, config())
    spread_scores(model)
    expected = model(input_ids).logits
    model.fold_gates()
    torch.testing.assert_close(model(input_ids).logits, expected)
    assert model.peft_config["default"].gate_mode == "open"


@pytest.mark.support("Operations", "`model.to(dtype)`, bf16 and fp16 models")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_fp32_when_they_are_learned_alone(input_ids, dtype):
    model = get_peft_model(tiny_llama().to(dtype), config(), autocast_adapter_dtype=False)
    assert {gate.weight.dtype for gate in model.gates().values()} == {dtype}  # PEFT's rule
    model.set_gate_mode("soft")
    assert {gate.weight.dtype for gate in model.gates().values()} == {torch.float32}
    assert model(input_ids).logits.dtype == dtype
    # what `model.to` or a trainer does later
    model.to(dtype)
    model.train()
    assert {gate.weight.dtype for gate in model.gates().values()} == {torch.float32}
    assert len(moved_by_a_step(model, input_ids)) == 3


def test_scores_follow_autocast_adapter_dtype_otherwise():
    model = get_peft_model(tiny_llama().to(torch.bfloat16), config())
    assert {gate.weight.dtype for gate in model.gates().values()} == {torch.float32}
    assert len({id(gate.weight) for gate in model.gates().values()}) == 3


def test_dropout_is_off_while_scores_are_learned(llama, input_ids):
    model = get_peft_model(llama, config(lora_dropout=0.5))
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.set_gate_mode("soft")
    model.train()
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.set_gate_mode("open")
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)


@pytest.mark.support("Operations", "`inject_adapter_in_model`")
def test_inject_adapter_in_model(llama, input_ids):
    model = inject_adapter_in_model(config(gate_mode="soft"), llama)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 3 and all("lora_gate" in name for name in trainable)
    model(input_ids, labels=input_ids).loss.backward()


def test_layer_importance(llama):
    model = get_peft_model(llama, config(target_modules=["q_proj", "v_proj"]))
    spread_scores(model)
    importance = model.layer_importance()
    assert importance.units == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert importance.scores == [-3.0, 0.0, 3.0]
    assert importance.modules["model.layers.1"] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert importance.metadata["granularity"] == "layer" and importance.metadata["task_type"] == "CAUSAL_LM"
    model.gates()["model.layers.0"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"score of 'model\.layers\.0' is nan"):
        model.layer_importance()


def test_lm_head_is_a_unit_of_its_own(llama):
    model = get_peft_model(llama, config(target_modules=["q_proj", "lm_head"]))
    assert list(model.gates()) == ["model.layers.0", "model.layers.1", "model.layers.2", "lm_head"]


def test_a_fresh_adapter_is_no_ranking(llama):
    importance = get_peft_model(llama, config(target_modules=["q_proj"])).layer_importance()
    for use in (importance.select, importance.to_lora_config):
        with pytest.raises(ValueError, match=r"All 3 units have the same score, 4\.0"):
            use(top_p=0.34)
    assert len(importance.to_lora_config(top_p=1.0).layers_to_transform) == 3


def test_plain_modules_without_layers():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), ILAConfig(target_modules=["0", "1"]))
    assert list(model.gates()) == ["0", "1"]


def trained_lora(**kwargs):
    model = get_peft_model(
        tiny_llama(),
        LoraConfig(
            r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **kwargs
        ),
    )
    return model.eval()


@pytest.mark.support("Operations", "gate a LoRA from disk")
@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_saved_lora_adapter_is_gated(tmp_path, input_ids, granularity, low_cpu_mem_usage, recwarn):
    lora = trained_lora(modules_to_save=["lm_head"], rank_pattern={"up_proj": 2})
    lora.save_pretrained(tmp_path)
    config = ILAConfig.from_lora(LoraConfig.from_pretrained(tmp_path), granularity=granularity, gate_mode="open")
    model = PeftModel.from_pretrained(
        tiny_llama(), tmp_path, config=config, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(model(input_ids).logits, lora(input_ids).logits)
    assert all(gate.weight.item() == 4.0 for gate in model.gates().values())
    assert not [warning for warning in recwarn if "missing adapter keys" in str(warning.message)]
    model.set_gate_mode("soft")
    assert len(moved_by_a_step(model, input_ids)) == (3 if granularity == "layer" else 21)


@pytest.mark.support("Operations", "gate a LoRA in memory")
def test_a_lora_model_in_memory_is_gated(input_ids):
    model = trained_lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    outputs = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        outputs[name] = model(input_ids).logits
    gated = ILAModel.from_lora(model, granularity="module")
    assert gated is model and isinstance(model.base_model, ILAModel)
    assert len(model.gates("default")) == 21 and len(model.gates("other")) == 3
    for name in ("other", "default"):
        model.set_adapter(name)
        assert torch.equal(model(input_ids).logits, outputs[name])
    model.set_gate_mode("soft")
    assert all("lora_gate.default" in name for name, p in model.named_parameters() if p.requires_grad)
    assert not torch.equal(model(input_ids).logits, outputs["default"])
    model.add_adapter("third", config())
    with pytest.raises(ValueError, match=re.escape(f"Found {PeftType.ILA} and {PeftType.LORA}")):
        model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))


def test_only_lora_can_be_gated():
    with pytest.raises(TypeError, match="`config` must be a plain LoraConfig, got AdaLoraConfig"):
        ILAConfig.from_lora(AdaLoraConfig(total_step=1))
    model = get_peft_model(tiny_llama(), LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="must be a PeftModel with LoRA adapters, got one with LoHaModel"):
        ILAModel.from_lora(model)
    with pytest.raises(ValueError, match="does not support `lora_bias`"):
        ILAModel.from_lora(trained_lora(lora_bias=True))


@pytest.mark.support("Operations", "hot-swap")
def test_hotswap(tmp_path, input_ids):
    models = []
    for seed in range(2):
        base = tiny_llama()
        torch.manual_seed(seed)
        models.append(get_peft_model(base, config()).eval())
        spread_scores(models[-1], -seed - 1.0, 2.0)
    first, second = models
    second.save_pretrained(tmp_path / "second")
    hotswap_adapter(first, str(tmp_path / "second"), "default")
    assert torch.equal(first(input_ids).logits, second(input_ids).logits)
    second.set_gate_mode("open")
    second.save_pretrained(tmp_path / "open")
    with pytest.raises(ValueError, match="gate_mode"):
        hotswap_adapter(first, str(tmp_path / "open"), "default")


@pytest.mark.support("Operations", "`prepare_model_for_compiled_hotswap`")
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_gates_survive_the_preparation_for_hotswapping(llama, input_ids, mode):
    """It puts wider modules in the place of `lora_A` and `lora_B`."""
    model = get_peft_model(llama, config()).eval()
    spread_scores(model)
    model.apply_mask(["model.layers.1"]) if mode == "hard" else model.set_gate_mode(mode)
    expected = model(input_ids).logits
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(model(input_ids).logits, expected)
    assert model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.shape[1] == 8
    torch.testing.assert_close(model.merge_and_unload()(input_ids).logits, expected)


@pytest.mark.support("Operations", "`convert_to_lora`")
def test_convert_to_lora(input_ids):
    model = get_peft_model(tiny_llama(), config()).eval()
    spread_scores(model)
    lora_config, state_dict = convert_to_lora(model, 4)
    lora = get_peft_model(tiny_llama(), lora_config).eval()
    set_peft_model_state_dict(lora, state_dict)
    torch.testing.assert_close(lora(input_ids).logits, model(input_ids).logits, rtol=1e-4, atol=1e-5)
