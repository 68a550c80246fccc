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
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..export.adapters import SAVED_PREFIX, save_adapter
from ..export.lora import DECIDED_BY_SELECTION
from ..export.skeleton import meta_skeleton
from ..files import open_safetensors, read_json


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
        `dict`: `energy_kept`, the adapter's share of Σ‖Δθ‖² over the target modules; `energy_kept_by_module`, the
        same for each module; `energy_outside`, the share of Σ‖Δθ‖² outside the target modules; and `not_compared`,
        the weights outside that the files lack under their names (transformers fuses the experts of some models).

    Raises:
        ValueError: The checkpoints do not belong together, hold no safetensors, or a target is not a linear module.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}; leave it out to keep the whole delta.")
    model_config = AutoConfig.from_pretrained(base_model, revision=revision, trust_remote_code=trust_remote_code)
    skeleton = meta_skeleton(model_config)
    weights = [name for name, _ in skeleton.named_parameters()]  # tied ones once, as they are saved
    targets = _linear_targets(skeleton, config)
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    base, tuned = _Checkpoint(base_model, prefix, revision), _Checkpoint(tuned_model, prefix)
    names = [name for name in weights if name in base and name in tuned]
    if missing := sorted({f"{name}.weight" for name in targets}.difference(names)):
        raise ValueError(
            f"{base_model} and {tuned_model} do not both hold {missing[0]!r} ({len(missing)} weights missing). Was "
            "the second fine-tuned from the first?"
        )

    factors: dict[str, torch.Tensor] = {}
    energy: dict[str, float] = {}
    kept: dict[str, float] = {}
    outside = 0.0
    for name in tqdm(names, desc="Reading weight deltas"):
        delta = _delta(base, tuned, name)
        module, norm = name.removesuffix(".weight"), float(delta.square().sum(dtype=torch.float64))
        if module in targets:
            # the weight of Conv1D is transposed
            a, b, held = _factorise(delta.T if isinstance(targets[module], Conv1D) else delta, rank)
            energy[module] = norm
            kept[module] = 1.0 if held is None or not norm else min(held / norm, 1.0)
            factors[f"{SAVED_PREFIX}{module}.lora_A.weight"] = a
            factors[f"{SAVED_PREFIX}{module}.lora_B.weight"] = b
        else:
            outside += norm
        del delta  # before the next two weights are read

    total = sum(energy.values())
    if total == 0:
        raise ValueError(f"{tuned_model} does not differ from {base_model} in any target module.")
    save_adapter(factors, _configuration(config, base_model, targets, factors), output_dir)
    return {
        "energy_kept": math.fsum(energy[m] * kept[m] for m in energy) / total,
        "energy_outside": outside / (outside + total),
        "energy_kept_by_module": kept,
        "not_compared": sorted(set(weights).difference(names)),
    }


def _delta(base: "_Checkpoint", tuned: "_Checkpoint", name: str) -> torch.Tensor:
    before, after = base.read(name), tuned.read(name)
    if before.shape != after.shape:
        raise ValueError(
            f"{name!r} has the shape {tuple(before.shape)} in {base.name}, but {tuple(after.shape)} in {tuned.name}."
        )
    delta = after.float().sub_(before.float())
    if not torch.isfinite(delta).all():
        raise ValueError(f"The delta of {name!r} is not finite. Is one of the checkpoints damaged?")
    return delta


def _configuration(
    config: LoraConfig, base_model: str, targets: dict[str, nn.Module], factors: dict[str, torch.Tensor]
) -> LoraConfig:
    ranks = {module: len(factors[f"{SAVED_PREFIX}{module}.lora_A.weight"]) for module in targets}
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    different = {module: r for module, r in ranks.items() if r != most}
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=base_model,
        r=most,
        lora_alpha=most,  # α/r = 1: the factors hold the delta as it is
        rank_pattern=different,
        alpha_pattern=different,
        target_modules=sorted(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets.values()),
    )


def _linear_targets(skeleton: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    modules = dict(skeleton.named_modules())
    plain = LoraConfig(**{name: getattr(config, name) for name in DECIDED_BY_SELECTION})
    names = LoraModel(skeleton, plain, "default", low_cpu_mem_usage=True).targeted_module_names
    for name in names:
        if not isinstance(modules[name], (nn.Linear, Conv1D)):
            raise ValueError(f"Only deltas of linear modules can be factorised, but {name!r} is {modules[name]}.")
    return {name: modules[name] for name in names}


def _factorise(delta: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """A (r, in), B (out, r), and ‖B·A‖², or `None` if B·A is the whole delta."""
    rows, columns = delta.shape
    if rank is None or rank >= min(rows, columns):
        if columns <= rows:
            return torch.eye(columns), delta.contiguous(), None
        return delta.contiguous(), torch.eye(rows), None
    if 4 * rank >= min(rows, columns):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:  # much faster for a large matrix; power iterations make it as exact
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(delta, q=2 * rank, niter=4)
        vh = v.T
    root = s[:rank].sqrt()
    held = float(s[:rank].double().square().sum())
    return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous(), held


class _Checkpoint:
    """The weights of a saved model, read on demand."""

    def __init__(self, name: str, prefix: str, revision: str | None = None) -> None:
        directory = Path(name).expanduser()
        if not directory.is_dir():
            files_wanted = ["*.safetensors", "*.safetensors.index.json"]
            directory = Path(snapshot_download(name, revision=revision, allow_patterns=files_wanted))
        self.name = name
        self._prefix = prefix
        self._where: dict[str, Path] = {}
        for path in _weight_files(directory):
            with open_safetensors(path) as tensors:
                self._where |= dict.fromkeys(tensors.keys(), path)

    def _key(self, name: str) -> str | None:
        # a backbone saved without its head lacks the prefix; a model with a head has it
        candidates = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((key for key in candidates if key in self._where), None)

    def __contains__(self, name: str) -> bool:
        return self._key(name) is not None

    def read(self, name: str) -> torch.Tensor:
        key = self._key(name)
        assert key is not None
        with open_safetensors(self._where[key]) as tensors:
            return tensors.get_tensor(key)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if not index.exists():
        if not (directory / SAFE_WEIGHTS_NAME).exists():
            raise ValueError(f"{directory} holds no {SAFE_WEIGHTS_NAME}; convert its weights to safetensors first.")
        return [directory / SAFE_WEIGHTS_NAME]
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} is not an index of weights: it lacks `weight_map`.")
    for file in names.values():
        if not isinstance(file, str) or Path(file).name != file or not (directory / file).is_file():
            raise ValueError(f"{index} names {str(file)[:80]!r}, which is not in the same directory.")
    return [directory / file for file in sorted(set(names.values()))]
