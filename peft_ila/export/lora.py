"""From selected units to a configuration of PEFT that targets exactly them. Changes with how PEFT reads targets."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PretrainedConfig

from ..units import split_layer
from .skeleton import check_injection, meta_skeleton

DECIDED_BY_SELECTION = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")


def to_lora_config(
    modules: Mapping[str, Sequence[str]],
    selected: Sequence[str],
    lookalikes: Sequence[str] = (),
    model: nn.Module | PretrainedConfig | None = None,
    config_cls: type[PeftConfig] = LoraConfig,
    **kwargs: Any,
) -> Any:
    """
    See [`LayerImportance.to_lora_config`].

    Args:
        modules: The target modules of every unit, selected or not.
        selected: The units to target, in any order.
        lookalikes: Modules that share the last part of their name with a target module but are none.
        model: The base model or its configuration, to check the result by injection.
        config_cls: The configuration class of a method of PEFT.
        **kwargs: Its other options.
    """
    if not {"target_modules", "layers_to_transform", "layers_pattern"} <= {f.name for f in fields(config_cls)}:
        raise TypeError(
            f"{config_cls.__name__} cannot target single layers; `config_cls` must have `target_modules`, "
            "`layers_to_transform` and `layers_pattern`, as LoraConfig and AdaLoraConfig do."
        )
    if decided := sorted(set(kwargs) & set(DECIDED_BY_SELECTION)):
        raise ValueError(f"{decided} follow from the selected units and cannot be passed.")

    expected = {module for unit in selected for module in modules[unit]}
    known = {module for own in modules.values() for module in own} | set(lookalikes)
    skeleton = None
    if model is not None:
        skeleton = meta_skeleton(model)
        known = {name for name, _ in skeleton.named_modules() if name}
        if missing := sorted(expected - known):
            raise ValueError(
                f"The model has no modules {missing[:3]} ({len(missing)} of {len(expected)} selected modules are "
                "missing): the ranking was made on another architecture."
            )
    for targets in _target_candidates(modules, selected, expected):
        config: Any = config_cls(**targets, **kwargs)
        if {name for name in known if check_target_module_exists(config, name)} == expected:
            break
    else:  # the last candidate names each module in full, so this is a mistake in this function
        raise AssertionError(f"No configuration hits exactly {sorted(expected)}.")
    if skeleton is not None:
        check_injection(config, skeleton, expected)
    return config


def _target_candidates(
    modules: Mapping[str, Sequence[str]], selected: Sequence[str], expected: set[str]
) -> Iterator[dict[str, Any]]:
    """Ways to target the modules, the most readable first. Not all of them hit only those modules."""
    layers = [split_layer(unit) for unit in selected]
    # units that are whole layers, not modules in them
    if all(layer and unit == f"{layer[0]}.{layer[1]}" for unit, layer in zip(selected, layers)):
        stacks = {layer[0] for layer in layers if layer}
        indices = sorted({layer[1] for layer in layers if layer})
        short = sorted({name.rpartition(".")[2] for name in expected})
        within = sorted({name.removeprefix(f"{unit}.") for unit in selected for name in modules[unit]})
        patterns: list[str | None] = [None]
        if len(stacks) == 1:
            # inserted in a regular expression by PEFT
            stack = stacks.pop()
            patterns += [stack.rpartition(".")[2], re.escape(stack)]
        for pattern in patterns:
            for names in (short, within):
                yield {"target_modules": names, "layers_to_transform": indices, "layers_pattern": pattern}
    yield {"target_modules": sorted(expected)}
    # the full name of one module can end in that of another
    yield {"target_modules": "|".join(re.escape(name) for name in sorted(expected))}
