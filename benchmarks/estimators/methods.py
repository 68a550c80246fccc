"""
How do the methods of `learn_gates` differ? On the demo's part a, see `docs/appendix/rankings.md`.

The adapter that `make demo` ranks last (full LoRA) is ranked by "attribution" and by "descent" without and with a
budget, and a fresh adapter by "untrained", with one gate per decoder layer and per module. Overlap and rank
correlation are with the ranking by attribution; "kept" is (L(0) − L(mask)) / (L(0) − L(1)) on the demo's held-out
dialogues, without retraining.

    python -m benchmarks.estimators.methods --demo demo_output --output benchmarks/results/methods.json

30 minutes on 2 cores.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.problem import base_model
from benchmarks.record import save
from peft_ila import ILAConfig, LayerImportance, learn_gates
from peft_ila.embedded import smollm2
from peft_ila.export.plain import export_adapter

SHARES = (0.1, 0.3)
METHODS: dict[str, dict[str, Any]] = {
    "attribution": {},
    "untrained": {"method": "untrained"},
    "descent, no budget": {"method": "descent"},
    "descent, budget 30 %": {"method": "descent", "budget": 0.3},
    "descent, budget 10 %": {"method": "descent", "budget": 0.1},
}


def gated(adapter: Path, granularity: Any) -> PeftModel:
    """SmolLM2 with the adapter, which may have gates for other units."""
    with tempfile.TemporaryDirectory() as plain:
        export_adapter(adapter, plain)
        config = ILAConfig.from_lora(LoraConfig.from_pretrained(plain), granularity=granularity, gate_mode="open")
        return PeftModel.from_pretrained(base_model(), plain, config=config, is_trainable=True)


def measuring_trainer(model: Any, directory: Path, data: Path) -> SFTTrainer:
    """A trainer that only measures SmolLM2: `data` is a file of the demo, for evaluation and ranking."""
    dataset = load_dataset("json", data_files=str(data), split="train")
    args = SFTConfig(
        output_dir=str(data.parent),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=16,
        max_length=64,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def lora_options(model: PeftModel) -> dict[str, Any]:
    config: Any = model.peft_config["default"]
    names = ("r", "lora_alpha", "lora_dropout", "task_type")
    return {**{name: getattr(config, name) for name in names}, "target_modules": "all-linear"}


def measure(demo: Path, granularity: Any, methods: list[str], output: Path, figures: dict[str, Any]) -> None:
    found = figures.setdefault(granularity, {})
    todo = [name for name in methods if name not in found]
    if not todo:
        return
    model = gated(demo / "learned" / "adapter", granularity)
    ranker, held_out = (
        measuring_trainer(model, smollm2(), demo / "data" / f"{d}.jsonl") for d in ("part_a", "held_out")
    )
    opened = held_out.evaluate()["eval_loss"]
    with model.disable_adapter():
        closed = held_out.evaluate()["eval_loss"]
    print(f"{granularity}: held-out loss {closed:.3f} → {opened:.3f}", flush=True)
    for name in todo:
        if name == "untrained":
            torch.manual_seed(0)
            fresh = get_peft_model(base_model(), ILAConfig(**{**lora_options(model), "granularity": granularity}))
            own = measuring_trainer(fresh, smollm2(), demo / "data" / "part_a.jsonl")
            importance = learn_gates(own, **METHODS[name])
        else:
            importance = learn_gates(ranker, **METHODS[name])
        row: dict[str, Any] = {"scores": importance.scores, "learn_gates": importance.metadata["learn_gates"]}
        reference = LayerImportance(importance.units, found.get("attribution", row)["scores"])
        row["overlap@75"], row["overlap@30"] = (importance.overlap(reference, share) for share in (0.75, 0.3))
        row["Spearman"] = importance.spearman(reference)
        for share in SHARES:
            model.apply_mask(importance.select(top_p=share))
            masked = held_out.evaluate()["eval_loss"]
            row[f"kept at {share:.0%}"] = (closed - masked) / (closed - opened)
        model.set_gate_mode("open")
        found[name] = row
        save(output, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="the output of `peft-ila demo`")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output", type=Path, required=True, help="results in it are not computed again")
    args = parser.parse_args()
    figures: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for granularity in ("layer", "module"):
        measure(args.demo, granularity, args.methods, args.output, figures)
    columns = ["overlap@75", "overlap@30", "Spearman", *(f"kept at {share:.0%}" for share in SHARES)]
    print(f"| unit | method | steps | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 3)}")
    for granularity in ("layer", "module"):
        for name, row in figures[granularity].items():
            cells = " | ".join(f"{row[column]:.2f}" for column in columns)
            print(f"| {granularity} | {name} | {row['learn_gates']['steps_taken']} | {cells} |")


if __name__ == "__main__":
    main()
