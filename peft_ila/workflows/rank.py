"""Run both stages, write their files, resume them: `peft-ila rank`."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import Trainer

from ..export.adapters import adapter_directory
from ..files import read_json, whole_directory, whole_file
from ..ranking.importance import LayerImportance
from ..search.gates import check_settings, learn_gates, rankable
from ..search.stability import EpsilonStability
from .resuming import STAGE_1, CheckpointGuard, Run, check_finished, is_true, lock_output_dir, train_or_resume
from .training import load_adapter

RANKING, PICTURE = "importance.json", "importance.png"
# the files that runs write into the adapter's directory
_OWN = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, STAGE_1, RANKING, PICTURE, "README.md")


def rank(
    trainer: Trainer,
    stability: EpsilonStability | None = None,
    adapter: str | None = None,
    metadata: dict[str, Any] | None = None,
    **gate_settings: Any,
) -> LayerImportance:
    """
    Rank the units, and write the ranking and the adapter: the whole of ILA's search.

    By default, nothing is trained: a fresh adapter is ranked, by `method="untrained"`. With an [`EpsilonStability`],
    passed or among the trainer's callbacks, or with `method="attribution"`, the adapter is first fine-tuned until
    stable (stage 1), then its gates are learned (stage 2).

    The trainer's output directory gets `importance.json`, `importance.png` (if matplotlib is installed) and `adapter/`
    (with a model card). With `resume_from_checkpoint=True` in the training arguments, the same call resumes a killed
    run in either stage and ends with the same files; `_run.json` holds the settings that must not change. Files of an
    earlier run stay until new ones replace them. In a run of several processes, all must call it.

    ```py
    >>> config = ILAConfig(target_modules="all-linear", gate_mode="open")
    >>> trainer = SFTTrainer(model, args=SFTConfig("OUT"), train_dataset=data, peft_config=config)
    >>> importance = rank(trainer, EpsilonStability(epsilon=0.05))
    ```

    Args:
        trainer ([`~transformers.Trainer`]): Any trainer whose model has one active ILA adapter, in mode "open".
        stability ([`EpsilonStability`], *optional*):
            The end of stage 1; by default, the one among the trainer's callbacks, or one with its defaults.
        adapter (`str`, *optional*): A LoRA or ILA adapter to rank as it is, without stage 1.
        metadata (`dict`, *optional*): Further entries of the ranking's metadata.
        **gate_settings:
            Arguments of [`learn_gates`], such as `method`, `steps` and `budget`. The default method is "untrained" for
            a fresh adapter, and "attribution" for a trained one or with `stability` or `adapter`.

    Returns:
        [`LayerImportance`]: The ranking.

    Raises:
        OSError: Another run uses the output directory, or a file cannot be read or written.
        TypeError: The trainer's model is not an ILA model.
        ValueError: A setting is out of range, the output directory holds an unfinished run or one with other settings,
            the adapter is damaged or does not fit the model, training diverged, or a stage failed, see
            [`EpsilonStability`] and [`learn_gates`].
    """
    directory = Path(str(trainer.args.output_dir))
    adapter = None if adapter is None else os.fspath(adapter)
    with lock_output_dir(directory):
        check_output(trainer.args, adapter)
        return rank_in(trainer, stability, adapter, metadata, **gate_settings)


def check_output(args: Any, adapter: str | None = None) -> None:
    """
    Check, before any work, that the output directory is writable and that no training in it gets lost.

    Args:
        args ([`~transformers.TrainingArguments`]): The trainer's.
        adapter: The adapter to rank as it is.
    """
    directory = Path(args.output_dir)
    _check_targets(directory, adapter)
    if adapter or not args.resume_from_checkpoint:
        check_finished(directory, RANKING)


def rank_in(
    trainer: Any,
    stability: EpsilonStability | None,
    adapter: str | None,
    metadata: dict[str, Any] | None,
    **gate_settings: Any,
) -> LayerImportance:
    """[`rank`] in a locked and checked output directory."""
    check_settings(**gate_settings)
    ila = rankable(trainer)
    own = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, EpsilonStability))
    stability = stability or next(own, None)
    if gate_settings.get("method") is None:
        learned = adapter or stability or ila.is_trained()
        gate_settings["method"] = "attribution" if learned else "untrained"
    metadata = metadata or {}
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`metadata` must hold JSON values only: {error}.") from error
    args: Any = trainer.args
    untrained = gate_settings["method"] == "untrained"
    data = {name: metadata.get(name) for name in ("dataset", "eval_dataset")}
    facts = {**data, "adapter": adapter, "untrained": untrained}
    resumes = bool(args.resume_from_checkpoint) and adapter is None
    run = Run(trainer, facts, RANKING, resumes, trains=not (adapter or untrained))
    done = run.directory / "adapter"
    if adapter:
        stage_1 = metadata.get("stage_1", {"adapter": adapter})
        load_adapter(trainer, adapter_directory(adapter))
    elif untrained:
        stage_1 = {"steps": 0, "stable": False}
    elif run.done and is_true(args.resume_from_checkpoint):
        stage_1 = read_json(done / STAGE_1)
        load_adapter(trainer, done)
        trainer.model.set_gate_mode("open")
    else:
        if run.done and trainer.is_world_process_zero():
            run.record(done=False)  # it resumes from a named checkpoint
        trainer.add_callback(CheckpointGuard(run))
        stage_1 = _stage_1(trainer, stability or EpsilonStability())
        _save_adapter(trainer, run, stage_1)
    importance = learn_gates(trainer, **gate_settings)
    importance.metadata |= {**metadata, "stage_1": stage_1}
    _save_adapter(trainer, run, stage_1, importance)
    if trainer.is_world_process_zero():
        for name in (PICTURE, RANKING):  # copies of the card's; the ranking marks the run as done
            if not (done / name).exists():
                continue  # without matplotlib
            with whole_file(run.directory / name) as temporary:
                shutil.copyfile(done / name, temporary)
    return importance


def _check_targets(directory: Path, adapter: str | None) -> None:
    """Refuse paths that cannot or must not be written, before training rather than after it."""
    target = directory / "adapter"
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(
            f"{target} is not a directory, but would be replaced. Move it, or choose another `output_dir`."
        )
    for name in (RANKING, PICTURE):
        if (directory / name).is_dir():
            raise ValueError(f"{directory / name} is a directory. Move it, or choose another `output_dir`.")
    if adapter and Path(adapter).expanduser().resolve() in (directory.resolve(), target.resolve()):
        raise ValueError(f"The adapter {adapter} would be replaced by the ranked one; choose another `output_dir`.")


def _stage_1(trainer: Any, stability: EpsilonStability) -> dict[str, Any]:
    if stability not in trainer.callback_handler.callbacks:
        trainer.add_callback(stability)
    if not train_or_resume(trainer):
        stability.on_train_begin(trainer.args, trainer.state, trainer.control)  # it reads the losses of the run
    return {"steps": trainer.state.global_step, "stable": stability.stopped_at is not None}


def _save_adapter(trainer: Any, run: Run, facts: dict[str, Any], importance: LayerImportance | None = None) -> None:
    # on all processes, since each holds a part of the weights under FSDP2 and ZeRO-3;
    # without torch.compile's wrapper, which renames every weight
    model = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
    state_dict = trainer.accelerator.get_state_dict(model)
    run.claim()
    if not trainer.is_world_process_zero():
        return
    with whole_directory(run.directory / "adapter", own=_OWN) as temporary:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(temporary, state_dict=state_dict)
        (temporary / STAGE_1).write_text(json.dumps(facts))
        if importance is not None:
            importance.save_card(temporary)
        for name in (RANKING, PICTURE):  # of another adapter
            (run.directory / name).unlink(missing_ok=True)
    run.record(done=True)
