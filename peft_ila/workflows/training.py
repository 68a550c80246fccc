"""Train in an output directory, and resume a run that was killed there."""

import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments

from ..export.adapters import read_adapter
from ..files import lock_directory, open_safetensors, read_json, whole_file
from .arguments import short

_RUN = "_run.json"  # trainers do not upload names with this prefix
_STATE = "trainer_state.json"  # the last file of a checkpoint
# fields of an adapter's configuration that change while it is trained and saved
_CHANGING = ("inference_mode", "gate_mode", "gate_mask", "gated_parameters", "peft_version", "base_model_name_or_path")


@contextmanager
def lock_output_dir(directory: Path) -> Iterator[None]:
    """Lock an output directory against other runs. All processes of a run call it."""
    state = PartialState()
    with lock_directory(directory) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        yield


def check_free(args: TrainingArguments, *results: str) -> None:
    """
    Refuse an output directory with checkpoints or results of an earlier run, unless it is resumed: no file of it is
    ever replaced.
    """
    directory = Path(str(args.output_dir))
    ours = (directory / _RUN).exists()
    if args.resume_from_checkpoint and ours:
        return
    for path in (*directory.glob("checkpoint-*"), *(directory / name for name in results)):
        if path.exists():
            resume = "Resume it with `--resume_from_checkpoint True`, or choose" if ours else "Choose"
            raise ValueError(f"{path} belongs to an earlier run. {resume} another `--output_dir`.")


def start_run(trainer: Trainer, facts: dict[str, Any]) -> None:
    """
    Record the settings that decide the result, or check that a resumed run has the same. `facts` are those besides the
    trainer's, such as the data set's name. All processes call it.
    """
    path = Path(str(trainer.args.output_dir)) / _RUN
    if trainer.is_world_process_zero():
        settings = _settings(trainer, facts)
        if trainer.args.resume_from_checkpoint and path.exists():
            before = read_json(path)
            for name in before:
                if name in settings and before[name] != settings[name]:
                    raise ValueError(
                        f"{path.parent} holds a run with another `{name}`: {short(before[name])}, now "
                        f"{short(settings[name])}. Resume it with the same value, or choose another `output_dir`."
                    )
        else:
            with whole_file(path) as temporary:
                temporary.write_text(json.dumps(settings), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


def _settings(trainer: Trainer, facts: dict[str, Any]) -> dict[str, Any]:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    settings = {**facts, "seed": trainer.args.seed, "learning_rate": trainer.args.learning_rate}
    settings["model"] = getattr(model.config, "name_or_path", None)
    if isinstance(model, PeftModel):
        config = model.active_peft_config.to_dict()
        settings |= {name: value for name, value in config.items() if name not in _CHANGING}
    # as it will be read again
    return json.loads(json.dumps(settings, default=lambda v: sorted(v) if isinstance(v, (set, frozenset)) else str(v)))


def train_or_resume(trainer: Any) -> bool:
    """
    Train from the start, or from the checkpoint in the trainer's arguments, and return whether it trained. Of a run
    that had ended, the weights (of the best checkpoint if the arguments ask for it) and the state are loaded instead,
    since the trainer would take one step too many.
    """
    checkpoint = _checkpoint(trainer.args)
    if checkpoint:
        ended = _ended_at(checkpoint, trainer.args)
        best = ended.best_model_checkpoint if ended and trainer.args.load_best_model_at_end else None
        weights = Path(best or checkpoint)
        if (weights / SAFETENSORS_WEIGHTS_NAME).exists() and not trainer.is_deepspeed_enabled:
            load_adapter(trainer, weights)  # the trainer would ignore weights that do not fit
        elif ended:
            trainer._load_from_checkpoint(str(weights))  # the trainer's own, in one file or sharded
        if ended:
            trainer.state = ended
            return False
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step == 0:
        raise ValueError("Not a single step was trained: the data fill no batch, or the arguments ask for no steps.")
    _check_finite(trainer.model, trainer.state.global_step)
    return True


def _check_finite(model: nn.Module, step: int) -> None:
    for name, parameter in model.named_parameters():
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # sharded by FSDP2
        if parameter.requires_grad and not torch.isfinite(own).all():
            raise ValueError(
                f"{name!r} is not finite after {step} steps; training has diverged. Lower the learning rate or check "
                "the data."
            )


def _checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: the named one, or for `True` the last complete one in the output directory."""
    named = args.resume_from_checkpoint
    if named is True:
        steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(args.output_dir).iterdir()}
        by_step = sorted((int(match[1]), str(path)) for path, match in steps.items() if match)
        return next((path for _, path in reversed(by_step) if not _damage(path)), None)
    if named and (damage := _damage(named)):
        raise ValueError(f"Cannot resume from the checkpoint {named}: {damage}")
    return named


def _damage(checkpoint: str) -> str | None:
    """Why a checkpoint cannot be read, if so. A killed trainer leaves an incomplete one."""
    try:
        read_json(Path(checkpoint) / _STATE)
        for path in Path(checkpoint).glob("*.safetensors"):
            with open_safetensors(path):
                pass
        for path in Path(checkpoint).glob("*.pt*"):
            if not zipfile.is_zipfile(path):  # torch writes archives, whose directory is at the end
                return f"{path} is damaged."
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _ended_at(checkpoint: str, args: TrainingArguments) -> TrainerState | None:
    """The state of a run that ended with this checkpoint, unless the arguments ask for more steps."""
    if not any(Path(checkpoint).glob("*.safetensors")):  # sharded by FSDP2
        return None
    state = TrainerState.load_from_json(str(Path(checkpoint) / _STATE))
    control: Any = state.stateful_callbacks.get("TrainerControl", {})
    more_steps = args.max_steps > state.max_steps
    more_epochs = args.max_steps <= 0 and args.num_train_epochs > state.num_train_epochs
    ended = control.get("args", {}).get("should_training_stop")
    return state if ended and not (more_steps or more_epochs) else None


def load_adapter(trainer: Any, directory: Path) -> None:
    """Load a saved adapter into the active one."""
    read_adapter(directory)  # PEFT checks little of it
    base = trainer.model.active_peft_config.base_model_name_or_path
    try:
        # PEFT cannot take an absolute path for the name of a repository
        loaded = trainer.model.load_adapter(str(directory.resolve()), trainer.model.active_adapter, is_trainable=True)
    except RuntimeError as error:  # tensors of other sizes
        raise ValueError(f"The adapter {directory} does not fit {base}: {error}") from error
    except KeyError as error:  # a weight of `modules_to_save`
        raise ValueError(f"The adapter {directory} lacks the weight {error}.") from error
    if wrong := [*loaded.missing_keys, *loaded.unexpected_keys]:
        raise ValueError(
            f"The adapter {directory} does not fit {base}: {len(wrong)} weights are missing in the file or unknown to "
            f"the model, such as {wrong[0]!r}."
        )
