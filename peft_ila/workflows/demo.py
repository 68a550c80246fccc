"""
The whole method on a real model and real data, offline: `peft-ila demo --output_dir OUT`.

SmolLM2-135M-Instruct learns the short answers of ChatterBot's dialogues, by commands that a user could type.
"""

import random
from pathlib import Path

from ..embedded import dialogues, smollm2, write_jsonl
from ..ranking.plotting import check_matplotlib

_HELD_OUT = 32
_LORA = "--lora_r 8 --lora_alpha 16 --lora_dropout 0".split()
_TRAINING = (
    "--max_steps 30 --learning_rate 1e-3 --warmup_steps 5 --per_device_train_batch_size 4 --max_length 64 "
    "--gradient_checkpointing False --logging_steps 5 --save_strategy no --report_to none --disable_tqdm True"
).split()
_PRUNING = "--min_kept 0.9 --measure_steps 8 --rounds 2 --gate_steps 12".split()


def demo_commands(output_dir: Path) -> list[tuple[str, list[str]]]:
    """Write the demo's data, and its model to the cache. Return the commands, each with what it shows."""
    check_matplotlib()
    train, held_out = str(output_dir / "train.jsonl"), str(output_dir / "held_out.jsonl")
    rows = dialogues()
    random.Random(0).shuffle(rows)
    write_jsonl(rows[:_HELD_OUT], held_out)
    write_jsonl(rows[_HELD_OUT:], train)

    def output(name: str) -> list[str]:
        return ["--output_dir", str(output_dir / name)]

    ranking = str(output_dir / "ranked" / "importance.json")
    trained = ["--model_name_or_path", str(smollm2()), "--dataset_name", train, *_TRAINING, *_LORA]
    evaluated = ["--eval_dataset_name", held_out]
    tune = ["tune", "--importance", ranking, *trained, *evaluated, "--eval_strategy", "epoch"]
    prune = ["prune", str(output_dir / "tuned_all"), *trained, *evaluated, *_PRUNING]
    return [
        ("Rank the decoder layers, before any training", ["rank", *trained, *output("ranked")]),
        ("Do other data find the same layers?", ["compare", ranking, "smollm2-135m-instruct-layers"]),
        (
            "Convert the top 30% to a LoraConfig",
            ["convert", ranking, "--top_p", "0.3", *_LORA, *output("lora")],
        ),
        ("Tune the top 30%", [*tune, "--top_p", "0.3", *output("tuned_30")]),
        ("Tune all layers", [*tune, "--top_p", "1.0", *output("tuned_all")]),
        ("How much of that is needed? Prune it", [*prune, *output("pruned")]),
    ]
