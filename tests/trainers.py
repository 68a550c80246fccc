"""Trainers on a tiny Llama."""

import functools
import tempfile
from pathlib import Path

import torch
from conftest import tiny_dialogues, tiny_llama, tiny_tokenizer
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_ila import ILAConfig
from peft_ila.embedded import write_jsonl


def ila(mode="open", granularity="layer", model=None, **kwargs):
    torch.manual_seed(1)
    config = ILAConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", granularity=granularity, gate_mode=mode, **kwargs
    )
    return get_peft_model(model or tiny_llama(), config)


def options(tmp_path, **kwargs):
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "max_steps": 40,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        **kwargs,
    }


def sft_trainer(tmp_path, tokenizer, dialogues, model=None, callbacks=(), **kwargs) -> SFTTrainer:
    return SFTTrainer(
        model=model or ila(),
        args=SFTConfig(**{"bf16": False, **options(tmp_path, **kwargs)}),
        train_dataset=Dataset.from_list(dialogues),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def plain_trainer(tmp_path, tokenizer, dialogues, model=None, **kwargs) -> Trainer:
    rows = []
    for row in dialogues:
        messages = row["prompt"] + row["completion"]
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)})
    return Trainer(model=model or ila(), args=TrainingArguments(**options(tmp_path, **kwargs)), train_dataset=rows)


@functools.cache
def _trained_weights(mode, granularity):
    model = ila(mode, granularity)
    with tempfile.TemporaryDirectory() as directory:
        plain_trainer(Path(directory), tiny_tokenizer(), tiny_dialogues(), model, learning_rate=5e-3).train()
    return get_peft_model_state_dict(model)


def trained_ila(mode="open", granularity="layer"):
    """`ila` after stage 1, which is trained once."""
    model = ila(mode, granularity)
    set_peft_model_state_dict(model, _trained_weights(mode, granularity))
    return model


def write_model_and_data(directory, tokenizer, dialogues) -> None:
    """What a command line works on: `model`, with its tokenizer, and `data.jsonl`."""
    tiny_llama().save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    write_jsonl(dialogues, directory / "data.jsonl")


def lora_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}
