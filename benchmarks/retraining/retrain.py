"""
Is tuning the important modules, or the important decoder layers, as good as tuning all? See `docs/defaults.md`.

A new LoRA on each selection, trained as long as the full one that was ranked, from the rankings that
`estimators/quality.py` left. All selections have at most as many trainable parameters as the given share of the
decoder layers: modules are taken in the order of their scores while they fit. "Gained" is the held-out loss gain, as a
share of full LoRA's.

    python -m benchmarks.retraining.retrain --data ../shared/data/sft_alpaca_gpt4.jsonl ../shared/data/sft_lima.jsonl \
        --rankings benchmarks/results/estimators --output_dir benchmarks/results/retrain

On two cores, 4 minutes a selection. What the output holds already is not computed again.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.problem import LORA, base_model, fine_tune, held_out_loss
from benchmarks.record import save
from peft_ila.units import unit_of

STEPS = 60


def sizes(units: list[str]) -> dict[str, int]:
    """LoRA's trainable parameters in each module."""
    model = base_model()
    return {unit: LORA["r"] * sum(model.get_submodule(unit).weight.shape) for unit in units}


def modules_within(budget: int, scores: dict[str, float], size: dict[str, int]) -> list[str]:
    chosen: list[str] = []
    for unit in sorted(scores, key=lambda unit: -scores[unit]):
        if sum(size[own] for own in chosen) + size[unit] <= budget:
            chosen.append(unit)
    return chosen


def layers_within(budget: int, scores: dict[str, float], size: dict[str, int]) -> list[str]:
    modules: dict[str, list[str]] = {}
    for unit in scores:
        modules.setdefault(unit_of(unit, "layer"), []).append(unit)
    worth = {layer: sum(scores[unit] for unit in own) for layer, own in modules.items()}
    counts = {layer: sum(size[unit] for unit in own) for layer, own in modules.items()}
    return [unit for layer in modules_within(budget, worth, counts) for unit in modules[layer]]


def selections(run: dict[str, Any], share: float) -> dict[str, list[str]]:
    size = sizes(run["units"])
    budget = int(share * sum(size.values()))

    def scores(estimator: str) -> dict[str, float]:
        return dict(zip(run["units"], run["estimators"][estimator]["scores"]))

    first_order, path = scores("first order at γ = 0"), scores("path")
    chance = dict(zip(path, torch.rand(len(path), generator=torch.Generator().manual_seed(0)).tolist()))
    return {
        "modules by first order": modules_within(budget, first_order, size),
        "layers by first order": layers_within(budget, first_order, size),
        "modules by path": modules_within(budget, path, size),
        "layers by path": layers_within(budget, path, size),
        "random modules": modules_within(budget, chance, size),
        "random layers": layers_within(budget, chance, size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], help="JSONL files with `messages`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--share", type=float, default=0.3, help="of the trainable parameters")
    parser.add_argument("--selections", nargs="+", help="by default all")
    parser.add_argument("--rankings", type=Path, required=True, help="the --output_dir of estimators/quality.py")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"), help="where the adapters are kept")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()

    for seed, data in itertools.product(args.seeds, args.data):
        name = f"{Path(data).stem}_{seed}"
        run = json.loads((args.rankings / f"{name}.json").read_text())
        file = args.output_dir / f"{name}_{args.share:.0%}.json".replace("%", "")
        figures = json.loads(file.read_text()) if file.exists() else {}
        for selection, modules in selections(run, args.share).items():
            if selection in figures or (args.selections and selection not in args.selections):
                continue
            adapter = args.adapters / f"{file.stem}_{selection.replace(' ', '-')}"
            config = LoraConfig(**LORA, target_modules=modules)
            trainer = fine_tune(data, seed, STEPS, adapter, config)
            loss = held_out_loss(trainer)
            gained = (run["loss_base"] - loss) / (run["loss_base"] - run["loss_tuned"])
            size = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" in n)
            figures[selection] = {"modules": len(modules), "parameters": size, "loss": loss, "gained": gained}
            save(file, figures)
            print(file.stem, selection, len(modules), size, round(loss, 4), round(gained, 3), flush=True)

    print("\n| run | selection | modules | parameters | held-out loss | gained |\n|---|---|---|---|---|---|")
    for file in sorted(args.output_dir.glob("*.json")):
        for selection, found in json.loads(file.read_text()).items():
            if selection != "made_by":
                figures = f"{found['modules']} | {found['parameters']:,} | {found['loss']:.3f} | {found['gained']:.2f}"
                print(f"| {file.stem} | {selection} | {figures} |")


if __name__ == "__main__":
    main()
