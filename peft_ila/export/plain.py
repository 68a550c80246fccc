"""Turns a gated adapter into an equivalent plain LoRA adapter."""

import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from ..units import unit_of
from .adapters import SAVED_PREFIX, adapter_directory, read_adapter, save_adapter, split_key
from .lora import DECIDED_BY_SELECTION, Targets, to_lora_config


def lora_options(config: LoraConfig) -> dict[str, Any]:
    """The LoRA options of a configuration, to make one of another class."""
    return {field.name: getattr(config, field.name) for field in fields(LoraConfig) if field.name != "peft_type"}


def to_plain_lora(
    state_dict: dict[str, torch.Tensor], config: Any, lookalikes: Sequence[str] = ()
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """
    Turn a saved ILA adapter into an equivalent plain LoRA adapter: gates multiplied into B, closed units left out.
    Other weights (biases, `modules_to_save`) have no gate and stay.

    Args:
        state_dict: The adapter's tensors as PEFT saves them; they are not changed.
        config ([`ILAConfig`]): The adapter's configuration.
        lookalikes: The model's other modules that share the last part of their name with a target module, if the model
            is at hand.

    Returns:
        Tensors and configuration, ready to be written. The configuration is the given one without the gates; if some
        units are closed, its targets are the full names of the kept modules.

    Raises:
        ValueError: The tensors lack the gate of a unit, or a DoRA adapter has gates between 0 and 1.
    """
    parameters = config.gated_parameters or {}
    names = target_names(state_dict, config)
    units = {path: unit_of(name, config.granularity) for path, name in names.items()}
    if unknown := sorted(set(config.gate_mask or ()) - set(units.values())):
        raise ValueError(f"`gate_mask` has {unknown[0][:80]!r}, which is not a unit of the adapter.")
    kept = {path for path, unit in units.items() if config.gate_mode != "hard" or unit in config.gate_mask}
    gates = _gates(state_dict, units) if config.gate_mode in ("joint", "soft") else {}
    if gates and config.use_dora:
        raise ValueError(
            "A DoRA adapter with gates between 0 and 1 cannot be exported. Open all gates by "
            '`set_gate_mode("open")`, or close some by `apply_mask`.'
        )
    tensors = {}
    for key, tensor in state_dict.items():
        path, is_lora, part = split_key(key)
        if is_lora and (path not in kept or part.startswith("gate")):
            continue
        if gates and is_lora_b(key):
            tensor = (tensor * gates[units[path]].to(tensor.device)).to(tensor.dtype)
        tensors[_key_in_plain_lora(key, path, kept, path in parameters)] = tensor.contiguous()

    options = lora_options(config)
    if kept == names.keys():
        return tensors, LoraConfig(**options)
    for name in DECIDED_BY_SELECTION:
        del options[name]
    ranks = dict.fromkeys(parameters.values(), 1.0)  # the ranks in the options hold
    targets = Targets({name: [name] for name in names.values()}, lookalikes, ranks)
    selected = list(dict.fromkeys(name for path, name in names.items() if path in kept))
    return tensors, to_lora_config(targets, selected, **options)


def is_lora_b(key: str) -> bool:
    """Whether the tensor of this key is a B."""
    return split_key(key)[2].startswith(("B", "embedding_B"))


def target_names(state_dict: dict[str, torch.Tensor], config: Any) -> dict[str, str]:
    """The module or parameter that each LoRA layer adapts, by the layer's path."""
    parameters = config.gated_parameters or {}
    paths = [path for path, is_lora, _ in map(split_key, state_dict) if is_lora]
    # `MultiheadAttention` holds a second LoRA layer, its output projection
    return {path: parameters.get(path, path.partition(".base_layer.")[0]) for path in paths}


def _gates(state_dict: dict[str, torch.Tensor], units: dict[str, str]) -> dict[str, torch.Tensor]:
    """γ of each unit."""
    gates = {}
    for key, tensor in state_dict.items():
        path, _, part = split_key(key)
        if part.startswith("gate"):
            gates[units[path]] = torch.sigmoid(tensor.float())
    if missing := sorted(set(units.values()) - gates.keys()):
        raise ValueError(f"The adapter has no gate for {missing[0]!r}. Does it belong to this configuration?")
    return gates


def _key_in_plain_lora(key: str, path: str, kept: set[str], is_parameter: bool) -> str:
    """The key of a tensor when PEFT wraps only the kept modules."""
    module, inside, part = key.removeprefix(SAVED_PREFIX).rpartition(".base_layer.")
    if inside and part in ("bias", "weight"):  # trained biases, and embeddings that PEFT saves with the adapter
        return key if module in kept else f"{SAVED_PREFIX}{module}.{part}"
    if is_parameter:  # the layers of several parameters of one module are nested
        module, *inner = path.split(".base_layer")
        around = sum(module + ".base_layer" * depth in kept for depth in range(len(inner)))
        return key.replace(path, module + ".base_layer" * around, 1)
    return key


def export_adapter(adapter_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> LoraConfig:
    """
    Write a saved ILA adapter as a plain LoRA adapter. The base model is not needed. See [`to_plain_lora`].

    Args:
        adapter_dir: The directory with `adapter_config.json` and `adapter_model.safetensors`.
        output_dir: Where to write the same two files.

    Raises:
        FileNotFoundError: There is no adapter in `adapter_dir`.
        ValueError: The adapter is not an ILA adapter, is damaged, or lies in `output_dir`.
    """
    directory = adapter_directory(adapter_dir)
    if directory.resolve() == Path(output_dir).resolve():
        raise ValueError(f"{output_dir} holds the adapter that would be replaced. Choose another `output_dir`.")
    config, saved = read_adapter(directory)
    if config.peft_type != "ILA":
        raise ValueError(f"{adapter_dir} holds a plain LoRA adapter, which has no gates. Load it as it is.")
    _check_layers(saved, config)
    tensors, lora = to_plain_lora(saved, config)
    save_adapter(tensors, lora, output_dir)
    return lora


def _check_layers(tensors: dict[str, torch.Tensor], config: Any) -> None:
    """Check that PEFT makes these layers of these ranks from the configuration, and that each unit has its gate."""
    names = target_names(tensors, config)
    _gates(tensors, {path: unit_of(name, config.granularity) for path, name in names.items()})
    ranks = {}
    for key, tensor in tensors.items():
        path, _, part = split_key(key)
        if part.removeprefix("embedding_").removesuffix(".weight") == "A":
            ranks[path] = list(tensor.shape[:1])
    for path, name in names.items():
        if path in (config.gated_parameters or ()):
            continue
        try:
            is_target = config.target_modules and check_target_module_exists(config, name)
            rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
        except re.error as error:
            raise ValueError(f"The adapter's configuration has an invalid regular expression: {error}.") from error
        if not is_target:
            raise ValueError(f"{path!r} is not a target of the adapter's configuration.")
        if ranks[path] != [rank]:
            raise ValueError(f"{path!r} has the rank {ranks[path]}, but the adapter's configuration says {rank}.")
