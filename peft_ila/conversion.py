"""From selected units to a plain LoraConfig, and to a freeze plan for full fine-tuning."""

import copy
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .config import ILAConfig, lora_options
from .files import whole_file
from .importance import LayerImportance
from .units import split_layer, unit_of

# what PeftModel puts before the names of the base model's modules
SAVED_PREFIX = "base_model.model."
DECIDED_BY_SELECTION = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")


def to_lora_config(
    importance: LayerImportance,
    selected: list[str],
    model: nn.Module | PretrainedConfig | None = None,
    config_cls: type[PeftConfig] = LoraConfig,
    **kwargs: Any,
) -> Any:
    """See [`LayerImportance.to_lora_config`]; `selected` are the units to target, in any order."""
    if not {"target_modules", "layers_to_transform", "layers_pattern"} <= {f.name for f in fields(config_cls)}:
        raise TypeError(
            f"{config_cls.__name__} cannot target single layers; `config_cls` must have `target_modules`, "
            "`layers_to_transform` and `layers_pattern`, as LoraConfig and AdaLoraConfig do."
        )
    if decided := sorted(set(kwargs) & set(DECIDED_BY_SELECTION)):
        raise ValueError(f"{decided} follow from the selected units and cannot be passed.")
    kwargs.setdefault("task_type", importance.metadata.get("task_type"))
    kwargs.setdefault("base_model_name_or_path", importance.metadata.get("model"))

    expected = {module for unit in selected for module in importance.modules[unit]}
    known = {module for modules in importance.modules.values() for module in modules} | set(importance.lookalikes)
    skeleton = None
    if model is not None:
        skeleton = meta_skeleton(model)
        known = {name for name, _ in skeleton.named_modules() if name}
        if missing := sorted(expected - known):
            raise ValueError(
                f"The model has no modules {missing[:3]} ({len(missing)} of {len(expected)} selected modules are "
                "missing): the ranking was made on another architecture."
            )
    for targets in _target_candidates(importance, selected, expected):
        config: Any = config_cls(**targets, **kwargs)
        if {name for name in known if check_target_module_exists(config, name)} == expected:
            break
    else:  # the last candidate names each module in full, so this is a mistake in this function
        raise AssertionError(f"No configuration hits exactly {sorted(expected)}.")
    if skeleton is not None:
        check_injection(config, skeleton, expected)
    return config


def to_plain_lora(
    state_dict: dict[str, torch.Tensor], config: ILAConfig, lookalikes: list[str] | None = None
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """
    Turn a saved ILA adapter into a plain LoRA adapter that computes the same: gates multiplied into B, closed units
    left out.

    Args:
        state_dict: The adapter's tensors as PEFT saves them; they are not changed.
        config: The adapter's configuration.
        lookalikes: Modules of the model that share the last part of their name with a target module but are none.
            Without the model, modules that are left over after others were left out are targeted by their full names.

    Returns:
        Tensors and configuration, ready to be written. The configuration is the given one without the gates, except
        that its targets are the modules left over where some are closed.

    Raises:
        ValueError: The tensors lack the gate of a unit.
    """
    gates: dict[str, torch.Tensor] = {}
    modules: dict[str, list[str]] = {}
    for key, tensor in state_dict.items():
        name, _, part = key.removeprefix(SAVED_PREFIX).partition(".lora_")
        unit = unit_of(name, config.granularity)
        if part.startswith("gate"):
            gates[unit] = torch.sigmoid(tensor.float())
        elif part.startswith(("A", "embedding_A")):
            modules.setdefault(unit, []).append(name)
    if missing := sorted(modules.keys() - gates.keys()):
        raise ValueError(f"The adapter holds no gate for {missing[0]!r}; is it an ILA adapter of this configuration?")

    kept = set(config.gate_mask or []) if config.gate_mode == "hard" else set(modules)
    tensors = {}
    for key, tensor in state_dict.items():
        name, is_lora, part = key.removeprefix(SAVED_PREFIX).partition(".lora_")
        unit = unit_of(name, config.granularity)
        if is_lora and (part.startswith("gate") or unit not in kept):
            continue
        if part.startswith(("B", "embedding_B")) and config.gate_mode in ("joint", "soft"):
            tensor = (tensor * gates[unit].to(tensor.device)).to(tensor.dtype)
        tensors[key] = tensor.contiguous()

    options = lora_options(config)
    if kept >= modules.keys():
        return tensors, LoraConfig(**options)
    for name in DECIDED_BY_SELECTION:
        del options[name]
    selected = [unit for unit in modules if unit in kept]
    if lookalikes is None:
        return tensors, LoraConfig(target_modules=[name for unit in selected for name in modules[unit]], **options)
    importance = LayerImportance(list(modules), [0.0] * len(modules), modules=modules, lookalikes=lookalikes)
    return tensors, to_lora_config(importance, selected, **options)


def export_adapter(adapter_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> LoraConfig:
    """
    Write a saved ILA adapter as a plain LoRA adapter, without the base model. See [`to_plain_lora`].

    Args:
        adapter_dir: The directory with `adapter_config.json` and `adapter_model.safetensors`.
        output_dir: Where to write the same two files.

    Raises:
        ValueError: There is no ILA adapter in `adapter_dir`.
    """
    config = PeftConfig.from_pretrained(str(adapter_dir))
    if not isinstance(config, ILAConfig):
        raise ValueError(f"{adapter_dir} holds an adapter of type {config.peft_type.value}, not ILA.")
    tensors, lora = to_plain_lora(load_file(Path(adapter_dir) / SAFETENSORS_WEIGHTS_NAME), config)
    save_adapter(tensors, lora, output_dir)
    return lora


def save_adapter(tensors: dict[str, torch.Tensor], config: LoraConfig, output_dir: str | os.PathLike[str]) -> None:
    """Write an adapter as PEFT does, the configuration last."""
    seen: set[int] = set()
    for key, tensor in tensors.items():  # safetensors refuses tied weights, which PEFT saves twice
        if tensor.data_ptr() in seen:
            tensors[key] = tensor.clone()
        seen.add(tensor.data_ptr())
    with whole_file(Path(output_dir) / SAFETENSORS_WEIGHTS_NAME) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    config = copy.copy(config)
    config.inference_mode = True  # as PEFT saves an adapter
    with whole_file(Path(output_dir) / CONFIG_NAME) as temporary:
        config.save_pretrained(str(temporary.parent))


def _target_candidates(
    importance: LayerImportance, selected: list[str], expected: set[str]
) -> Iterator[dict[str, Any]]:
    """Ways to target the modules, the most readable first. Not all of them hit only those modules."""
    layers = [split_layer(unit) for unit in selected]
    # units that are whole layers, not modules in them
    if all(layer and unit == f"{layer[0]}.{layer[1]}" for unit, layer in zip(selected, layers)):
        stacks = {layer[0] for layer in layers if layer}
        indices = sorted({layer[1] for layer in layers if layer})
        short = sorted({name.rpartition(".")[2] for name in expected})
        within = sorted({name.removeprefix(f"{unit}.") for unit in selected for name in importance.modules[unit]})
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


def check_injection(config: PeftConfig, skeleton: nn.Module, expected: set[str]) -> None:
    """
    Inject a configuration and compare the modules that PEFT adapts with the expected ones.

    Args:
        config: The configuration; it is copied, since PEFT edits what it is given.
        skeleton: A model on the meta device, which gets the adapter.
        expected: The names of the modules that must be hit.

    Raises:
        ValueError: PEFT hits other modules.
    """
    config = copy.deepcopy(config)
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # some other initialisations read the base weights
    tuner_cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
    hit = set(tuner_cls(skeleton, config, "default", low_cpu_mem_usage=True).targeted_module_names)
    if hit != expected:
        raise ValueError(
            f"PEFT would adapt {len(hit)} modules instead of the {len(expected)} selected: it misses "
            f"{sorted(expected - hit)[:3]} and adds {sorted(hit - expected)[:3]}."
        )


def meta_skeleton(model: nn.Module | PretrainedConfig) -> nn.Module:
    """
    The plain architecture of a model on the meta device, without its weights, its quantisation or its adapters.

    Args:
        model: A model of transformers, with or without adapters, its configuration, or any other module.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if isinstance(model, PretrainedConfig):
        architecture = (model.architectures or [""])[0]
        model_class = getattr(transformers, architecture, None)
        auto: Any = (
            transformers.AutoModelForSeq2SeqLM if model.is_encoder_decoder else transformers.AutoModelForCausalLM
        )
        with torch.device("meta"):
            if model_class is not None:
                return model_class(copy.deepcopy(model))
            # a configuration with code of its own was trusted when it was loaded
            return auto.from_config(
                model, trust_remote_code=type(model).__module__.startswith("transformers_modules.")
            )
    if isinstance(model, PreTrainedModel):
        with torch.device("meta"):
            return type(model)(copy.deepcopy(model.config))
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _on_meta(tensor) for tensor in tensors})


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def freeze(model: nn.Module, units: Iterable[str]) -> list[str]:
    """
    Set `requires_grad=False` on all parameters that belong to the units alone: a weight that is tied to another module
    stays as it is.

    Returns:
        The names of the parameters, in the order of the model.

    Raises:
        ValueError: The model lacks one of the units; nothing is frozen then.
    """
    modules = dict(model.named_modules())
    units = list(units)
    if missing := [unit for unit in units if unit not in modules]:
        raise ValueError(
            f"The model has no {missing[0]!r} ({len(missing)} of {len(units)} units to freeze are missing). Pass the "
            "plain model that was ranked, not a `PeftModel` or another architecture."
        )
    inside = tuple(f"{unit}." for unit in units)
    every = model.named_parameters(remove_duplicate=False)
    outside = {id(parameter) for name, parameter in every if not name.startswith(inside)}
    names = [name for name, parameter in model.named_parameters() if id(parameter) not in outside]
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names
