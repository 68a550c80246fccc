"""From selected units to the settings of other training programs. Changes with axolotl, LLaMA-Factory and TRL."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig

from ..files import whole_file
from .lora import to_lora_config
from .skeleton import meta_skeleton

RecipeFormat = Literal["axolotl", "axolotl-full", "llamafactory", "trl"]


def recipe(
    modules: Mapping[str, Sequence[str]],
    selected: Sequence[str],
    program: RecipeFormat,
    lookalikes: Sequence[str] = (),
    model: nn.Module | PretrainedConfig | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """
    See [`LayerImportance.to_recipe`].

    Args:
        modules: The target modules of every unit, in the order of the model.
        selected: The units to tune.
        program: One of the formats.
        lookalikes: Modules that share the last part of their name with a target module but are none.
        model: The base model or its configuration; `"axolotl-full"` needs it.
        **kwargs: `r`, `lora_alpha` and `lora_dropout` of LoRA.

    Raises:
        ValueError: `"axolotl-full"` without a model, or targets that the program has no way to name.
    """
    if program == "axolotl-full":
        return {"unfrozen_parameters": _unfrozen(list(modules), selected, model)}
    if program != "axolotl":  # the others cannot name layers by their index
        selected = [name for unit in selected for name in modules[unit]]
        modules = {name: [name] for own in modules.values() for name in own}
    config: LoraConfig = to_lora_config(modules, selected, lookalikes, model, **kwargs)
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


def _unfrozen(units: Sequence[str], selected: Sequence[str], model: nn.Module | PretrainedConfig | None) -> list[str]:
    """Patterns of all parameters but those of the other units, as [`freeze_unselected`] leaves them trainable."""
    if model is None:
        raise ValueError("Full fine-tuning needs `model`: all parameters outside the ranked units are named too.")
    skeleton = meta_skeleton(model)
    inside = tuple(f"{unit}." for unit in units)
    outside = [name for name, _ in skeleton.named_parameters() if not name.startswith(inside)]
    order = {unit: position for position, unit in enumerate(units)}
    # axolotl reads a dot as a literal dot
    return [f"^{unit}." for unit in sorted(selected, key=order.__getitem__)] + [f"^{name}$" for name in outside]
