"""Both stages with their files and their resuming: what `peft-ila rank` does. Changes with the order of the work."""

import json
from pathlib import Path
from typing import Any

from transformers import Trainer

from ..files import whole_directory
from ..ranking.importance import LayerImportance
from ..search.gates import check_settings, learn_gates
from ..search.stability import EpsilonStability
from .resuming import STAGE_1, check_finished, checkpoint_of, ended_at, is_true, remove_earlier_run


def rank(
    trainer: Trainer,
    stability: EpsilonStability | None = None,
    adapter: str | None = None,
    metadata: dict[str, Any] | None = None,
    **gate_settings: Any,
) -> LayerImportance:
    """
    Fine-tune until stable, learn the gates, and write the ranking and the adapter: the whole of ILA's search.

    `importance.json`, `importance.png` and `adapter/` (with a model card) go to the trainer's output directory. With
    `resume_from_checkpoint=True` in its training arguments, the same call goes on from what a killed run has left
    there, in either stage, and ends with the same files. Under several processes all of them must call it.

    ```py
    >>> config = ILAConfig(target_modules="all-linear", gate_mode="open")
    >>> trainer = SFTTrainer(model, args=SFTConfig("OUT"), train_dataset=data, peft_config=config)
    >>> importance = rank(trainer, EpsilonStability(epsilon=0.05))
    ```

    Args:
        trainer ([`~transformers.Trainer`]): Any trainer whose model has one active ILA adapter, in mode "open".
        stability ([`EpsilonStability`], *optional*):
            What ends stage 1, by default the one that is among the trainer's callbacks, or else its defaults.
        adapter (`str`, *optional*): A LoRA or ILA adapter to rank as it is; there is no stage 1 then.
        metadata (`dict`, *optional*): Further entries of the ranking's metadata.
        **gate_settings: Of [`learn_gates`], such as `method`, `steps` and `budget`.

    Returns:
        [`LayerImportance`]: The ranking that was written.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: A setting is out of range, the output directory holds a run that was not finished, the adapter
            does not fit the model, or a stage fails, see [`EpsilonStability`] and [`learn_gates`].
    """
    import matplotlib  # noqa: F401  better missed now than after the training

    args = trainer.args
    output_dir = Path(str(args.output_dir))
    check_settings(**gate_settings)
    if not adapter:
        check_finished(args)
    if trainer.is_world_process_zero() and not args.resume_from_checkpoint:
        remove_earlier_run(output_dir, keep_adapter=adapter is not None)
    trainer.accelerator.wait_for_everyone()

    done = output_dir / "adapter"
    metadata = metadata or {}
    if adapter:
        facts = metadata.get("stage_1", {"adapter": adapter})
        _load_adapter(trainer, adapter)
    elif is_true(args.resume_from_checkpoint) and (done / STAGE_1).exists():
        facts = json.loads((done / STAGE_1).read_text())
        _load_adapter(trainer, str(done))
        model: Any = trainer.model
        model.set_gate_mode("open")
    else:
        facts = _stage_1(trainer, stability)
        _save_adapter(trainer, done, facts)
    importance = learn_gates(trainer, **gate_settings)
    importance.metadata |= {**metadata, "stage_1": facts}
    _save_adapter(trainer, done, facts, importance)
    if trainer.is_world_process_zero():
        importance.save(output_dir / "importance.json")
        importance.plot(output_dir / "importance.png")
    return importance


def _stage_1(trainer: Any, stability: EpsilonStability | None) -> dict[str, Any]:
    callbacks = trainer.callback_handler.callbacks
    if stability is None:
        own = (callback for callback in callbacks if isinstance(callback, EpsilonStability))
        stability = next(own, None) or EpsilonStability()
    if stability not in callbacks:
        trainer.add_callback(stability)
    checkpoint = checkpoint_of(trainer.args)
    if checkpoint and (ended := ended_at(checkpoint, trainer.args)):  # the trainer would take a step too many
        _load_adapter(trainer, checkpoint)
        trainer.state = ended
        stability.on_train_begin(trainer.args, ended, trainer.control)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    return {"steps": trainer.state.global_step, "stable": stability.stopped_at is not None}


def _load_adapter(trainer: Any, adapter: str) -> None:
    try:
        trainer.model.load_adapter(adapter, trainer.model.active_adapter, is_trainable=True)
    except RuntimeError as error:  # of tensors of other sizes
        base = trainer.model.active_peft_config.base_model_name_or_path
        raise ValueError(f"The adapter {adapter} does not fit {base}: {error}") from error


def _save_adapter(
    trainer: Any, directory: Path, facts: dict[str, Any], importance: LayerImportance | None = None
) -> None:
    # by all processes: under FSDP2 and ZeRO-3 each holds a part of the weights
    # and of the model without torch.compile's wrapper, which gives every weight another name
    model = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
    state_dict = trainer.accelerator.get_state_dict(model)
    if not trainer.is_world_process_zero():
        return
    with whole_directory(directory) as temporary:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(temporary, state_dict=state_dict)
        (temporary / STAGE_1).write_text(json.dumps(facts))
        if importance is not None:
            importance.save_card(temporary)
