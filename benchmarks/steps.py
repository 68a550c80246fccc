"""
How many steps of either stage does a ranking need? What the defaults of `learn_gates` rest on, see `docs/results.md`.

One long LoRA run is kept at several steps, and the path is measured on each of these adapters. All rankings are
compared with that of the last one from batches that no other ranking has seen. "Agreement" is what `learn_gates` looks
at. The last line says whether the spread of the scores is right: the differences between rankings from disjoint
batches, in units of their standard errors, should have a standard deviation of 1.

    python benchmarks/steps.py --data ../shared/data/sft_alpaca_gpt4.jsonl --output benchmarks/results/steps.json

40 minutes on one core.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from problem import Problem, fine_tune
from record import save
from transformers import TrainerCallback

from peft_ila import LayerImportance
from peft_ila.attribution import agreement, attributions

STAGE_1 = (8, 15, 30, 60, 120)
STAGE_2 = (8, 12, 16, 24, 32, 48)
BATCHES = 48  # for the rankings, and as many again for the one they are compared with


class KeepAdapters(TrainerCallback):
    """Saves the adapter on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in STAGE_1[:-1]:
            model.save_pretrained(adapter(self.path, state.global_step))


def adapter(path: Path, steps: int) -> Path:
    return path.with_name(f"{path.name}-{steps}")


def ranking(samples: torch.Tensor) -> LayerImportance:
    return LayerImportance([str(i) for i in range(samples.shape[1])], attributions(samples)[0].tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a JSONL file with `messages`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapters", type=Path, default=Path("adapters"), help="where stage 1 is kept")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    path = args.adapters / f"{Path(args.data).stem}_{args.seed}"
    fine_tune(args.data, args.seed, STAGE_1[-1], adapter(path, STAGE_1[-1]), callbacks=[KeepAdapters(path)])
    samples, losses = {}, {}
    for steps in reversed(STAGE_1):
        problem = Problem(args.data, args.seed, steps, adapter(path, steps), 2 * BATCHES)
        losses[steps] = problem.loss_open
        samples[steps] = problem.path_samples(2 * BATCHES if steps == STAGE_1[-1] else STAGE_2[-2])
        print(f"stage 1, {steps} steps: held-out loss {losses[steps]:.3f}", flush=True)
    # the gradient of a gate that several modules share is the sum of theirs
    layers = torch.tensor([[own == layer for layer in dict.fromkeys(problem.layers)] for own in problem.layers])
    summed = {steps: rows @ layers.float() for steps, rows in samples.items()}
    figures: dict[str, Any] = {"losses": losses}
    for units, measured in (("modules", samples), ("decoder layers", summed)):
        reference = measured[STAGE_1[-1]][BATCHES:]
        figures[units] = [
            {
                "stage 1": steps,
                "stage 2": batches,
                "agreement": agreement(rows[:batches]),
                "overlap@30": ranking(rows[:batches]).overlap(ranking(reference), 0.3),
                "overlap@75": ranking(rows[:batches]).overlap(ranking(reference), 0.75),
                "Spearman": ranking(rows[:batches]).spearman(ranking(reference)),
            }
            for steps, rows in measured.items()
            for batches in STAGE_2
            if batches <= len(rows)
        ]
        (first, error), (second, other) = attributions(measured[STAGE_1[-1]][:BATCHES]), attributions(reference)
        figures[f"z of {units}"] = ((first - second) / (error.square() + other.square()).sqrt()).std().item()
        print(f"\n| {units}: {' | '.join(figures[units][0])} |\n|{'---|' * len(figures[units][0])}")
        for row in figures[units]:
            print("| " + " | ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()) + " |")
        print(f"\nstandard deviation of the differences, in standard errors: {figures[f'z of {units}']:.2f}")
    save(args.output, figures)


if __name__ == "__main__":
    main()
