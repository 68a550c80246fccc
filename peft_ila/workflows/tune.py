"""Tune a selection by LoRA or in full, with TRL's trainer: `peft-ila tune`."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers.utils import CONFIG_NAME
from trl import SFTTrainer

from ..export.freezing import FrozenPrefix
from ..export.lora import DECIDED_BY_SELECTION
from ..files import PARTIAL, whole_directory
from ..ranking.importance import LayerImportance
from .arguments import TuneArguments, given, required
from .budget import select_within
from .models import model_config
from .sft import lora_config, sft_trainer
from .training import check_free, lock_output_dir, start_run, train_or_resume


def tune(script_args: Any, training_args: Any, model_args: Any, tune_args: TuneArguments) -> SFTTrainer:
    """
    Fine-tune the selected units and write the result to the output directory: a plain LoRA adapter, or with `full` the
    model, with only the parameters of these units changed. A training that takes no step or diverges has no result.

    Args:
        script_args ([`~trl.ScriptArguments`]): The data set.
        training_args ([`~trl.SFTConfig`]): The training; `resume_from_checkpoint=True` resumes a killed run.
        model_args ([`~trl.ModelConfig`]): The model, its quantisation, LoRA's options except the targets.
        tune_args ([`TuneArguments`]): The ranking, the selection, how to tune it, and the held-out data.

    Returns:
        The trainer after training.
    """
    importance = LayerImportance.load(required(tune_args.importance, "importance"))
    facts = {
        "command": "tune --full" if tune_args.full else "tune",
        "dataset": script_args.dataset_name,
        "eval_dataset": tune_args.eval_dataset_name,
    }
    directory = Path(training_args.output_dir)
    if tune_args.full:
        _check_full(model_args, tune_args)
        config, result = None, CONFIG_NAME
        facts["units"] = units = importance.select(**tune_args.selection())
    else:
        config, result = _lora_of_selection(importance, training_args, model_args, tune_args), ADAPTER_CONFIG_NAME
    with lock_output_dir(directory):
        check_free(training_args, CONFIG_NAME, ADAPTER_CONFIG_NAME)
        trainer = sft_trainer(script_args, training_args, model_args, config, tune_args.eval_dataset_name)
        trainer.add_callback(FrozenPrefix())
        if tune_args.full:
            _freeze(trainer, importance, units)
        start_run(trainer, facts)
        train_or_resume(trainer)
        _save(trainer, directory, result)
    if training_args.push_to_hub:
        trainer.push_to_hub(commit_message="Model save")
    return trainer


def _check_full(model_args: Any, tune_args: TuneArguments) -> None:
    """Refuse arguments that full fine-tuning cannot use."""
    if tune_args.memory_budget is not None:
        raise ValueError(
            "`--memory_budget` counts LoRA only: with `--full`, select by `--top_p`, `--top_k` or `--threshold`."
        )
    if unused := given(model_args, "lora_.*|use_(peft|rslora|dora)"):
        raise ValueError(f"`--full` trains no LoRA: leave out {unused}.")


def _freeze(trainer: Any, importance: LayerImportance, units: list[str]) -> None:
    importance.freeze_unselected(trainer.model, units=units)
    if trainer.args.gradient_checkpointing:
        # as TRL does for adapters: reentrant checkpointing needs it, `FrozenPrefix` undoes it for the other
        trainer.model.enable_input_require_grads()


def _lora_of_selection(
    importance: LayerImportance, training_args: Any, model_args: Any, tune_args: TuneArguments
) -> Any:
    """The [`~peft.LoraConfig`] of the selection, checked on the architecture."""
    for name in ("lora_target_modules", "lora_target_parameters"):
        if getattr(model_args, name, None):
            raise ValueError(f"`--importance` decides the targets: leave out `--{name}`.")
    options = lora_config(model_args).to_dict()
    for decided in ("peft_type", *DECIDED_BY_SELECTION):
        del options[decided]
    ranked = model_config(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    selection = tune_args.selection()
    if tune_args.memory_budget is not None:
        step = _step(ranked, training_args, model_args)
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(training_args.bf16 or training_args.fp16)):
            selection["units"] = select_within(ranked, importance, tune_args.memory_budget, **step, **options)
    return importance.to_lora_config(**selection, model=ranked, **options)


def _step(config: Any, training_args: Any, model_args: Any) -> dict[str, Any]:
    """The training step, for [`select_within`]."""
    if training_args.max_length is None:
        raise ValueError("`--memory_budget` needs `--max_length`: without it, an example may have any length.")
    if model_args.load_in_8bit:
        raise ValueError("`--memory_budget` does not count `--load_in_8bit`; use `--load_in_4bit` or `--top_p`.")
    dtype = config.dtype if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype)
    return {
        "batch_size": training_args.per_device_train_batch_size,
        "max_length": training_args.max_length,
        "load_in_4bit": model_args.load_in_4bit,
        "gradient_checkpointing": training_args.gradient_checkpointing,
        "dtype": dtype or torch.float32,
    }


def _save(trainer: SFTTrainer, directory: Path, result: str) -> None:
    """Write the adapter or the model, its configuration last. All processes call it."""
    main = trainer.is_world_process_zero()
    with whole_directory(directory, last=result) if main else nullcontext(directory / PARTIAL) as temporary:
        if main and (directory / "README.md").exists():
            shutil.copy2(directory / "README.md", temporary)  # PEFT adds to an existing card
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(temporary), _internal_call=True)  # the upload comes later
        trainer.accelerator.wait_for_everyone()
