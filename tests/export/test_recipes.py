"""Recipes are read by the real parsers of the programs, and what these make of them is injected."""

import pytest
import torch
import yaml
from conftest import tiny_llama
from models import build, injected, ranked
from peft import LoraConfig

from peft_ila.export import recipes
from peft_ila.export.recipes import write_recipe


def recipe(importance, selected, program, model=None, **kwargs):
    return recipes.recipe(importance._targets(), selected, program, model, **kwargs)


def selection(granularity, model="llama", **kwargs):
    importance = ranked(build(model), granularity, **kwargs)
    selected = importance.select(top_p=0.3)
    return importance, selected, {module for unit in selected for module in importance.modules[unit]}


def written(settings, tmp_path) -> dict:
    write_recipe(settings, tmp_path / "recipe.yaml")
    return yaml.safe_load((tmp_path / "recipe.yaml").read_text())


def axolotl_config(settings):
    pytest.importorskip("axolotl")
    from axolotl.utils.schemas.config import AxolotlInputConfig

    return AxolotlInputConfig(
        base_model="tiny",
        datasets=[{"path": "data", "type": "alpaca"}],
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=1e-4,
        **settings,
    )


def lora_of_axolotl(parsed) -> LoraConfig:
    """As `axolotl.loaders.adapter` makes it."""
    return LoraConfig(
        r=parsed.lora_r,
        lora_alpha=parsed.lora_alpha,
        target_modules=parsed.lora_target_modules,
        target_parameters=parsed.lora_target_parameters,
        layers_to_transform=parsed.peft_layers_to_transform,
        layers_pattern=parsed.peft_layers_pattern,
    )


@pytest.mark.support("Other programs", "axolotl, LoRA")
@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize("model", ["llama", "bare_llama", "t5"])
def test_axolotl_lora(granularity, model, tmp_path):
    importance, selected, expected = selection(granularity, model)
    settings = written(recipe(importance, selected, "axolotl", build(model), r=2), tmp_path)
    parsed = axolotl_config(settings)
    assert injected(build(model), lora_of_axolotl(parsed)) == expected
    if granularity == "layer" and model != "t5":
        assert parsed.peft_layers_to_transform == sorted(int(unit.rpartition(".")[2]) for unit in selected)


@pytest.mark.support("Other programs", "axolotl, full fine-tuning")
@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize("tie", [False, True])
def test_axolotl_full_fine_tuning(granularity, tie, tmp_path):
    pytest.importorskip("axolotl")
    from axolotl.utils.freeze import freeze_layers_except

    ours, theirs = (tiny_llama(tie_word_embeddings=tie) for _ in range(2))
    importance = ranked(tiny_llama(tie_word_embeddings=tie), granularity, target_modules=["q_proj", "lm_head"])
    selected = [importance.units[0], "lm_head"]
    settings = written(recipe(importance, selected, "axolotl-full", ours.config), tmp_path)
    importance.freeze_unselected(ours, units=selected)
    freeze_layers_except(theirs, axolotl_config(settings).unfrozen_parameters)
    assert [p.requires_grad for p in theirs.parameters()] == [p.requires_grad for p in ours.parameters()]
    assert not all(p.requires_grad for p in ours.parameters())


@pytest.mark.support("Other programs", "LLaMA-Factory, LoRA")
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_llamafactory(granularity, tmp_path, monkeypatch):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")  # it pins older versions of our dependencies
    arguments = pytest.importorskip("llamafactory.hparams.finetuning_args", exc_type=ImportError)
    from transformers import HfArgumentParser

    importance, selected, expected = selection(granularity)
    settings = written(recipe(importance, selected, "llamafactory", build("llama"), r=2), tmp_path)
    (parsed,) = HfArgumentParser(arguments.FinetuningArguments).parse_dict(settings)
    assert (parsed.lora_rank, parsed.lora_alpha) == (2, 8)
    assert injected(build("llama"), LoraConfig(target_modules=parsed.lora_target)) == expected


@pytest.mark.support("Other programs", "TRL scripts, LoRA")
@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize("from_yaml", [True, False])
def test_trl(granularity, from_yaml, tmp_path):
    from trl import ModelConfig, TrlParser, get_peft_config

    importance, selected, expected = selection(granularity)
    settings = recipe(importance, selected, "trl", build("llama"), r=2, lora_alpha=5)
    write_recipe(settings, tmp_path / "trl.yaml")
    argv = ["--use_peft", "--lora_r", "2", "--lora_alpha", "5", "--lora_target_modules"]
    argv = ["--config", str(tmp_path / "trl.yaml")] if from_yaml else [*argv, *settings["lora_target_modules"]]
    (parsed,) = TrlParser([ModelConfig]).parse_args_and_config(argv)
    config = get_peft_config(parsed)
    assert (config.r, config.lora_alpha) == (2, 5)
    assert injected(build("llama"), config) == expected


@pytest.mark.support("Other programs", "axolotl and TRL, fused experts")
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_fused_experts(granularity, tmp_path):
    experts = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    importance, selected, expected = selection(granularity, "mixtral", **experts)
    assert expected & importance.parameters.keys()
    settings = written(recipe(importance, selected, "axolotl", build("mixtral"), r=2), tmp_path)
    parsed = axolotl_config(settings)
    assert injected(build("mixtral"), lora_of_axolotl(parsed)) == expected

    from trl import ModelConfig, get_peft_config

    settings = written(recipe(importance, selected, "trl", build("mixtral"), r=2), tmp_path)
    assert injected(build("mixtral"), get_peft_config(ModelConfig(**settings))) == expected
    with pytest.raises(ValueError, match="llamafactory has no setting for parameters such as 'model.layers"):
        recipe(importance, selected, "llamafactory", build("mixtral"))


@pytest.mark.parametrize("program", ["axolotl", "trl"])
def test_experts_at_other_ranks_are_refused(program):
    """PEFT gives two fused projections twice the rank, which the programs have no setting for."""
    importance, selected, _ = selection("layer", "mixtral")
    with pytest.raises(ValueError, match="no setting for parameters such as .*, at the rank that PEFT gives them"):
        recipe(importance, selected, program, build("mixtral"))


def test_one_module_for_trl():
    from trl import ModelConfig, get_peft_config

    importance, _, _ = selection("module")
    settings = recipe(importance, ["model.layers.1.mlp.up_proj"], "trl")
    assert injected(build("llama"), get_peft_config(ModelConfig(**settings))) == {"model.layers.1.mlp.up_proj"}


def test_what_cannot_be_expressed():
    importance, selected, _ = selection("layer")
    with pytest.raises(ValueError, match="Full fine-tuning needs `model`"):
        recipe(importance, selected, "axolotl-full")

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2, 2)
            self.inner = torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 2)})

    importance = ranked(Twin(), "module", target_modules=["fc"])
    with pytest.raises(ValueError, match="trl takes module names, but the name of an unselected module ends in"):
        recipe(importance, ["fc"], "trl", Twin())


def test_a_recipe_for_another_model_is_refused():
    importance, selected, _ = selection("layer")
    with pytest.raises(ValueError, match="made on another architecture"):
        recipe(importance, selected, "trl", build("gpt2"))
    assert recipe(importance, selected, "axolotl", tiny_llama(layers=5))["adapter"] == "lora"
