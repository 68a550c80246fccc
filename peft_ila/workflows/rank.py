"""Run both stages, write their files, resume them: `peft-ila rank`."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer

from ..export.adapters import adapter_directory
from ..files import read_json, whole_directory, whole_file
from ..ranking.importance import LayerImportance
from ..search.gates import check_settings, learn_gates, rankable
from ..search.stability import EpsilonStability
from .training import check_free, load_adapter, lock_output_dir, start_run, train_or_resume

RANKING, PICTURE = "importance.json", "importance.png"
RESULTS = ("adapter", RANKING)
# written last with the adapter of stage 1, so that a resumed run does not repeat it
STAGE_1 = "stage_1.json"


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
    run in either stage and ends with the same files; `_run.json` holds the settings that must not change. A directory
    with another run is refused. In a run of several processes, all must call it.

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
        metadata (`dict`, *optional*): Further entries of the ranking's metadata, JSON values.
        **gate_settings:
            Arguments of [`learn_gates`], such as `method`, `steps` and `budget`. The default method is "untrained" for
            a fresh adapter, and "attribution" for a trained one or with `stability` or `adapter`.

    Returns:
        [`LayerImportance`]: The ranking.

    Raises:
        OSError: Another run uses the output directory, or a file cannot be read or written.
        TypeError: The trainer's model is not an ILA model.
        ValueError: A setting is out of range, the output directory holds an earlier run or one with other settings,
            the adapter is damaged or does not fit the model, training diverged, or a stage failed, see
            [`EpsilonStability`] and [`learn_gates`].
    """
    adapter = None if adapter is None else os.fspath(adapter)
    with lock_output_dir(Path(str(trainer.args.output_dir))):
        check_free(trainer.args, *RESULTS)
        return rank_in(trainer, stability, adapter, metadata, **gate_settings)


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
    json.dumps(metadata)  # else it would fail after the training
    untrained = gate_settings["method"] == "untrained"
    data = {name: metadata.get(name) for name in ("dataset", "eval_dataset")}
    start_run(trainer, {"command": "rank", **data, "adapter": adapter, "untrained": untrained})
    if adapter:
        stage_1 = metadata.get("stage_1", {"adapter": adapter})
        load_adapter(trainer, adapter_directory(adapter))
    elif untrained:
        stage_1 = {"steps": 0, "stable": False}
    else:
        stage_1 = _stage_1(trainer, stability or EpsilonStability())
    importance = learn_gates(trainer, **gate_settings)
    importance.metadata |= {**metadata, "stage_1": stage_1}
    _save_adapter(trainer, stage_1, importance)
    return importance


def _stage_1(trainer: Any, stability: EpsilonStability) -> dict[str, Any]:
    """Fine-tune until stable, or load the adapter of a resumed run that has done so."""
    done = Path(trainer.args.output_dir) / "adapter" / STAGE_1
    if trainer.args.resume_from_checkpoint is True and done.exists():
        load_adapter(trainer, done.parent)
        trainer.model.set_gate_mode("open")
        facts: dict[str, Any] = read_json(done)
        return facts
    if stability not in trainer.callback_handler.callbacks:
        trainer.add_callback(stability)
    if not train_or_resume(trainer):
        stability.on_train_begin(trainer.args, trainer.state, trainer.control)  # it reads the losses of the run
    facts = {"steps": trainer.state.global_step, "stable": stability.stopped_at is not None}
    _save_adapter(trainer, facts)
    return facts


def _save_adapter(trainer: Any, facts: dict[str, Any], importance: LayerImportance | None = None) -> None:
    # on all processes, since each holds a part of the weights under FSDP2 and ZeRO-3;
    # without torch.compile's wrapper, which renames every weight
    model = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
    state_dict = trainer.accelerator.get_state_dict(model)
    if not trainer.is_world_process_zero():
        return
    directory = Path(trainer.args.output_dir)
    (directory / RANKING).unlink(missing_ok=True)  # of another adapter
    # ranking changes neither A nor B, so stage 1 stays done while its adapter is replaced by the ranked one
    last = STAGE_1 if importance is None else RANKING
    with whole_directory(directory / "adapter", last) as temporary:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(temporary, state_dict=state_dict)
        (temporary / STAGE_1).write_text(json.dumps(facts))
        if importance is not None:
            importance.save_card(temporary)
    for name in () if importance is None else (PICTURE, RANKING):  # copies of the card's, the ranking last
        if (directory / "adapter" / name).exists():  # without matplotlib, there is no picture
            with whole_file(directory / name) as temporary:
                shutil.copyfile(directory / "adapter" / name, temporary)
