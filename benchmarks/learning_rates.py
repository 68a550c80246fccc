"""
How much do learning rates matter, and can a short first stage stand for a long one? See `docs/defaults.md`.

On the last adapter that `steps.py` has kept: descent on the scores under pressure, by several optimisers and learning
rates. Then first stages of a tenth of the long one's steps, by several learning rates, ranked as by `learn_gates`. All
rankings are compared with that of the long run, from batches that no other ranking has seen, and applied to its
adapter as a hard mask.

    python benchmarks/learning_rates.py --data ../shared/data/sft_alpaca_gpt4.jsonl --seed 2 \
        --output benchmarks/results/learning_rates.json --plot docs/learning_rates.png

1 hour on one core. What the output holds already is only printed and drawn.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from estimators import pressure, pressure_sgd
from matplotlib.figure import Figure
from problem import Problem
from record import save
from steps import BATCHES, SHARES, STAGE_1, STAGE_2, adapter, ranking

from peft_ila import LayerImportance
from peft_ila.files import whole_file

SCORES: dict[str, Callable[[Problem], torch.Tensor]] = {
    "Adam, 0.05": partial(pressure, lr=0.05),
    "Adam, 0.15": partial(pressure, lr=0.15),
    "Adam, 0.5": partial(pressure, lr=0.5),
    "SGD": pressure_sgd,
    "SGD, four times that": partial(pressure_sgd, scale=4),
}
STAGES = ((12, 5e-4), (12, 2e-3), (12, 5e-3))  # steps and learning rate


def agreement(scores: torch.Tensor, reference: LayerImportance) -> dict[str, float]:
    own = LayerImportance(reference.units, scores.tolist())
    return {
        "overlap@30": own.overlap(reference, 0.3),
        "overlap@75": own.overlap(reference, 0.75),
        "Spearman": own.spearman(reference),
    }


def measure(data: str, seed: int, path: Path, output: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"scores": {}, "stages": {}}
    stages = {f"{steps} steps at {lr:g}": (steps, lr) for steps, lr in STAGES}
    if figures["scores"].keys() >= SCORES.keys() and figures["stages"].keys() >= stages.keys():
        return figures
    long = Problem(data, seed, STAGE_1[-1], adapter(path, STAGE_1[-1]), 2 * BATCHES)
    seen, long.batches = long.batches[:BATCHES], long.batches[BATCHES:]
    reference = ranking(long.samples(BATCHES))
    long.batches = seen
    for name, descend in SCORES.items():
        if name not in figures["scores"]:
            history = descend(long)
            figures["scores"][name] = {
                "agreement": {steps: agreement(history[steps - 1], reference) for steps in STAGE_2},
                "kept": [long.kept(history[-1], share) for share in SHARES],
            }
            save(output, figures)
            print(name, figures["scores"][name], flush=True)
    for name, (steps, lr) in stages.items():
        if name not in figures["stages"]:
            problem = Problem(data, seed, steps, path.with_name(f"{path.name}-{steps}-{lr:g}"), STAGE_2[0], lr)
            scores = torch.tensor(ranking(problem.samples(STAGE_2[0])).scores)
            figures["stages"][name] = {
                "loss": problem.loss_open,
                "agreement": agreement(scores, reference),
                "kept": [long.kept(scores, share) for share in SHARES],
            }
            save(output, figures)
            print(name, figures["stages"][name], flush=True)
    return figures


def plot(figures: dict[str, Any], path: Path) -> None:
    """Agreement with the reference over the batches of stage 2, one line an optimiser of the scores."""
    measures = ("overlap@30", "overlap@75", "Spearman")
    figure = Figure(figsize=(11, 3), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(measures), sharex=True), measures):
        for name, found in figures["scores"].items():
            axis.plot(STAGE_2, [row[measure] for row in found["agreement"].values()], marker=".", label=name)
        axis.set(title=f"modules: {measure}", xlabel="steps of descent")
    figure.axes[-1].legend()
    with whole_file(path) as temporary:
        figure.savefig(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a JSONL file with `messages`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapters", type=Path, default=Path("adapters"), help="where stage 1 is kept")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="a picture of the figures")
    args = parser.parse_args()

    path = args.adapters / f"{Path(args.data).stem}_{args.seed}"
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
        plot(figures, args.plot)


def commas(numbers: Any) -> str:
    return ", ".join(f"{x:.2f}" for x in numbers)


if __name__ == "__main__":
    main()
