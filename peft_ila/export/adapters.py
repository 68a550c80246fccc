"""Reads and checks saved adapters, and writes them as PEFT does."""

import copy
import os
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file

from ..files import open_safetensors, read_json, whole_file

# PeftModel's prefix of the base model's module names
SAVED_PREFIX = "base_model.model."


def split_key(key: str) -> tuple[str, str, str]:
    """Split into a LoRA layer's path in the base model, ".lora_" and the tensor; the last two are empty for others."""
    return key.removeprefix(SAVED_PREFIX).partition(".lora_")


def adapter_directory(name: str | os.PathLike[str]) -> Path:
    """The directory of an adapter, downloaded if the adapter is on the hub."""
    directory = Path(name).expanduser()
    if not directory.exists() and not os.fspath(name).startswith((".", "/", "~")):
        try:
            directory = Path(snapshot_download(str(name), allow_patterns=[CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]))
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(f"There is no adapter {name} here or on the hub: {error}") from error
    if not (directory / CONFIG_NAME).is_file():
        inside = directory / "adapter"  # `rank` writes it there
        hint = f" There is one in {inside}." if (inside / CONFIG_NAME).is_file() else ""
        raise FileNotFoundError(f"There is no adapter in {name}: it lacks {CONFIG_NAME}.{hint}")
    return directory


def read_config(directory: Path) -> Any:
    """Read and check the configuration of an adapter."""
    path = directory / CONFIG_NAME
    content = read_json(path)
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{path} has the `peft_type` {str(kind)[:40]!r}, which this PEFT does not know.")
    try:
        config: Any = PeftConfig.from_pretrained(str(directory))
        if isinstance(config, LoraConfig):
            _check_kinds(content, get_type_hints(type(config)))
            _check_values(config)
    except Exception as error:  # a wrong type can make PEFT raise anything
        raise ValueError(f"{path} is not a valid configuration: {' '.join(str(error).split())[:300]}") from error
    return config


def read_adapter(directory: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Read and check the configuration and the tensors of a LoRA or ILA adapter."""
    config = read_config(directory)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{directory} holds an adapter of type {config.peft_type.value}, not LoRA or ILA.")
    path = directory / SAFETENSORS_WEIGHTS_NAME
    if not path.exists() and (directory / WEIGHTS_NAME).exists():
        raise ValueError(
            f"{directory} holds {WEIGHTS_NAME}, a pickle that could run code. If you trust it, load it with PEFT "
            f"and call `save_pretrained`, which writes {SAFETENSORS_WEIGHTS_NAME}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"{directory} lacks {SAFETENSORS_WEIGHTS_NAME}.")
    with open_safetensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
    try:
        _check_weights(tensors, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config, tensors


def save_adapter(tensors: dict[str, torch.Tensor], config: LoraConfig, output_dir: str | os.PathLike[str]) -> None:
    """Write an adapter as PEFT does, with the configuration last."""
    seen: set[int] = set()
    for key, tensor in tensors.items():  # safetensors refuses tied weights, which PEFT saves twice
        if tensor.data_ptr() in seen:
            tensors[key] = tensor.clone()
        seen.add(tensor.data_ptr())
    with whole_file(Path(output_dir) / SAFETENSORS_WEIGHTS_NAME) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    config = copy.copy(config)
    config.inference_mode = True  # as in PEFT
    with whole_file(Path(output_dir) / CONFIG_NAME) as temporary:
        config.save_pretrained(str(temporary.parent))


def _check_kinds(content: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Check the options' types. PEFT does not, and fails far from the file."""
    for name in content.keys() & hints.keys():
        value, hint = content[name], hints[name]
        kinds = (hint, *get_args(hint))
        # what PEFT takes beside its hints, so that ILA can say why it refuses some of it
        if (
            (name == "lora_alpha" and isinstance(value, float))
            or (type(value) is int and float in kinds)
            or (isinstance(value, dict) and any(map(is_dataclass, kinds)))
            or (name == "init_lora_weights" and str(value).startswith("pissa_niter_"))
            or name == "layer_replication"  # pairs, which are lists in JSON
        ):
            continue
        type_validator(name, value, hint)


def _check_values(config: Any) -> None:
    for option in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        value = getattr(config, option)
        numbers = value.values() if isinstance(value, dict) else [value]
        # an integer may be too large for a float
        if not all(type(number) in (int, float) and 0 < number < 2**53 for number in numbers):
            raise ValueError(f"`{option}` must hold finite numbers above 0, got {repr(value)[:80]}")
    if not 0 <= config.lora_dropout <= 1:
        raise ValueError(f"`lora_dropout` must be from 0 to 1, got {config.lora_dropout}")


def _check_weights(tensors: Mapping[str, torch.Tensor], config: Any) -> None:
    """Check that the file has the weights of whole LoRA layers. PEFT checks their shapes when it loads them."""
    layers: dict[str, set[str]] = {}
    for key, tensor in tensors.items():
        path, is_lora, part = split_key(key)
        if not key.startswith(SAVED_PREFIX):
            raise ValueError(f"{key!r} is not a weight of an adapter.")
        if is_lora and not tensor.is_floating_point():
            raise ValueError(f"{key!r} has the type {tensor.dtype}, which is not floating point.")
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{key!r} is not finite. Did training diverge?")
        if part.startswith("gate") and tensor.shape != (1,):
            raise ValueError(f"{key!r} must have the shape (1,), but has {tuple(tensor.shape)}.")
        if is_lora:
            layers.setdefault(path, set()).add(part.removeprefix("embedding_").removesuffix(".weight"))
    if not layers:
        raise ValueError("it holds no LoRA weights.")
    if config.trainable_token_indices is not None and not any("trainable_tokens_delta" in key for key in tensors):
        raise ValueError("it lacks the weights of the tokens in `trainable_token_indices`.")
    wanted = {"A", "B", "magnitude_vector"} if config.use_dora else {"A", "B"}
    for path, found in layers.items():
        found.discard("gate")
        if found != wanted:
            raise ValueError(f"{path!r} must have the LoRA weights {sorted(wanted)}, but has {sorted(found)}.")
