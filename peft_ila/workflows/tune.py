"""Tuning a selection by name, with TRL's trainer: what `peft-ila tune` does."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from trl import SFTTrainer

from ..export.freezing import FrozenPrefix
from ..export.lora import DECIDED_BY_SELECTION
from ..files import PARTIAL
from ..ranking.importance import LayerImportance
from .arguments import TuneArguments, required
from .budget import select_within
from .models import model_config, model_name
from .resuming import ClaimsDirectory, Run, check_finished, held, train_or_resume
from .sft import lora_config, sft_trainer


def tune(script_args: Any, training_args: Any, model_args: Any, tune_args: TuneArguments) -> SFTTrainer:
    """
    Fine-tune with a plain LoRA on the selected units and write the adapter to the output directory.

    Args:
        script_args ([`~trl.ScriptArguments`]): The data set.
        training_args ([`~trl.SFTConfig`]): The training; `resume_from_checkpoint=True` goes on with a killed run.
        model_args ([`~trl.ModelConfig`]): The model, its quantisation, LoRA's options except its targets.
        tune_args ([`TuneArguments`]): The ranking and what to select of it.

    Returns:
        The trainer, at the end of training.

    Raises:
        OSError: There is no such model, data file or ranking, another run holds the output directory, or a file
            cannot be written.
        ValueError: A bad selection or ranking, targets were passed, the output directory holds a run that was not
            finished, or training took no step or has diverged; nothing is written then.
    """
    importance = LayerImportance.load(required(tune_args.importance, "importance"))
    if model_args.lora_target_modules:
        raise ValueError("`--lora_target_modules` follows from `--importance` and cannot be passed.")
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
    config = importance.to_lora_config(**selection, model=ranked, **options)
    directory, resumes = Path(training_args.output_dir), bool(training_args.resume_from_checkpoint)
    with held(directory):
        if not resumes:
            check_finished(directory, CONFIG_NAME)
        trainer = sft_trainer(script_args, training_args, model_args, config, [FrozenPrefix()])
        run = Run(trainer, {"dataset": script_args.dataset_name}, CONFIG_NAME, resumes)
        trainer.add_callback(ClaimsDirectory(run))
        train_or_resume(trainer)
        run.claim()
        _save(trainer, directory)
        if trainer.is_world_process_zero():
            run.record(done=True)
    if training_args.push_to_hub:
        trainer.push_to_hub(commit_message="Model save")
    return trainer


def _fitting(
    config: Any, importance: LayerImportance, budget: str, training_args: Any, model_args: Any, lora: dict[str, Any]
) -> list[str]:
    """The units that fit into the budget, in the training that is asked for."""
    if training_args.max_length is None:
        raise ValueError("`--memory_budget` needs `--max_length`: without it, an example may be of any length.")
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


def _save(trainer: SFTTrainer, directory: Path) -> None:
    """What `save_model` writes into the directory, file by file, the adapter's configuration last."""
    partial = directory / f".model{PARTIAL}"
    if trainer.is_world_process_zero() and (directory / "README.md").exists():
        partial.mkdir()
        shutil.copy2(directory / "README.md", partial)  # PEFT adds to a card that is there
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial), _internal_call=True)  # which leaves the upload for later
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for path in sorted(partial.iterdir(), key=lambda path: path.name == CONFIG_NAME):
            if path.is_dir():  # further chat templates
                shutil.copytree(path, directory / path.name, dirs_exist_ok=True)
            else:
                os.replace(path, directory / path.name)
        shutil.rmtree(partial)
