"""Train with any trainer, and turn its failures into clear errors."""

import pickle
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import nn

from ..export.adapters import read_adapter


def train(trainer: Any, checkpoint: str | None) -> None:
    """Train from the start or from a checkpoint."""
    if checkpoint:
        _check_checkpoint(trainer, Path(checkpoint))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (pickle.UnpicklingError, EOFError) as error:
        if checkpoint is None:
            raise
        raise ValueError(f"The checkpoint {checkpoint} is damaged: {error!r}.") from error
    except SafetensorError as error:
        raise OSError(f"A checkpoint in {trainer.args.output_dir} could not be written or read: {error}") from error
    except Exception as error:
        # how torch and tokenizers report a full disk
        text = str(error)
        full = type(error) is Exception and "os error" in text
        if full or "PytorchStreamWriter" in text or "unexpected pos" in text:
            raise OSError(f"A checkpoint in {trainer.args.output_dir} could not be written: {error}") from error
        raise
    if trainer.state.global_step == 0:
        raise ValueError("Not a single step was trained: the data fill no batch, or the arguments ask for no steps.")
    check_finite(trainer.model, trainer.state.global_step)


def load_adapter(trainer: Any, directory: Path) -> None:
    """Load a saved adapter into the active one."""
    read_adapter(directory)  # PEFT checks little of it
    try:
        # PEFT cannot take an absolute path for the name of a repository
        loaded = trainer.model.load_adapter(str(directory.resolve()), trainer.model.active_adapter, is_trainable=True)
    except RuntimeError as error:  # tensors of other sizes
        base = trainer.model.active_peft_config.base_model_name_or_path
        raise ValueError(f"The adapter {directory} does not fit {base}: {error}") from error
    except KeyError as error:  # a weight of `modules_to_save`
        raise ValueError(f"The adapter {directory} lacks the weight {error}.") from error
    _check_keys(trainer, directory, loaded.missing_keys, loaded.unexpected_keys)


def _check_checkpoint(trainer: Any, directory: Path) -> None:
    """Check the keys: the trainer ignores the missing and unexpected ones that PEFT returns."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel) or not (directory / SAFETENSORS_WEIGHTS_NAME).exists():  # FSDP2 shards it
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # under ZeRO-3 each process holds a part of the weights
        own = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    saved = read_adapter(directory)[1]
    _check_keys(trainer, directory, own.keys() - saved.keys(), {k for k in saved if ".lora_" in k} - own.keys())


def _check_keys(trainer: Any, directory: Path, missing: Collection[str], unexpected: Collection[str]) -> None:
    base = trainer.accelerator.unwrap_model(trainer.model).active_peft_config.base_model_name_or_path
    found = [
        f"{len(keys)} weights are {what}, such as {min(keys)!r}"
        for keys, what in ((missing, "missing in the file"), (unexpected, "unknown to the model"))
        if keys
    ]
    if found:
        raise ValueError(
            f"The adapter {directory} does not fit {base}: {'; '.join(found)}. Load it into the model that it was "
            "trained on."
        )


def load_trained(trainer: Any, directory: Path) -> None:
    """Load the weights of a checkpoint: a saved adapter into the active one, or a whole model."""
    if isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel):
        load_adapter(trainer, directory)
    else:
        trainer._load_from_checkpoint(str(directory))  # the trainer's own, in one file or sharded


def check_finite(model: nn.Module, step: int) -> None:
    for name, parameter in model.named_parameters():
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # sharded by FSDP2
        if parameter.requires_grad and not torch.isfinite(own).all():
            raise ValueError(
                f"{name!r} is not finite after {step} steps; training has diverged. Lower the learning rate or check "
                "the data."
            )
