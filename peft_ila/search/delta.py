"""Turns the weight deltas of a fully fine-tuned checkpoint into a LoRA adapter, one module at a time."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_NAME

from ..export.adapters import SAVED_PREFIX, save_adapter
from ..export.lora import DECIDED_BY_SELECTION
from ..export.skeleton import meta_skeleton
from ..files import open_safetensors


def extract_lora(
    base_model: str,
    tuned_model: str,
    config: LoraConfig,
    output_dir: str | os.PathLike[str],
    rank: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """
    Write the weight deltas Δθ of a fully fine-tuned checkpoint as a LoRA adapter, which can then be gated and ranked.

    Both checkpoints are read from their safetensors files. Besides the adapter, only one module's weights are in
    memory at a time. The adapter leaves out changes outside the target modules (norms, embeddings); their share is
    reported.

    Args:
        base_model (`str`): Directory or hub name of the pretrained model.
        tuned_model (`str`): Directory or hub name of the fine-tuned model.
        config ([`~peft.LoraConfig`]): Its targets are the linear modules to compare. Rank and scaling are replaced.
        output_dir (`str`): Where to write `adapter_config.json` and `adapter_model.safetensors`.
        rank (`int`, *optional*):
            Keep the largest `rank` singular values of each delta. By default all: the factors are then the delta
            itself and an identity, and B·A is exact.
        revision (`str`, *optional*): The base model's revision on the hub.
        trust_remote_code (`bool`): Whether to trust the base model's own code.

    Returns:
        `dict`: `energy_kept`, the adapter's share of Σ‖Δθ‖² over the target modules; `energy_outside`, the share of
        Σ‖Δθ‖² outside the target modules; and `not_compared`, the weights outside that the files lack under their
        names (transformers fuses the experts of some models).

    Raises:
        ValueError: The checkpoints do not belong together, hold no safetensors, or a target is not a linear module.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}; leave it out to keep the whole delta.")
    model_config = AutoConfig.from_pretrained(base_model, revision=revision, trust_remote_code=trust_remote_code)
    skeleton = meta_skeleton(model_config)
    names = [name for name, _ in skeleton.named_parameters()]  # tied weights once, as they are saved
    targets = _linear_targets(skeleton, config)
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    base, tuned = _saved_weights(base_model, names, prefix, revision), _saved_weights(tuned_model, names, prefix)
    compared = [name for name in names if name in base and name in tuned]
    if missing := sorted({f"{name}.weight" for name in targets}.difference(compared)):
        raise ValueError(
            f"{base_model} and {tuned_model} do not both hold {missing[0]!r} ({len(missing)} weights missing). Was "
            "the second fine-tuned from the first?"
        )

    factors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    inside = kept = outside = 0.0
    not_compared = set(names).difference(compared)
    for name in tqdm(compared, desc="Reading weight deltas"):
        module = name.removesuffix(".weight")
        before, after = _read(base[name]), _read(tuned[name])
        if before.shape != after.shape:
            if module not in targets:  # embeddings with more tokens
                not_compared.add(name)
                continue
            shapes = f"{tuple(before.shape)} in {base_model}, but {tuple(after.shape)} in {tuned_model}"
            raise ValueError(f"{name!r} has the shape {shapes}.")
        delta = after.float().sub_(before.float())
        del before, after
        energy = float(delta.square().sum(dtype=torch.float64))
        if not math.isfinite(energy):
            raise ValueError(f"The delta of {name!r} is not finite. Is one of the checkpoints damaged?")
        if module in targets:
            # the weight of Conv1D is transposed
            a, b = _factorise(delta.T if isinstance(targets[module], Conv1D) else delta, rank)
            factors |= {f"{SAVED_PREFIX}{module}.lora_A.weight": a, f"{SAVED_PREFIX}{module}.lora_B.weight": b}
            ranks[module] = len(a)
            inside += energy
            # the columns of B are orthogonal, or the rows of A are those of the identity
            kept += float(b.square().sum(0, dtype=torch.float64) @ a.square().sum(1, dtype=torch.float64))
        else:
            outside += energy
        del delta  # before the next two weights are read

    if inside == 0:
        raise ValueError(f"{tuned_model} does not differ from {base_model} in any target module.")
    most = max(ranks.values())
    fewer = {module: r for module, r in ranks.items() if r < most}
    lora = LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=base_model,
        r=most,
        lora_alpha=most,  # α/r = 1: the factors hold the delta as it is
        rank_pattern=fewer,
        alpha_pattern=fewer,
        target_modules=sorted(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets.values()),
    )
    save_adapter(factors, lora, output_dir)
    return {
        "energy_kept": min(kept / inside, 1.0),
        "energy_outside": outside / (outside + inside),
        "not_compared": sorted(not_compared),
    }


def _linear_targets(skeleton: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    modules = dict(skeleton.named_modules())
    plain = LoraConfig(**{name: getattr(config, name) for name in DECIDED_BY_SELECTION})
    names = LoraModel(skeleton, plain, "default", low_cpu_mem_usage=True).targeted_module_names
    for name in names:
        if not isinstance(modules[name], (nn.Linear, Conv1D)):
            raise ValueError(f"Only deltas of linear modules can be factorised, but {name!r} is {modules[name]}.")
    return {name: modules[name] for name in names}


def _factorise(delta: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r)."""
    rows, columns = delta.shape
    if rank is None or rank >= min(rows, columns):
        if columns <= rows:
            return torch.eye(columns), delta.contiguous()
        return delta.contiguous(), torch.eye(rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # much faster than the whole decomposition of a large matrix; power iterations make it as exact
        u, s, v = torch.svd_lowrank(delta, q=min(2 * rank, rows, columns), niter=4)
    root = s[:rank].sqrt()
    return (v[:, :rank] * root).T.contiguous(), (u[:, :rank] * root).contiguous()


def _saved_weights(
    model: str, names: list[str], prefix: str, revision: str | None = None
) -> dict[str, tuple[Path, str]]:
    """The file and the key of each of these weights that a saved model has."""
    directory = Path(model).expanduser()
    if not directory.is_dir():
        directory = Path(snapshot_download(model, revision=revision, allow_patterns="model*.safetensors"))
    whole = directory / SAFE_WEIGHTS_NAME
    files: dict[str, Path] = {}  # by key
    for path in [whole] if whole.exists() else sorted(directory.glob("model*.safetensors")):
        with open_safetensors(path) as tensors:
            files |= dict.fromkeys(tensors.keys(), path)
    if not files:
        raise ValueError(f"{directory} holds no {SAFE_WEIGHTS_NAME}; convert its weights to safetensors first.")
    found = {}
    for name in names:
        # a backbone saved without its head lacks the prefix; a model with a head has it
        for key in (name, name.removeprefix(prefix), prefix + name):
            if key in files:
                found[name] = (files[key], key)
                break
    return found


def _read(where: tuple[Path, str]) -> torch.Tensor:
    path, key = where
    with open_safetensors(path) as tensors:
        return tensors.get_tensor(key)
