"""What a run leaves in its output directory, and where the next one goes on. Changes with the files of a run."""

import json
import shutil
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import TrainerState

# written with the adapter when stage 1 is done, so that a resumed run need not repeat it
STAGE_1 = "stage_1.json"


def check_finished(training_args: Any) -> None:
    """
    Raises:
        ValueError: The output directory holds a run that was not finished, and the arguments do not resume it.
    """
    output_dir = Path(training_args.output_dir)
    if training_args.resume_from_checkpoint or (output_dir / "importance.json").exists():
        return
    left = [output_dir / "adapter" / STAGE_1, *output_dir.glob("checkpoint-*")]
    if unfinished := next((path for path in left if path.exists()), None):
        raise ValueError(
            f"{unfinished} is of a run that was not finished; go on with it by `--resume_from_checkpoint True`, "
            "or choose another `--output_dir`."
        )


def remove_earlier_run(output_dir: Path, keep_adapter: bool) -> None:
    """Remove what an earlier run left in the directory, so that a resumed run cannot go on from it."""
    (output_dir / "importance.json").unlink(missing_ok=True)
    if (output_dir / "adapter" / STAGE_1).exists() and not keep_adapter:  # which may be the one to rank
        for directory in (output_dir / "adapter", *output_dir.glob("checkpoint-*")):
            shutil.rmtree(directory, ignore_errors=True)


def is_true(value: str | bool | None) -> bool:
    """Whether `resume_from_checkpoint` asks for the last checkpoint; the command line gives a string."""
    return str(value).lower() == "true"


def checkpoint_of(training_args: Any) -> str | None:
    """The checkpoint to resume from: the one that was named, or for `True` the last one in the output directory."""
    if is_true(training_args.resume_from_checkpoint):
        return _last_checkpoint(Path(training_args.output_dir))
    return training_args.resume_from_checkpoint


def _last_checkpoint(directory: Path) -> str | None:
    """The last checkpoint that is whole; the trainer writes `trainer_state.json` at its end."""
    checkpoints = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for checkpoint in reversed(checkpoints):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            return str(checkpoint)
        except (OSError, ValueError):
            continue  # the run was killed while it wrote this one
    return None


def ended_at(checkpoint: str, training_args: Any) -> TrainerState | None:
    """The state of a run that ended with this checkpoint, if the arguments do not ask for more steps than it had."""
    if not (Path(checkpoint) / SAFETENSORS_WEIGHTS_NAME).exists():  # sharded by FSDP2
        return None
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    control: Any = state.stateful_callbacks.get("TrainerControl", {})
    ended = control.get("args", {}).get("should_training_stop", False)
    if training_args.max_steps > 0:
        more = training_args.max_steps > state.max_steps
    else:
        more = training_args.num_train_epochs > state.num_train_epochs
    return state if ended and not more else None
