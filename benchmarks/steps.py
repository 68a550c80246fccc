"""
How many steps of stage 2 does a ranking need? What the default of `min_agreement` rests on, see `docs/results.md`.

Rankings from the first batches are compared with one from as many other batches as there are at most, on an adapter of
`estimators.py`, modules and decoder layers. "Agreement" is what `learn_gates` looks at. The last line says whether the
spread of the scores is right: the differences between both halves, in units of their standard errors, should have a
standard deviation of 1.

    python benchmarks/steps.py --data ../shared/data/sft_alpaca_gpt4.jsonl --output benchmarks/results/steps.json

15 minutes on one core.
"""

import argparse
import json
from pathlib import Path

import estimators
import torch
from estimators import Problem

from peft_ila import LayerImportance
from peft_ila.attribution import PATH, agreement, attributions
from peft_ila.files import whole_file
from peft_ila.units import unit_of

MOST = 64


def compare(samples: torch.Tensor) -> list[dict[str, float]]:
    names = [str(i) for i in range(samples.shape[1])]

    def ranking(rows: torch.Tensor) -> LayerImportance:
        return LayerImportance(names, attributions(rows)[0].tolist())

    other = ranking(samples[MOST:])
    rows = []
    for steps in (8, 12, 16, 24, 32, 48, 64):
        found = ranking(samples[:steps])
        rows.append(
            {
                "steps": steps,
                "agreement": agreement(samples[:steps]),
                "overlap@30": found.overlap(other, 0.3),
                "overlap@75": found.overlap(other, 0.75),
                "Spearman": found.spearman(other),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a JSONL file with `messages`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapters", type=Path, default=Path("adapters"), help="where stage 1 is kept")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    estimators.BATCHES = 2 * MOST
    problem = Problem(args.data, args.seed, 60, args.adapters / f"{Path(args.data).stem}_{args.seed}")
    ones = torch.ones(len(problem.units))
    samples = torch.stack(
        [-problem.gradient(PATH[i % len(PATH)] * ones, batch) for i, batch in enumerate(problem.batches)]
    )
    # the gradient of a gate that several modules share is the sum of theirs
    layers = [unit_of(unit, "layer") for unit in problem.units]
    by_layer = torch.stack(
        [samples[:, [own == layer for own in layers]].sum(1) for layer in dict.fromkeys(layers)], dim=1
    )
    figures = {"modules": compare(samples), "decoder layers": compare(by_layer)}
    (first, first_error), (second, second_error) = attributions(samples[:MOST]), attributions(samples[MOST:])
    z = (first - second) / (first_error.square() + second_error.square()).sqrt()
    for units, rows in figures.items():
        print(f"\n| {units}: {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        for row in rows:
            print(
                "| "
                + " | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
                + " |"
            )
    print(f"\nstandard deviation of the differences, in standard errors: {z.std():.2f}")
    with whole_file(args.output) as temporary:
        temporary.write_text(json.dumps({**figures, "z": z.std().item(), "samples": samples.tolist()}))


if __name__ == "__main__":
    main()
