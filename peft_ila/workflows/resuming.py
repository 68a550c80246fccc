"""The record of a run in its output directory, and how the next run resumes it."""

import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..files import lock_directory, open_safetensors, read_json, whole_file
from .arguments import short
from .training import check_finite, load_trained, train

# written with the adapter after stage 1, so that a resumed run does not repeat it
STAGE_1 = "stage_1.json"
_RUN = "_run.json"  # trainers do not upload names with this prefix
# Settings that decide the result of training, besides the model, its adapter and the data. Its length is left out: a
# run may be resumed for more steps.
_DECISIVE = (
    "seed",
    "data_seed",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "weight_decay",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "max_length",
    "packing",
    "loss_type",
    "completion_only_loss",
    "assistant_only_loss",
    "load_best_model_at_end",
    "metric_for_best_model",
)
# fields of an adapter's configuration that change while it is trained and saved
_CHANGING = ("inference_mode", "gate_mode", "gate_mask", "gated_parameters", "peft_version", "base_model_name_or_path")


@contextmanager
def lock_output_dir(directory: Path) -> Iterator[None]:
    """Lock an output directory against other runs and recover files of killed runs. All processes of a run call it."""
    state = PartialState()
    with lock_directory(directory) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        yield


class Run:
    """
    One run in its output directory. Files of an earlier run stay until this run has whole ones to replace them. A run
    is resumed only with the settings that it was started with.

    Args:
        trainer ([`~transformers.Trainer`]): Its arguments name the directory; its model has at most one adapter.
        facts: Settings besides the trainer's, such as the data set's name; JSON values.
        result: The file that the run writes last.
        resumes: Whether it resumes the run in the directory.
        trains: Whether it writes checkpoints; if so, those of an earlier run are removed.
    """

    def __init__(
        self, trainer: Trainer, facts: dict[str, Any], result: str, resumes: bool, trains: bool = True
    ) -> None:
        self._trainer = trainer
        self._trains = trains
        self._result = result
        self._resumes = resumes
        self._settings = _settings(trainer, facts)
        self.directory = Path(str(trainer.args.output_dir))
        # as the main process sees them
        found: list[Any] = [None, False]
        if trainer.is_world_process_zero():
            found = [_recorded(self.directory), (self.directory / "adapter" / STAGE_1).exists()]
        recorded, has_adapter = broadcast_object_list(found)
        if resumes and recorded:
            _check_result(self.directory, recorded, result)
            self._check_settings(recorded["settings"])
        self._claimed = resumes and recorded is not None
        # whether the adapter in the directory is this run's
        self.done = resumes and has_adapter and (recorded is None or recorded["done"])

    def _check_settings(self, before: dict[str, Any]) -> None:
        for name in before:
            if name in self._settings and before[name] != self._settings[name]:
                raise ValueError(
                    f"{self.directory} holds a run with another `{name}`: {short(before[name])}, now "
                    f"{short(self._settings[name])}. Resume it with the same value, or choose another `output_dir`."
                )

    def claim(self) -> None:
        """Take the directory over from an earlier run. All processes call it before they write anything."""
        if not self._claimed:
            if self._trainer.is_world_process_zero():
                if self._trains and not self._resumes and _is_ours(self.directory):
                    for _, checkpoint in _checkpoints(self.directory):
                        shutil.rmtree(checkpoint, ignore_errors=True)
                self.record(done=False)
            self._trainer.accelerator.wait_for_everyone()
        self._claimed = True

    def record(self, done: bool) -> None:
        """Record the settings and whether training is done. The main process calls it."""
        self.done = done
        content = {"settings": self._settings, "result": self._result, "done": done}
        with whole_file(self.directory / _RUN) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")


class CheckpointGuard(TrainerCallback):
    """Claims the directory just before the first checkpoint, and stops before a checkpoint that is not finite."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if control.should_save:
            check_finite(model, state.global_step)
            self._run.claim()

    on_epoch_end = on_step_end

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step:  # it may be saved as the best
            check_finite(model, state.global_step)
            self._run.claim()


def check_finished(directory: Path, result: str) -> None:
    """
    Check that a new run in a directory does not destroy unfinished or other training.

    Args:
        directory: The output directory.
        result: The file that a run writes last.
    """
    recorded = _recorded(directory)
    checkpoints = [checkpoint for _, checkpoint in _checkpoints(directory)]
    if recorded:
        _check_result(directory, recorded, result)
    if recorded and recorded["settings"].get("adapter"):  # it ranked an existing adapter and trained nothing
        return
    if (directory / result).exists() and (recorded is None or recorded["done"]):
        if checkpoints and not _is_ours(directory):
            raise ValueError(f"{checkpoints[0]} belongs to another training run; choose another `--output_dir`.")
        return
    left = checkpoints
    if recorded is None or recorded["done"]:
        left = [directory / "adapter" / STAGE_1, *checkpoints]
    if unfinished := next((path for path in left if path.exists()), None):
        raise ValueError(
            f"{unfinished} belongs to an unfinished run. Resume it with `--resume_from_checkpoint True`, or choose "
            "another `--output_dir`."
        )


def _check_result(directory: Path, recorded: dict[str, Any], result: str) -> None:
    if recorded.get("result", result) != result:
        raise ValueError(f"{directory} holds a run of another command; choose another `--output_dir`.")


def _is_ours(directory: Path) -> bool:
    """Whether a run of this package wrote to a directory."""
    return (directory / _RUN).exists() or (directory / "adapter" / STAGE_1).exists()


def _recorded(directory: Path) -> dict[str, Any] | None:
    path = directory / _RUN
    if not path.exists():
        return None
    content = read_json(path)
    settings = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(settings, dict) or not isinstance(content.get("done"), bool):
        raise ValueError(f"{path} is damaged; choose another `output_dir`, or empty this one.")
    return content


def _settings(trainer: Any, facts: dict[str, Any]) -> dict[str, Any]:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        config = model.active_peft_config
        name = config.base_model_name_or_path
        adapter = {k: v for k, v in config.to_dict().items() if k not in _CHANGING}
    else:
        name, adapter = model.config.name_or_path, {}
    arguments = {name: getattr(trainer.args, name) for name in _DECISIVE if hasattr(trainer.args, name)}
    data = trainer.train_dataset
    settings = {
        **facts,
        "model": name,
        "examples": len(data) if hasattr(data, "__len__") else None,
        "total_batch_size": trainer.get_total_train_batch_size(trainer.args),
        **arguments,
        **adapter,
    }
    # as it will be read again
    return json.loads(json.dumps(settings, default=lambda v: sorted(v) if isinstance(v, (set, frozenset)) else str(v)))


def is_true(value: str | bool | None) -> bool:
    """Whether `resume_from_checkpoint` asks for the last checkpoint; on the command line, it is a string."""
    return str(value).lower() == "true"


def checkpoint_of(training_args: Any) -> str | None:
    """The checkpoint to resume from: the named one, or for `True` the last complete one in the output directory."""
    named = training_args.resume_from_checkpoint
    if is_true(named):
        checkpoints = reversed(_checkpoints(Path(training_args.output_dir)))
        return next((str(path) for _, path in checkpoints if _damage(path) is None), None)
    if named and (damage := _damage(Path(named))):
        raise ValueError(f"Cannot resume from the checkpoint {named}: {damage}")
    return named


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """The checkpoints by step, without others such as `checkpoint-best`."""
    named = ((re.fullmatch(r"checkpoint-(\d{1,18})", path.name), path) for path in directory.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def _damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be read, if so. The trainer writes `trainer_state.json` last."""
    try:
        read_json(checkpoint / "trainer_state.json")
        for path in checkpoint.glob("*.safetensors"):
            with open_safetensors(path):
                pass
        for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
            # torch writes archives; a bare pickle could run code
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return f"{path} is damaged."
    except zipfile.BadZipFile:
        return f"{path} is truncated, or was not written by torch."
    except (OSError, ValueError) as error:
        return str(error)
    return None


def train_or_resume(trainer: Any) -> bool:
    """
    Train from the start, or from the checkpoint in the trainer's arguments.

    Returns:
        Whether it trained. For a run that had ended, the weights (of the best checkpoint if the arguments ask for it)
        and the state are loaded, since the trainer would take one step too many.
    """
    checkpoint = checkpoint_of(trainer.args)
    if checkpoint and (ended := ended_at(checkpoint, trainer.args)):
        best = ended.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        load_trained(trainer, Path(best or checkpoint))
        trainer.state = ended
        return False
    train(trainer, checkpoint)
    return True


def ended_at(checkpoint: str, training_args: Any) -> TrainerState | None:
    """The state of a run that ended with this checkpoint, unless the arguments ask for more steps."""
    whole = (SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if not any((Path(checkpoint) / name).exists() for name in whole):  # sharded by FSDP2
        return None
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    control: Any = state.stateful_callbacks.get("TrainerControl", {})
    ended = control.get("args", {}).get("should_training_stop", False)
    if training_args.max_steps > 0:
        more = training_args.max_steps > state.max_steps
    else:
        more = training_args.num_train_epochs > state.num_train_epochs
    return state if ended and not more else None
