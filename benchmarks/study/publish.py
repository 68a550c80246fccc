"""
Write the package's published rankings from the study: of modules, and of decoder layers by the sums of their modules.

    python -m benchmarks.study.publish benchmarks/results/study peft_ila/published/smollm2-135m-instruct
"""

import argparse
import json
from pathlib import Path

from benchmarks.study.arms import ALIGNMENT, SEEDS, by_layer
from benchmarks.study.figures import NAMES
from benchmarks.study.problem import BATCH, RANK
from benchmarks.study.run import read
from peft_ila import LayerImportance
from peft_ila.units import unit_of

SEARCH = "full search"  # the attribution of what LoRA has learned
MODEL = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "model_type": "llama", "task_type": "CAUSAL_LM"}


def importance(units: list[str], scores: list[float], layers: bool, **facts: object) -> LayerImportance:
    """A ranking with its provenance."""
    own, modules = dict(zip(units, scores)), {unit: [unit] for unit in units}
    if layers:
        modules = {layer: [u for u in units if unit_of(u, "layer") == layer] for layer in by_layer(own)}
        own = by_layer(own)
    return LayerImportance(list(own), list(own.values()), {**MODEL, **facts}, modules)


def published(results: Path, layers: bool) -> LayerImportance:
    """The mean over the alignment sets, of the means over their seeds."""
    made_by = json.loads((results / "made_by.json").read_text())
    rows = read(results / "figures.jsonl")
    scores = {(row["data"], row["seed"]): row["scores"] for row in rows if SEARCH in row.get("scores", {})}
    facts = {
        "granularity": "layer" if layers else "module",
        "method": "attribution",
        "lora_r": RANK,
        "max_steps": made_by["steps"],
        "per_device_train_batch_size": BATCH,
    }
    means = []
    for data in ALIGNMENT:
        own = [
            importance(made_by["units"], scores[data, seed][SEARCH], layers, **facts, data=NAMES[data], seed=seed)
            for seed in SEEDS
        ]
        means.append(LayerImportance.mean(own))
    return LayerImportance.mean(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("name", type=Path, help="the path of the files to write, without suffix")
    args = parser.parse_args()
    for layers in (False, True):
        name = args.name.name + ("-layers" if layers else "")
        published(args.results, layers).save(args.name.with_name(f"{name}.json"))


if __name__ == "__main__":
    main()
