"""Tune a selection by LoRA or in full, with TRL's trainer: `peft-ila tune`."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers.utils import CONFIG_NAME
from trl import SFTTrainer

from ..export.freezing import FrozenPrefix
from ..export.lora import DECIDED_BY_SELECTION
from ..files import PARTIAL
from ..ranking.importance import LayerImportance
from .arguments import TuneArguments, given, required
from .budget import select_within
from .models import model_config, model_name
from .resuming import CheckpointGuard, Run, check_finished, lock_output_dir, train_or_resume
from .sft import check_evaluation, lora_config, sft_trainer

# weights of a full model, whole or sharded: those of an earlier run would be read with the new ones
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def tune(script_args: Any, training_args: Any, model_args: Any, tune_args: TuneArguments) -> SFTTrainer:
    """
    Fine-tune the selected units and write the result to the output directory: a plain LoRA adapter, or with `full` the
    model, with only the parameters of these units changed.

    Args:
        script_args ([`~trl.ScriptArguments`]): The data set.
        training_args ([`~trl.SFTConfig`]): The training; `resume_from_checkpoint=True` resumes a killed run.
        model_args ([`~trl.ModelConfig`]): The model, its quantisation, LoRA's options except the targets.
        tune_args ([`TuneArguments`]): The ranking, the selection, how to tune it, and the held-out data.

    Returns:
        The trainer after training.

    Raises:
        OSError: The model, a data file or the ranking does not exist, another run uses the output directory, or a file
            cannot be written.
        ValueError: The selection or the ranking is invalid, targets were passed, options of LoRA or quantisation were
            passed with `full`, the output directory holds an unfinished run, or training took no step or diverged.
            Nothing is written then.
    """
    importance = LayerImportance.load(required(tune_args.importance, "importance"))
    check_evaluation(training_args, tune_args.eval_dataset_name)
    data = {"dataset": script_args.dataset_name, "eval_dataset": tune_args.eval_dataset_name}
    directory, resumes = Path(training_args.output_dir), bool(training_args.resume_from_checkpoint)
    if tune_args.full:
        _check_full(model_args, tune_args, directory)
        units = importance.select(**tune_args.selection())
        config, result, facts = None, CONFIG_NAME, {**data, "units": units}
    else:
        config = _lora_of_selection(importance, training_args, model_args, tune_args)
        result, facts = ADAPTER_CONFIG_NAME, data
    with lock_output_dir(directory):
        if not resumes:
            check_finished(directory, result)
        held_out, callbacks = tune_args.eval_dataset_name, [FrozenPrefix()]
        trainer = sft_trainer(script_args, training_args, model_args, config, held_out, callbacks)
        if tune_args.full:
            _freeze(trainer, importance, units)
        run = Run(trainer, facts, result, resumes)
        trainer.add_callback(CheckpointGuard(run))
        train_or_resume(trainer)
        run.claim()
        _save(trainer, directory, result)
        if trainer.is_world_process_zero():
            run.record(done=True)
    if training_args.push_to_hub:
        trainer.push_to_hub(commit_message="Model save")
    return trainer


def _check_full(model_args: Any, tune_args: TuneArguments, directory: Path) -> None:
    """Refuse arguments that full fine-tuning cannot use, and outputs that it would overwrite."""
    if tune_args.memory_budget is not None:
        raise ValueError(
            "`--memory_budget` counts LoRA only: with `--full`, select by `--top_p`, `--top_k` or `--threshold`."
        )
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_args, name):
            raise ValueError(
                f"`--full` cannot train quantised weights: leave out `--{name}`, or tune by LoRA, without `--full`."
            )
    if unused := given(model_args, "lora_.*|use_(peft|rslora|dora)"):
        raise ValueError(f"`--full` trains no LoRA: leave out {unused}.")
    if Path(str(model_args.model_name_or_path)).resolve() == directory.resolve():
        raise ValueError(f"The model {directory} would be replaced by the tuned one; choose another `--output_dir`.")
    if (directory / ADAPTER_CONFIG_NAME).exists():
        raise ValueError(
            f"{directory} holds an adapter, which would be loaded with the model; choose another `--output_dir`."
        )


def _freeze(trainer: Any, importance: LayerImportance, units: list[str]) -> None:
    importance.freeze_unselected(trainer.model, units=units)
    if trainer.args.gradient_checkpointing:
        # as TRL does for adapters: reentrant checkpointing needs it, `FrozenPrefix` undoes it for the other
        trainer.model.enable_input_require_grads()


def _lora_of_selection(
    importance: LayerImportance, training_args: Any, model_args: Any, tune_args: TuneArguments
) -> Any:
    """The [`~peft.LoraConfig`] of the selection, checked on the architecture."""
    if model_args.lora_target_modules:
        raise ValueError("`--importance` decides the targets: leave out `--lora_target_modules`.")
    options = lora_config(model_args).to_dict()
    for decided in ("peft_type", *DECIDED_BY_SELECTION):
        del options[decided]
    ranked = model_config(
        model_name(model_args.model_name_or_path),
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    selection = tune_args.selection()
    if tune_args.memory_budget is not None:
        selection["units"] = _fitting(ranked, importance, tune_args.memory_budget, training_args, model_args, options)
    return importance.to_lora_config(**selection, model=ranked, **options)


def _fitting(
    config: Any, importance: LayerImportance, budget: str, training_args: Any, model_args: Any, lora: dict[str, Any]
) -> list[str]:
    """The units that fit into the budget with these training arguments."""
    if training_args.max_length is None:
        raise ValueError("`--memory_budget` needs `--max_length`: without it, an example may have any length.")
    if model_args.load_in_8bit:
        raise ValueError(
            "`--memory_budget` does not count `--load_in_8bit`; use `--load_in_4bit`, or select by `--top_p`."
        )
    dtype = config.dtype if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(training_args.bf16 or training_args.fp16)):
        return select_within(
            config,
            importance,
            budget,
            batch_size=training_args.per_device_train_batch_size,
            max_length=training_args.max_length,
            load_in_4bit=model_args.load_in_4bit,
            gradient_checkpointing=training_args.gradient_checkpointing,
            dtype=dtype or torch.float32,
            **lora,
        )


def _save(trainer: SFTTrainer, directory: Path, result: str) -> None:
    """Move the files of `save_model` into the directory one by one, the adapter's or model's configuration last."""
    partial = directory / f".model{PARTIAL}"
    if trainer.is_world_process_zero() and (directory / "README.md").exists():
        partial.mkdir()
        shutil.copy2(directory / "README.md", partial)  # PEFT adds to an existing card
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial), _internal_call=True)  # the upload comes later
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        written = {path.name for path in partial.iterdir()}
        if result == CONFIG_NAME:
            for path in directory.iterdir():
                if _WEIGHTS.fullmatch(path.name) and path.name not in written:
                    path.unlink()
        for path in sorted(partial.iterdir(), key=lambda path: path.name == result):
            if path.is_dir():  # further chat templates
                shutil.copytree(path, directory / path.name, dirs_exist_ok=True)
            else:
                os.replace(path, directory / path.name)
        shutil.rmtree(partial)
