"""SmolLM2-135M, fine-tuned on a data set with TRL, and its held-out loss."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_ila import ILAConfig
from peft_ila.embedded import smollm2
from peft_ila.workflows.data import load_dataset

HELD_OUT = 64
MAX_LENGTH, PROMPT = 96, 56  # tokens; examples with longer prompts are left out
GATED = ILAConfig(
    r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear", granularity="module", gate_mode="open"
)


def fine_tune(data: str, seed: int, steps: int, adapter: Path, learning_rate: float) -> SFTTrainer:
    """Train LoRA on all examples but the last ones, or take what such a run has saved as `adapter`."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    # The loss is on the answers only: the tokens of the chat format are learned by any few layers, and with them even
    # random masks keep nine tenths of the gain.
    dataset = (
        load_dataset(data)
        .map(lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]})
        .select_columns(["prompt", "completion"])
        .filter(lambda row: len(tokenizer.apply_chat_template(row["prompt"], return_dict=True)["input_ids"]) <= PROMPT)
        .shuffle(seed=0)
    )
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    trained = (adapter / SAFETENSORS_WEIGHTS_NAME).exists()  # the directory alone is made by any trainer
    trainer = SFTTrainer(
        model=PeftModel.from_pretrained(model, adapter) if trained else get_peft_model(model, GATED),
        args=SFTConfig(
            output_dir=str(adapter),
            per_device_train_batch_size=8,
            per_device_eval_batch_size=16,
            max_length=MAX_LENGTH,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            disable_tqdm=True,
        ),
        train_dataset=dataset.select(range(len(dataset) - HELD_OUT)),
        eval_dataset=dataset.select(range(len(dataset) - HELD_OUT, len(dataset))),
        processing_class=tokenizer,
    )
    if not trained:
        trainer.train()
        trainer.model.save_pretrained(adapter)
    return trainer


@torch.no_grad()
def held_out_loss(trainer: SFTTrainer) -> float:
    """The mean over the tokens of the held-out answers."""
    model = trainer.model.eval()
    total, tokens = 0.0, 0
    for batch in trainer.get_eval_dataloader():
        counted = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch, use_cache=False).loss) * counted
        tokens += counted
    return total / tokens
