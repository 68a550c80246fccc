"""Every conversion is proved by what PEFT really injects into a real (tiny, random) model."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from conftest import tiny_llama
from models import LLAVA, MODELS, build, injected, ranked
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AlbertConfig, SwinConfig, WhisperConfig

from peft_ila import ILAConfig
from peft_ila.export.plain import export_adapter
from peft_ila.export.skeleton import check_injection, meta_skeleton


@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.support("Architectures", f"`{MODELS[name][0]}`")) for name in MODELS]
)
def test_exactly_the_selected_modules_are_injected(name, granularity):
    importance = ranked(build(name), granularity)
    for top_p in (0.1, 0.75):
        selected = importance.select(top_p=top_p)
        expected = {module for unit in selected for module in importance.modules[unit]}
        config = importance.to_lora_config(top_p=top_p, r=2)
        assert type(config) is LoraConfig
        assert importance.to_lora_config(top_p=top_p, r=2, model=build(name)) == config
        assert injected(build(name), config) == expected


@pytest.mark.parametrize(
    "name, pattern", [("llama", None), ("gpt2", None), ("mixtral", None), ("bare_llama", "layers")]
)
def test_layers_become_layers_to_transform(name, pattern):
    """With a `layers_pattern` only where PEFT needs it."""
    importance = ranked(build(name))
    config = importance.to_lora_config(top_k=2, r=2)
    assert config.layers_to_transform == sorted(int(unit.rpartition(".")[2]) for unit in importance.select(top_k=2))
    assert config.layers_pattern == pattern and all("." not in target for target in config.target_modules)


def test_one_stack_of_two_gets_a_pattern():
    importance = ranked(build("t5"), target_modules=r"decoder\..*\.(q|v)")
    config = importance.to_lora_config(top_k=2)
    assert config.layers_to_transform and config.layers_pattern == r"decoder\.block"
    assert injected(build("t5"), config) == {
        module for unit in importance.select(top_k=2) for module in importance.modules[unit]
    }


def test_the_language_tower_alone():
    importance = ranked(build("llava"), target_modules=r"model\.language_model\..*proj")
    assert all(unit.startswith("model.language_model.layers.") for unit in importance.units)
    assert any("vision_tower" in name for name in importance.lookalikes)
    hit = injected(build("llava"), importance.to_lora_config(top_k=2, r=2))
    assert len(hit) == 14 and not any("vision" in name for name in hit)


def test_lm_head_and_embeddings_among_the_targets():
    for granularity in ("layer", "module"):
        importance = ranked(build("llama"), granularity, target_modules=["q_proj", "lm_head", "embed_tokens"])
        for k in range(1, len(importance.units) + 1, 3):
            selected = importance.select(top_k=k)
            expected = {module for unit in selected for module in importance.modules[unit]}
            config = importance.to_lora_config(top_k=k, r=2)
            model = get_peft_model(build("llama"), config)
            assert set(model.base_model.targeted_module_names) == expected


def test_gated_layers_only():
    importance = ranked(build("llama"), target_modules=["q_proj"], layers_to_transform=[1, 3])
    assert importance.units == ["model.layers.1", "model.layers.3"]
    assert "model.layers.0.self_attn.q_proj" in importance.lookalikes
    assert injected(build("llama"), importance.to_lora_config(top_p=1.0)) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.3.self_attn.q_proj",
    }


def test_a_name_that_ends_in_another():
    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(2, 2)}) for _ in range(2))
            self.inner = nn.Module()
            self.inner.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(2, 2)}) for _ in range(2))

    importance = ranked(Twin(), target_modules=r"layers\.\d\.fc")
    assert importance.units == ["layers.0", "layers.1"]
    for model in (None, Twin()):
        config = importance.to_lora_config(top_k=1, r=2, model=model)
        assert injected(Twin(), config) == {f"{importance.select(top_k=1)[0]}.fc"}


def test_options_pass_through_and_decided_ones_are_refused():
    importance = ranked(tiny_llama(), task_type="CAUSAL_LM")
    config = importance.to_lora_config(top_k=1, r=3, lora_alpha=9, use_rslora=True, lora_dropout=0.1)
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (3, 9, True, 0.1)
    assert config.task_type == "CAUSAL_LM"
    with pytest.raises(ValueError, match=r"\['layers_to_transform'\] follow from the selected units. Leave them out"):
        importance.to_lora_config(top_k=1, layers_to_transform=[1])


OTHER_METHODS = [
    (peft.AdaLoraConfig, {"total_step": 10}),
    (peft.LoHaConfig, {}),
    (peft.LoKrConfig, {}),
    (peft.OFTConfig, {"oft_block_size": 8, "r": 0}),
    (peft.BOFTConfig, {}),
    (peft.HRAConfig, {}),
    (peft.VeraConfig, {}),
    (peft.RandLoraConfig, {"r": 2}),
    (peft.FourierFTConfig, {"n_frequency": 10}),
    (peft.MissConfig, {"r": 2}),
    (ILAConfig, {}),
]


@pytest.mark.parametrize(
    "config_cls, options",
    [
        pytest.param(cls, options, marks=pytest.mark.support("Conversion", f"`{cls.__name__}`"), id=cls.__name__)
        for cls, options in OTHER_METHODS
    ],
)
def test_other_methods_of_peft(config_cls, options):
    importance = ranked(tiny_llama())
    config = importance.to_lora_config(top_p=0.4, model=tiny_llama(), config_cls=config_cls, **options)
    assert type(config) is config_cls
    adapted = get_peft_model(tiny_llama(), config).base_model.model
    names = {name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    assert names == {module for unit in importance.select(top_p=0.4) for module in importance.modules[unit]}


def test_methods_without_layers_are_refused():
    with pytest.raises(TypeError, match="IA3Config cannot target single layers"):
        ranked(tiny_llama()).to_lora_config(top_k=1, config_cls=peft.IA3Config)


@pytest.mark.parametrize("as_config", [True, False])
def test_a_ranking_of_another_architecture_is_refused(as_config):
    model = build("gpt2")
    with pytest.raises(ValueError, match="The model has no modules .* made on another architecture"):
        ranked(tiny_llama()).to_lora_config(top_k=1, model=model.config if as_config else model)


def test_a_deeper_model_is_refused():
    """It has all modules that were ranked."""
    config = tiny_llama().config
    config.num_hidden_layers = 4
    with pytest.raises(ValueError, match=r"had no modules \['model\.layers\.3\..* \(7 in all\), which this one has"):
        ranked(tiny_llama()).to_lora_config(top_k=1, model=config)


def test_a_ranking_of_a_part_of_the_layers_is_of_the_same_model():
    importance = ranked(tiny_llama(), target_modules=".*[01].*_proj")
    config = importance.to_lora_config(top_k=2, model=tiny_llama())
    assert len(injected(tiny_llama(), config)) == 14


def test_a_config_that_hits_other_modules_is_refused():
    with pytest.raises(ValueError, match=r"would adapt 3 modules instead of the 1 .* adds \['model\.layers\.1"):
        check_injection(
            LoraConfig(target_modules=["q_proj"]), meta_skeleton(tiny_llama()), {"model.layers.0.self_attn.q_proj"}
        )


def test_the_check_leaves_the_model_alone(input_ids):
    model = tiny_llama()
    expected = model(input_ids).logits
    names = [name for name, _ in model.named_modules()]
    ranked(tiny_llama()).to_lora_config(top_k=1, model=model)
    assert names == [name for name, _ in model.named_modules()]
    assert torch.equal(model(input_ids).logits, expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("model", [tiny_llama(), tiny_llama().config, nn.Sequential(nn.Linear(2, 2))])
def test_skeletons_have_no_memory(model):
    skeleton = meta_skeleton(model)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}


def test_a_peft_model_is_checked_by_its_plain_architecture():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["v_proj"]))
    config = ranked(tiny_llama()).to_lora_config(top_k=1, model=model)
    assert config.layers_to_transform is not None


# ---------------------------------------------------------------------------------------------------------------------
# Plain LoRA adapters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.support("Operations", "export to plain LoRA, `to_lora`")
@pytest.mark.parametrize("granularity, from_disk", [("layer", True), ("module", False)])
@pytest.mark.parametrize("mode", ["joint", "open", "soft", "hard"])
def test_an_exported_adapter_is_plain_lora_with_the_same_outputs(tmp_path, input_ids, granularity, mode, from_disk):
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}
    config = ILAConfig(**options, granularity=granularity, modules_to_save=["lm_head"], rank_pattern={"up_proj": 2})
    model = get_peft_model(tiny_llama(), config)
    for gate, value in zip(model.gates().values(), torch.linspace(-3, 3, len(model.gates()))):
        gate.weight.data.fill_(value)
    model.apply_mask(list(model.gates())[1::3]) if mode == "hard" else model.set_gate_mode(mode)
    expected = model(input_ids).logits
    if from_disk:
        model.save_pretrained(tmp_path / "ila")
        export_adapter(tmp_path / "ila", tmp_path / "plain")
    else:
        model.to_lora(tmp_path / "plain")
    assert {entry.name for entry in (tmp_path / "plain").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    keys = load_file(tmp_path / "plain" / "adapter_model.safetensors").keys()
    assert not any("lora_gate" in key for key in keys)
    kept = {key.partition(".lora_A")[0] for key in keys if ".lora_A" in key}
    assert len(kept) == (21 if mode != "hard" else 7)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing and of unexpected weights
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    assert type(loaded.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(loaded(input_ids).logits, expected, rtol=1e-4, atol=1e-5)
    if mode in ("open", "hard"):
        assert torch.equal(loaded(input_ids).logits, expected)


@pytest.mark.support("Other programs", "vLLM, exported adapter")
def test_vllm_reads_an_exported_adapter(tmp_path):
    helper = pytest.importorskip("vllm.lora.peft_helper")
    utils = pytest.importorskip("vllm.lora.utils")
    config = ILAConfig(r=4, lora_alpha=6, target_modules="all-linear", rank_pattern={"up_proj": 2})
    model = get_peft_model(tiny_llama(), config)
    model.apply_mask(["model.layers.0", "model.layers.2"])
    model.to_lora(tmp_path)
    read = helper.PEFTHelper.from_local_dir(str(tmp_path), max_position_embeddings=None)
    assert read._validate_features() == []
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    modules = set()
    for key, tensor in tensors.items():
        name, is_a = utils.parse_fine_tuned_lora_name(key)
        rank, scaling = read.get_rank_and_scaling(name)
        assert rank == tensor.shape[0 if is_a else 1] == (2 if "up_proj" in name else 4)
        assert scaling == 6 / rank
        modules.add(name)
    assert len(modules) == 14 and not any(".layers.1." in name for name in modules)


def test_an_export_without_the_model_hits_no_other_stack(tmp_path):
    model = get_peft_model(build("t5"), ILAConfig(r=2, target_modules=r"encoder\.block\..*\.(q|v)"))
    model.apply_mask(["encoder.block.1"])
    model.save_pretrained(tmp_path / "ila")
    expected = {f"encoder.block.1.layer.0.SelfAttention.{name}" for name in "qv"}
    assert injected(build("t5"), export_adapter(tmp_path / "ila", tmp_path / "plain")) == expected
    assert injected(build("t5"), model.to_lora(tmp_path / "plain")) == expected


def test_tied_weights_are_exported(tmp_path, input_ids):
    options = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "init_lora_weights": False}
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), ILAConfig(**options)).eval()
    model.to_lora(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path)
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, rtol=1e-4, atol=1e-5)


def test_only_ila_adapters_are_exported(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="it lacks adapter_config.json. There is one in .*adapter.$"):
        export_adapter(tmp_path, tmp_path / "plain")
    with pytest.raises(ValueError, match="holds a plain LoRA adapter, which has no gates. Load it as it is"):
        export_adapter(tmp_path / "adapter", tmp_path / "plain")


@pytest.mark.support("Operations", "export with trained biases, masked")
@pytest.mark.parametrize("bias, granularity", [("lora_only", "module"), ("all", "layer")])
def test_biases_have_no_gate(tmp_path, bias, granularity):
    """A closed unit's trained bias stays: in the model, saved, merged and exported."""
    options = {"r": 2, "target_modules": ["q_proj", "fc1"], "init_lora_weights": False, "bias": bias}
    model = get_peft_model(build("opt"), ILAConfig(**options, granularity=granularity, gate_mode="open")).eval()
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "bias" in name:
            parameter.data.normal_()
    units = list(model.gates())
    model.apply_mask(units[: len(units) * 2 // 5])
    ids = torch.randint(1, 32, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    assert not torch.allclose(expected, build("opt").eval()(ids).logits, atol=1e-2)
    model.to_lora(tmp_path / "memory")
    model.save_pretrained(tmp_path / "ila")
    export_adapter(tmp_path / "ila", tmp_path / "disk")
    for path in ("ila", "memory", "disk"):
        loaded = PeftModel.from_pretrained(build("opt"), tmp_path / path).eval()
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-5)


WITHOUT_ARCHITECTURES = {
    "WhisperForConditionalGeneration": WhisperConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=32,
        pad_token_id=0,
    ),
    "AlbertForMaskedLM": AlbertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=32
    ),
    "SwinForImageClassification": SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4
    ),
    "LlavaForConditionalGeneration": LLAVA,
    "BertForSequenceClassification": MODELS["bert"][1],
}


@pytest.mark.parametrize("name", WITHOUT_ARCHITECTURES)
def test_a_configuration_that_does_not_say_what_it_is_of(name):
    """As one that was built in memory."""
    config = copy.deepcopy(WITHOUT_ARCHITECTURES[name])
    assert not config.architectures
    importance = ranked(getattr(transformers, name)(copy.deepcopy(config)), "module")
    lora = importance.to_lora_config(top_p=0.3, model=config)
    selected = set(importance.select(top_p=0.3))
    assert injected(getattr(transformers, name)(copy.deepcopy(config)), lora) == selected


def test_a_configuration_without_any_model_is_refused():
    importance = ranked(build("llama"))
    with pytest.raises(ValueError, match="This PreTrainedConfig has no `architectures`.* pass the model itself"):
        importance.to_lora_config(top_k=1, model=transformers.PretrainedConfig())


@pytest.mark.parametrize("name, granularity", [("Wav2Vec2", "layer"), ("Hubert", "module")])
def test_a_model_without_input_embeddings_is_exported(tmp_path, name, granularity):
    sizes = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "vocab_size": 32}
    sizes |= {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{name}Config")(**sizes)

    def load():
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCTC")(copy.deepcopy(config)).eval()

    options = {"target_modules": "all-linear", "init_lora_weights": False, "granularity": granularity}
    model = get_peft_model(load(), ILAConfig(**options, gate_mode="open")).eval()
    importance = model.layer_importance()
    importance.scores = [float(-i) for i in range(len(importance.units))]
    model.apply_mask(importance.select(top_p=0.5))
    model.to_lora(tmp_path)
    waves = torch.randn(1, 200)
    torch.testing.assert_close(
        PeftModel.from_pretrained(load(), tmp_path).eval()(waves).logits, model(waves).logits, rtol=1e-4, atol=1e-5
    )
    for given in (None, load(), config):
        lora = importance.to_lora_config(top_p=0.5, model=given)
        assert injected(load(), lora) == {m for unit in importance.select(top_p=0.5) for m in importance.modules[unit]}
