"""Both stages on however many processes there are; see `test_distributed.py`."""

import json
import sys
from pathlib import Path

import torch
from conftest import tiny_llama
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_ila import EpsilonStability, ILAConfig, learn_gates

GLOBAL_BATCH = 8


def main(output: Path, mode: str) -> None:
    rows = []
    for i in range(48):
        ids = torch.randint(1, 64, (12,), generator=torch.Generator().manual_seed(i % 8)).tolist()
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * 12})
    base = tiny_llama()
    torch.manual_seed(1)
    config = ILAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", gate_mode=mode)
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=40,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    args.per_device_train_batch_size = GLOBAL_BATCH // args.world_size
    stability = EpsilonStability(epsilon=0.05, window=3, patience=2)
    trainer = Trainer(model=get_peft_model(base, config), args=args, train_dataset=rows, callbacks=[stability])
    trainer.train()
    importance = learn_gates(trainer, steps=8)
    result = {
        "world_size": args.world_size,
        "stopped_at": stability.stopped_at,
        "scores": importance.scores,
        "penalty": importance.metadata["learn_gates"]["penalty"],
        "batch_size": importance.metadata["learn_gates"]["batch_size"],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / f"rank_{args.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
