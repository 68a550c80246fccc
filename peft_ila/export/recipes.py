"""Turns selected units into settings for other training programs."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig

from ..choices import RecipeFormat
from ..files import whole_file
from .freezing import freeze
from .lora import Targets, to_lora_config
from .skeleton import meta_skeleton


def recipe(
    targets: Targets,
    selected: Sequence[str],
    program: RecipeFormat,
    model: nn.Module | PretrainedConfig | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """See [`LayerImportance.to_recipe`]. `selected` are the units to tune."""
    if program == "axolotl-full":
        return {"unfrozen_parameters": _unfrozen(targets, selected, model)}
    if program != "axolotl":  # the others cannot name layers by index
        selected = [name for unit in selected for name in targets.modules[unit]]
        modules = {name: [name] for own in targets.modules.values() for name in own}
        targets = replace(targets, modules=modules)
    config: LoraConfig = to_lora_config(targets, selected, model, **kwargs)
    names: Any = config.target_modules
    if not isinstance(names, str):
        names = sorted(names or [])
    elif program != "axolotl":
        raise ValueError(
            f"{program} takes module names, but the name of an unselected module ends in a selected name. Use the "
            "LoraConfig instead."
        )
    parameters = sorted(config.target_parameters or [])
    if parameters and (program == "llamafactory" or config.rank_pattern):
        raise ValueError(
            f"{program} has no setting for parameters such as {parameters[0]!r}"
            f"{', at the rank that PEFT gives them' if config.rank_pattern else ''}. Use the LoraConfig instead."
        )
    lora = {"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    settings: dict[str, Any] = {"lora_target_modules": names}
    if parameters:
        settings["lora_target_parameters"] = parameters
    if program == "llamafactory":
        rank = lora.pop("lora_r")
        return {"finetuning_type": "lora", "lora_rank": rank, **lora, "lora_target": ",".join(names)}
    if program == "trl":
        return {"use_peft": True, **lora, **settings}
    if config.layers_to_transform is not None:
        settings["peft_layers_to_transform"] = config.layers_to_transform
    if config.layers_pattern:
        settings["peft_layers_pattern"] = [config.layers_pattern]
    return {"adapter": "lora", **lora, **settings}


def write_recipe(settings: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write settings as YAML."""
    import yaml

    with whole_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False, width=1000), encoding="utf-8")


def _unfrozen(targets: Targets, selected: Sequence[str], model: nn.Module | PretrainedConfig | None) -> list[str]:
    """Patterns of the parameters that [`freeze_unselected`] leaves trainable."""
    if model is None:
        raise ValueError("Full fine-tuning needs `model`, to find the weights of the selected units.")
    skeleton = meta_skeleton(model, targets.of(list(targets.modules)))
    frozen = set(freeze(skeleton, selected, all_but=True))
    inside = tuple(f"{unit}." for unit in selected)
    # axolotl reads a dot as a literal dot
    patterns = [f"^{unit}$" if unit in targets.parameters else f"^{unit}." for unit in selected]
    # tied weights of selected units, under a name outside them
    names = [name for name, _ in skeleton.named_parameters() if name not in frozen and not name.startswith(inside)]
    return patterns + [f"^{name}$" for name in names if name not in selected]
