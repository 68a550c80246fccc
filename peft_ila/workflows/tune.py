"""Tuning a selection by name, with TRL's trainer: what `peft-ila tune` does."""

from typing import Any

from transformers import AutoConfig
from trl import SFTTrainer

from ..export.freezing import FrozenPrefix
from ..export.lora import DECIDED_BY_SELECTION
from ..ranking.importance import LayerImportance
from .arguments import TuneArguments, model_name, required
from .resuming import checkpoint_of
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
        FileNotFoundError: There is no such model, data file or ranking.
        ValueError: A bad selection or ranking, or targets were passed.
    """
    importance = LayerImportance.load(required(tune_args.importance, "importance"))
    if model_args.lora_target_modules:
        raise ValueError("`--lora_target_modules` follows from `--importance` and cannot be passed.")
    options = lora_config(model_args).to_dict()
    for decided in ("peft_type", *DECIDED_BY_SELECTION):
        del options[decided]
    model_config = AutoConfig.from_pretrained(
        model_name(model_args.model_name_or_path),
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    config = importance.to_lora_config(**tune_args.selection(), model=model_config, **options)
    trainer = sft_trainer(script_args, training_args, model_args, config, [FrozenPrefix()])
    trainer.train(resume_from_checkpoint=checkpoint_of(training_args))
    trainer.save_model(training_args.output_dir)
    return trainer
