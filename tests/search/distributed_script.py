"""Both stages on however many processes there are; see `test_distributed.py`."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import tiny_llama
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_ila import EpsilonStability, ILAConfig, learn_gates

GLOBAL_BATCH = 8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The head is outside the decoder layers, and FSDP2 leaves it whole after a forward pass.
TARGETS = {"open": LINEAR, "joint": [*LINEAR, "lm_head"]}


def make_trainer(output: Path, mode: str, *callbacks) -> Trainer:
    rows = []
    for i in range(48):
        ids = torch.randint(1, 64, (12,), generator=torch.Generator().manual_seed(i % 8)).tolist()
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * 12})
    base = tiny_llama()
    torch.manual_seed(1)
    config = ILAConfig(r=4, target_modules=TARGETS[mode], task_type="CAUSAL_LM", gate_mode=mode)
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=16,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="steps",
        disable_tqdm=True,
    )
    args.per_device_train_batch_size = GLOBAL_BATCH // args.world_size
    if os.environ.get("ACCELERATE_USE_FSDP"):
        PartialState().distributed_type = DistributedType.MULTI_GPU  # on the CPU accelerate leaves FSDP off
    return Trainer(model=get_peft_model(base, config), args=args, train_dataset=rows, callbacks=list(callbacks))


def train(output: Path, mode: str) -> dict:
    untrained = learn_gates(make_trainer(output, mode), steps=4, method="untrained")
    stability = EpsilonStability(epsilon=0.05, window=3, patience=2)
    trainer = make_trainer(output, mode, stability)
    trainer.train()
    descent = learn_gates(trainer, steps=8, method="descent", budget=0.5, learning_rate=0.5)
    importance = learn_gates(trainer, steps=8)
    trainer.save_model(str(output / "adapter"))
    return {
        "engine": "FSDP2" if trainer.accelerator.is_fsdp2 else str(trainer.accelerator.distributed_type),
        "world_size": trainer.args.world_size,
        "stopped_at": stability.stopped_at,
        "scores": importance.scores,
        "descent": descent.scores,
        "untrained": untrained.scores,
        "loss_closed": importance.metadata["learn_gates"]["loss_closed"],
        "batch_size": importance.metadata["learn_gates"]["batch_size"],
    }


def main(output: Path) -> None:
    results = {mode: train(output / mode, mode) for mode in TARGETS}
    (output / f"rank_{PartialState().process_index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
