"""
Write the package's published rankings of SmolLM2 from the study: the mean over the alignment sets.

    python -m benchmarks.study.publish benchmarks/results/study peft_ila/published
"""

import argparse
from pathlib import Path

from benchmarks.study.arms import ALIGNMENT, SEEDS
from benchmarks.study.figures import NAMES, Figures
from benchmarks.study.problem import BATCH, RANK
from peft_ila import LayerImportance
from peft_ila.units import unit_of


def published(figures: Figures, layers: bool) -> LayerImportance:
    """The mean of the full searches' rankings: of modules, or of decoder layers by the sums of their modules."""
    facts = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "model_type": "llama",
        "task_type": "CAUSAL_LM",
        "granularity": "layer" if layers else "module",
        "method": "attribution",
        "lora_r": RANK,
        "max_steps": figures.made_by["steps"],
        "per_device_train_batch_size": BATCH,
    }
    means = []
    for data in ALIGNMENT:
        rankings = []
        for seed in SEEDS:
            found = figures.ranking((data, seed), "full search", layers)
            assert found, "the study has not got so far"
            modules: dict[str, list[str]] = {}
            for unit in figures.units:
                modules.setdefault(unit_of(unit, "layer") if layers else unit, []).append(unit)
            metadata = {**facts, "data": NAMES[data], "seed": seed}
            rankings.append(LayerImportance(found.units, found.scores, metadata, modules))
        means.append(LayerImportance.mean(rankings))
    return LayerImportance.mean(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("output_dir", type=Path)
    args = parser.parse_args()
    figures = Figures.load(args.results)
    for name, layers in (("smollm2-135m-instruct", False), ("smollm2-135m-instruct-layers", True)):
        published(figures, layers).save(args.output_dir / f"{name}.json")


if __name__ == "__main__":
    main()
