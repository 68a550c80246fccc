"""From selected units to the settings of other training programs: axolotl, LLaMA-Factory, TRL."""

import os
from typing import Any, Literal

from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig

from .conversion import meta_skeleton, to_lora_config
from .files import whole_file
from .importance import LayerImportance

RecipeFormat = Literal["axolotl", "axolotl-full", "llamafactory", "trl"]


def recipe(
    importance: LayerImportance,
    selected: list[str],
    program: RecipeFormat,
    model: nn.Module | PretrainedConfig | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """
    The part of another program's settings that makes it tune the selected units.

    Args:
        importance ([`LayerImportance`]): The ranking.
        selected (`list[str]`): The units to tune, such as `importance.select(top_p=0.3)`.
        program (`str`):
            `"axolotl"` (LoRA), `"axolotl-full"` (full fine-tuning: `unfrozen_parameters`), `"llamafactory"` (LoRA) or
            `"trl"` (LoRA, the flags of its scripts).
        model: The base model or its configuration, see [`LayerImportance.to_lora_config`]; `"axolotl-full"` needs it.
        **kwargs: `r`, `lora_alpha` and `lora_dropout` of LoRA.

    Raises:
        ValueError: `"axolotl-full"` without a model, or targets that the program has no way to name.
    """
    if program == "axolotl-full":
        return {"unfrozen_parameters": _unfrozen(importance, selected, model)}
    if program != "axolotl":  # the others cannot name layers by their index
        selected = [name for unit in selected for name in importance.modules[unit]]
        importance = _by_module(importance)
    config: LoraConfig = to_lora_config(importance, selected, model, **kwargs)
    targets: Any = config.target_modules
    if not isinstance(targets, str):
        targets = sorted(targets)
    elif program != "axolotl":
        raise ValueError(
            f"{program} takes module names, but the name of one selected module ends in that of another that is not "
            "selected; use the LoraConfig instead."
        )
    lora = {"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    if program == "axolotl":
        settings = {"adapter": "lora", **lora, "lora_target_modules": targets}
        if config.layers_to_transform is not None:
            settings["peft_layers_to_transform"] = config.layers_to_transform
        if config.layers_pattern:
            settings["peft_layers_pattern"] = [config.layers_pattern]
        return settings
    if program == "llamafactory":
        rank = lora.pop("lora_r")
        return {"finetuning_type": "lora", "lora_rank": rank, **lora, "lora_target": ",".join(targets)}
    return {"use_peft": True, **lora, "lora_target_modules": targets}


def write_recipe(settings: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write settings as YAML."""
    import yaml

    with whole_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False, width=1000), encoding="utf-8")


def _by_module(importance: LayerImportance) -> LayerImportance:
    """The same with one unit for each module, so that the modules are named one by one."""
    modules = [module for unit in importance.units for module in importance.modules[unit]]
    return LayerImportance(modules, [0.0] * len(modules), importance.metadata, lookalikes=importance.lookalikes)


def _unfrozen(
    importance: LayerImportance, selected: list[str], model: nn.Module | PretrainedConfig | None
) -> list[str]:
    """Patterns of all parameters but those of the other units, as [`freeze_unselected`] leaves them trainable."""
    if model is None:
        raise ValueError("Full fine-tuning needs `model`: all parameters outside the ranked units are named too.")
    skeleton = meta_skeleton(model)
    inside = tuple(f"{unit}." for unit in importance.units)
    outside = [name for name, _ in skeleton.named_parameters() if not name.startswith(inside)]
    order = {unit: position for position, unit in enumerate(importance.units)}
    # axolotl reads a dot as a literal dot
    return [f"^{unit}." for unit in sorted(selected, key=order.__getitem__)] + [f"^{name}$" for name in outside]
