"""
Which ranking finds the modules that matter? The table of section 6 of the design.

For each data set: fine-tune SmolLM2-135M with LoRA, rank its 210 modules by several methods, and keep only the
deltas of the top modules (hard mask, nothing retrained). "Kept" is (L(0) − L(mask)) / (L(0) − L(1)) on held-out
examples: 1 means that the other modules' deltas were worth nothing.

    python benchmarks/kept.py --data ../shared/data/sft_lima.jsonl ../shared/data/sft_no_robots.jsonl \
        ../shared/data/sft_alpaca_gpt4.jsonl --output benchmarks/results/kept.json

Takes about 15 minutes a data set on 2 cores.
"""

import argparse
import itertools
import json
import random
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_ila import ILAConfig, LayerImportance, learn_gates
from peft_ila.data import load_dataset
from peft_ila.embedded import smollm2
from peft_ila.files import whole_file

SHARES = (0.1, 0.3, 0.5, 0.75)
HELD_OUT = 64
MAX_LENGTH, PROMPT = 96, 56  # tokens; examples with longer prompts are left out


def fine_tune(data: str, seed: int, args: argparse.Namespace, adapter: Path | None = None) -> SFTTrainer:
    """Stage 1: LoRA on all examples but the last ones, or the adapter that such a run has saved."""
    directory = smollm2()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(seed)
    config = ILAConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        granularity=args.granularity,
        gate_mode="open",
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # The loss is on the answers only: the tokens of the chat format are learned by any few layers, and with them even
    # random masks keep nine tenths of the gain.
    dataset = (
        load_dataset(data)
        .map(lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]})
        .select_columns(["prompt", "completion"])
        .filter(lambda row: len(tokenizer.apply_chat_template(row["prompt"], return_dict=True)["input_ids"]) <= PROMPT)
        .shuffle(seed=0)
    )
    trainer = SFTTrainer(
        model=PeftModel.from_pretrained(model, adapter) if adapter else get_peft_model(model, config),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=8,
            per_device_eval_batch_size=16,
            max_length=MAX_LENGTH,
            max_steps=args.steps,
            learning_rate=5e-4,
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
    if adapter is None:
        trainer.train()
    return trainer


def rankings(trainer: SFTTrainer, args: argparse.Namespace) -> dict[str, list[LayerImportance]]:
    """Each method's rankings; several for methods that need averaging."""
    learned = learn_gates(trainer, steps=args.gate_steps)
    plain = learn_gates(trainer, steps=args.gate_steps, penalty=0.0, initial_score=4.0, learning_rate=0.1)
    draws = [
        LayerImportance(
            units=learned.units, scores=random.Random(i).sample(range(len(learned.units)), len(learned.units))
        )
        for i in range(3)
    ]
    return {"learn_gates (budget pressure)": [learned], "plain descent from s = 4": [plain], "random": draws}


def kept(trainer: SFTTrainer, importances: list[LayerImportance], closed: float, opened: float) -> list[float]:
    """The mean share of the loss gain that the hard mask keeps, for each of `SHARES`."""
    figures = []
    for share in SHARES:
        losses = []
        for importance in importances:
            trainer.model.apply_mask(importance.select(top_p=share))
            losses.append(trainer.evaluate()["eval_loss"])
        trainer.model.set_gate_mode("open")
        figures.append((closed - sum(losses) / len(losses)) / (closed - opened))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files with `messages`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60, help="of stage 1")
    parser.add_argument("--gate_steps", type=int, default=32, help="of stage 2")
    parser.add_argument("--granularity", default="module", choices=["module", "layer"])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    runs = []
    found: dict[str, list[LayerImportance]] = {}
    for data, seed in itertools.product(args.data, args.seeds):
        trainer = fine_tune(data, seed, args)
        opened = trainer.evaluate()["eval_loss"]
        with trainer.model.disable_adapter():
            closed = trainer.evaluate()["eval_loss"]
        run = {"data": Path(data).name, "seed": seed, "loss_base": closed, "loss_tuned": opened, "kept": {}}
        for method, importances in rankings(trainer, args).items():
            run["kept"][method] = kept(trainer, importances, closed, opened)
            found.setdefault(method, []).append(importances[0])
            print(run["data"], seed, method, [round(figure, 3) for figure in run["kept"][method]], flush=True)
        run["metadata"] = found["learn_gates (budget pressure)"][-1].metadata
        runs.append(run)
        with whole_file(args.output) as temporary:
            temporary.write_text(json.dumps({"settings": vars(args) | {"output": None}, "runs": runs}, indent=1))

    print("\n| ranking by | " + " | ".join(f"kept at {share:.0%}" for share in SHARES) + " | overlap@75 | Spearman |")
    print("|" + "---|" * (len(SHARES) + 3))
    for method, importances in found.items():
        means = [sum(run["kept"][method][i] for run in runs) / len(runs) for i in range(len(SHARES))]
        pairs = list(itertools.combinations(importances, 2))
        agreement = [
            sum(function(a, b) for a, b in pairs) / len(pairs) if pairs and method != "random" else float("nan")
            for function in (LayerImportance.overlap, LayerImportance.spearman)
        ]
        print(f"| {method} | " + " | ".join(f"{figure:.2f}" for figure in [*means, *agreement]) + " |")


if __name__ == "__main__":
    main()
