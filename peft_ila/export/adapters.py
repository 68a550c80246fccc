"""Reads and checks saved adapters, and writes them as PEFT does."""

import copy
import os
import re
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
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from ..files import open_safetensors, read_json, whole_file
from ..units import check_name, unit_of

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
    for name, value in content.items():
        hint = hints.get(name)
        kinds = (*get_args(hint), hint)
        if hint is None or name == "layer_replication":  # pairs, which are lists in JSON
            continue
        if isinstance(value, dict) and any(kind is dict or is_dataclass(kind) for kind in kinds):
            continue
        if name == "init_lora_weights" and str(value).startswith("pissa_niter_"):
            continue
        if (name == "lora_alpha" and isinstance(value, float)) or (float in kinds and type(value) is int):
            continue
        type_validator(name, value, hint)


def _check_values(config: Any) -> None:
    def positive(value: Any) -> bool:
        # an integer may be too large for a float
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**53

    def mapping(value: Any) -> bool:
        return isinstance(value, dict) and all(map(positive, value.values()))

    expected = {
        "r": (positive(config.r), "at least 1"),
        "lora_alpha": (positive(config.lora_alpha), "a finite number above 0"),
        "lora_dropout": (0 <= config.lora_dropout <= 1, "from 0 to 1"),
        "rank_pattern": (mapping(config.rank_pattern), "a mapping to finite numbers above 0"),
        "alpha_pattern": (mapping(config.alpha_pattern), "a mapping to finite numbers above 0"),
    }
    for option, (good, wanted) in expected.items():
        if not good:
            raise ValueError(f"`{option}` must be {wanted}, got {repr(getattr(config, option))[:80]}")
    for values in (getattr(config, "gated_parameters", None) or {}).items():
        for name in values:
            check_name(name)


def _check_weights(tensors: Mapping[str, torch.Tensor], config: Any) -> None:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        path, is_lora, part = split_key(key)
        if not key.startswith(SAVED_PREFIX) or not (is_lora or _is_saved_beside(path, tensor, config)):
            raise ValueError(f"{key!r} is not a weight of a LoRA adapter with this configuration.")
        if is_lora and not tensor.is_floating_point():
            raise ValueError(f"{key!r} has the type {tensor.dtype}, which is not floating point.")
        if not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():
            raise ValueError(f"{key!r} is not finite. Did training diverge?")
        if is_lora:
            layers.setdefault(path, {})[part.removesuffix(".weight")] = tensor
    if not layers:
        raise ValueError("it holds no LoRA weights.")
    if config.trainable_token_indices is not None and not any("trainable_tokens_delta" in key for key in tensors):
        raise ValueError("it lacks the weights of the tokens in `trainable_token_indices`.")

    parameters = getattr(config, "gated_parameters", None) or {}
    granularity: Any = getattr(config, "granularity", "module")
    units = set()
    for path, own in layers.items():
        rank = _check_layer(path, own)
        if config.use_dora != ("magnitude_vector" in own):
            raise ValueError(f"{path!r} {'lacks' if config.use_dora else 'has'} the magnitude vector of DoRA.")
        units.add(unit_of(parameters.get(path, path), granularity))
        try:
            # `MultiheadAttention` holds a second LoRA layer, its output projection
            expected = path in parameters or _is_expected(path.partition(".base_layer.")[0], rank, config)
        except re.error as error:
            raise ValueError(f"the configuration has an invalid regular expression: {error}.") from error
        if not expected:
            raise ValueError(f"{path!r} is not a target of the adapter's configuration, or has another rank.")
    if unknown := sorted(set(getattr(config, "gate_mask", None) or ()) - units):
        raise ValueError(f"`gate_mask` has {unknown[0][:80]!r}, which is not a unit of the adapter.")


def _is_expected(path: str, rank: int, config: Any) -> bool:
    """Whether PEFT would make this layer from the configuration."""
    # the layers of parameters have paths and ranks of their own; ILA's configuration names them
    if config.target_parameters and not hasattr(config, "gated_parameters"):
        return True
    if not config.target_modules or not check_target_module_exists(config, path):
        return False
    patterns = config.rank_pattern
    return patterns.get(get_pattern_key(list(patterns), path), config.r) == rank


def _check_layer(path: str, own: Mapping[str, torch.Tensor]) -> int:
    """Check a layer and return its rank."""
    if unknown := sorted(own.keys() - {"A", "B", "embedding_A", "embedding_B", "magnitude_vector", "gate"}):
        raise ValueError(f"{path!r} has {unknown[0]!r}, which is not a LoRA weight.")
    a, b = (own.get(part, own.get(f"embedding_{part}")) for part in "AB")
    if a is None or b is None:
        raise ValueError(f"{path!r} lacks {'A' if a is None else 'B'}.")
    fits = a.ndim >= 2 and b.ndim == a.ndim and 0 not in (*a.shape, *b.shape)
    # each group of a convolution has its own part of the rank
    if not fits or (a.shape[0] % b.shape[1] if a.ndim > 2 else a.shape[0] != b.shape[1]):
        raise ValueError(f"A and B of {path!r} do not fit: their shapes are {tuple(a.shape)} and {tuple(b.shape)}.")
    if "gate" in own and own["gate"].shape != (1,):
        raise ValueError(f"The gate of {path!r} must have the shape (1,), but has {tuple(own['gate'].shape)}.")
    return len(a)


def _is_saved_beside(path: str, tensor: torch.Tensor, config: Any) -> bool:
    parts = path.split(".")
    if any(name in parts or f".{name}." in f".{path}" for name in config.modules_to_save or ()):
        return True
    if config.trainable_token_indices and any("token" in part for part in parts):
        return True
    # embeddings and heads of a resized vocabulary, whatever the model calls them
    return parts[-1] in ("weight", "bias") and tensor.ndim in (1, 2)
