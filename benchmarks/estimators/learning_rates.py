"""
How much do learning rates matter, and can a short stage 1 replace a long one? See `docs/appendix/steps.md`.

First, descent on the scores under pressure runs on the last adapter of `steps.py`, by several optimisers and learning
rates. Then short runs of stage 1, with a tenth of the steps and several learning rates, are ranked by `learn_gates`.
All rankings are applied to the long run's adapter as a hard mask and compared with its own ranking, from batches that
no other ranking has seen.

    python -m benchmarks.estimators.learning_rates --data ../shared/data/sft_alpaca_gpt4.jsonl --seed 2 \
        --output benchmarks/results/learning_rates.json --plot docs/learning_rates.png

1 hour on one core. Results in the output are only printed and drawn.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.estimators.quality import pressure, pressure_sgd
from benchmarks.estimators.steps import BATCHES, SHARES, STAGE_1, STAGE_2, adapter, against, arguments, plot, ranking
from benchmarks.problem import Problem
from benchmarks.record import save
from peft_ila import LayerImportance
from peft_ila.search.attribution import attributions

SCORES: dict[str, Callable[[Problem], torch.Tensor]] = {
    "Adam, 0.05": partial(pressure, lr=0.05),
    "Adam, 0.15": partial(pressure, lr=0.15),
    "Adam, 0.5": partial(pressure, lr=0.5),
    "SGD": pressure_sgd,
    "SGD, four times that": partial(pressure_sgd, scale=4),
}
SHORT = STAGE_1[-1] // 10
RATES = (5e-4, 2e-3, 5e-3)  # of the short stages 1


def measure(data: str, seed: int, path: Path, output: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"scores": {}, "stages": {}}
    stages = {f"{SHORT} steps at {lr:g}": lr for lr in RATES}
    if figures["scores"].keys() >= SCORES.keys() and figures["stages"].keys() >= stages.keys():
        return figures

    def agreement(scores: torch.Tensor) -> dict[str, float]:
        return against(reference, LayerImportance(reference.units, scores.tolist()))

    long = Problem(data, seed, STAGE_1[-1], adapter(path, STAGE_1[-1]), 2 * BATCHES)
    seen, long.batches = long.batches[:BATCHES], long.batches[BATCHES:]
    reference = ranking(long.samples(BATCHES))
    long.batches = seen
    for name, descend in SCORES.items():
        if name not in figures["scores"]:
            history = descend(long)
            figures["scores"][name] = {
                "agreement": {steps: agreement(history[steps - 1]) for steps in STAGE_2},
                "kept": [long.kept(history[-1], share) for share in SHARES],
            }
            save(output, figures)
            print(name, figures["scores"][name], flush=True)
    for name, lr in stages.items():
        if name not in figures["stages"]:
            problem = Problem(data, seed, SHORT, path.with_name(f"{path.name}-{SHORT}-{lr:g}"), STAGE_2[0], lr)
            scores = attributions(problem.samples(STAGE_2[0]))[0]
            figures["stages"][name] = {
                "loss": problem.loss_open,
                "agreement": agreement(scores),
                "kept": [long.kept(scores, share) for share in SHARES],
            }
            save(output, figures)
            print(name, figures["stages"][name], flush=True)
    return figures


def main() -> None:
    args, path = arguments(__doc__)
    figures = measure(args.data, args.seed, path, args.output)
    kept = " | ".join(f"kept at {share:.0%}" for share in SHARES)
    print(f"\n| scores by | steps: overlap@30, @75, Spearman | {kept} |\n|---|---|---|---|")
    for name, found in figures["scores"].items():
        rows = "; ".join(f"{steps}: {commas(row.values())}" for steps, row in found["agreement"].items())
        print(f"| {name} | {rows} | {' | '.join(f'{x:.2f}' for x in found['kept'])} |")
    print(f"\n| stage 1 | held-out loss | overlap@30, @75, Spearman | {kept} |\n|---|---|---|---|---|")
    for name, found in figures["stages"].items():
        agreed = commas(found["agreement"].values())
        print(f"| {name} | {found['loss']:.3f} | {agreed} | {' | '.join(f'{x:.2f}' for x in found['kept'])} |")
    if args.plot:
        lines = {
            name: [{"stage 2": int(steps), **row} for steps, row in found["agreement"].items()]
            for name, found in figures["scores"].items()
        }
        plot({"modules": lines}, "scores by", args.plot)


def commas(numbers: Any) -> str:
    return ", ".join(f"{x:.2f}" for x in numbers)


if __name__ == "__main__":
    main()
