"""
How many steps of each stage does a ranking need? The basis of the defaults of `learn_gates`: `docs/appendix/steps.md`.

One long LoRA run is saved at several steps, and the gates of each of these adapters are measured. All rankings are
applied to the last adapter as a hard mask and compared with its own ranking, from batches that no other ranking has
seen. "Agreement" is the measure that `learn_gates` uses. The spread of the scores is right if the differences between
rankings from disjoint batches, in units of their standard errors, have a standard deviation of 1.

    python -m benchmarks.estimators.steps --data ../shared/data/sft_alpaca_gpt4.jsonl --seed 2 \
        --output benchmarks/results/steps.json --plot docs/steps.png

45 minutes on one core. An existing output is only printed and drawn.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import TrainerCallback

from benchmarks.problem import Problem, fine_tune
from benchmarks.record import save
from peft_ila import LayerImportance
from peft_ila.files import whole_file
from peft_ila.search.attribution import agreement, attributions

STAGE_1 = (8, 15, 30, 60, 120)
STAGE_2 = (8, 12, 16, 24, 32)
BATCHES = 32  # for the rankings, and as many again for the one they are compared with
UNITS = ("modules", "decoder layers")
SHARES = (0.1, 0.3)
MEASURES = ("overlap@30", "overlap@75", "Spearman")


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


def against(reference: LayerImportance, own: LayerImportance) -> dict[str, float]:
    return dict(zip(MEASURES, (own.overlap(reference, 0.3), own.overlap(reference, 0.75), own.spearman(reference))))


def measure(data: str, seed: int, path: Path) -> dict[str, Any]:
    fine_tune(data, seed, STAGE_1[-1], adapter(path, STAGE_1[-1]), callbacks=[KeepAdapters(path)])
    samples, losses = {}, {}
    for steps in reversed(STAGE_1):
        problem = Problem(data, seed, steps, adapter(path, steps), 2 * BATCHES)
        losses[steps] = problem.loss_open
        samples[steps] = problem.samples(2 * BATCHES if steps == STAGE_1[-1] else STAGE_2[-2])
        print(f"stage 1, {steps} steps: held-out loss {losses[steps]:.3f}", flush=True)
    # the gradient of a gate that several modules share is the sum of theirs
    layers = torch.tensor([[own == layer for layer in dict.fromkeys(problem.layers)] for own in problem.layers])
    summed = {steps: rows @ layers.float() for steps, rows in samples.items()}
    figures: dict[str, Any] = {"losses": losses}
    for units, measured in zip(UNITS, (samples, summed)):
        own, other = measured[STAGE_1[-1]][:BATCHES], measured[STAGE_1[-1]][BATCHES:]
        reference = ranking(other)
        figures[units] = [
            {
                "stage 1": steps,
                "stage 2": batches,
                "agreement": agreement(rows[:batches]),
                **against(reference, ranking(rows[:batches])),
            }
            for steps, rows in measured.items()
            for batches in STAGE_2
            if batches <= len(rows)
        ]
        (first, error), (second, other_error) = attributions(own), attributions(other)
        z = (first - second) / (error.square() + other_error.square()).sqrt()
        figures[f"z of {units}"] = z.std().item()
        figures[f"signal to noise of {units}"] = (first.std() / error.square().mean().sqrt()).item()
    return figures


def kept(data: str, seed: int, path: Path) -> dict[str, list[float]]:
    """What the top modules of each adapter's ranking keep of the last adapter's gain: is an early ranking right?"""
    last = Problem(data, seed, STAGE_1[-1], adapter(path, STAGE_1[-1]), STAGE_2[0])
    figures = {}
    for steps in STAGE_1:
        problem = last if steps == STAGE_1[-1] else Problem(data, seed, steps, adapter(path, steps), STAGE_2[0])
        scores = attributions(problem.samples(STAGE_2[0]))[0]
        figures[str(steps)] = [last.kept(scores, share) for share in SHARES]
        print(f"stage 1, {steps} steps: kept {figures[str(steps)]}", flush=True)
    return figures


def plot(lines: dict[str, dict[Any, list[dict[str, Any]]]], title: str, path: Path) -> None:
    """How well rankings agree with the reference over the batches of stage 2, one row of panels a kind of unit."""
    figure = Figure(figsize=(12, 3 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), len(MEASURES), sharex=True, squeeze=False)
    for axes, (units, labelled) in zip(grid, lines.items()):
        for axis, name in zip(axes, MEASURES):
            for label, rows in labelled.items():
                axis.plot([row["stage 2"] for row in rows], [row[name] for row in rows], marker=".", label=label)
            axis.set(title=f"{units}: {name}", xlabel="batches of stage 2", xscale="log")
            axis.set_xticks(STAGE_2, labels=STAGE_2, minor=False)
            axis.minorticks_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), title=title, loc="outside right center")
    with whole_file(path) as temporary:
        figure.savefig(temporary)


def arguments(description: str | None) -> tuple[argparse.Namespace, Path]:
    """The command line, and the common path of the adapters of its run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a JSONL file with `messages`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--adapters", type=Path, default=Path("adapters"), help="the directory of the adapters of stage 1"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="a picture of the figures")
    args = parser.parse_args()
    return args, args.adapters / f"{Path(args.data).stem}_{args.seed}"


def main() -> None:
    args, path = arguments(__doc__)
    figures = json.loads(args.output.read_text()) if args.output.exists() else measure(args.data, args.seed, path)
    if "kept" not in figures:
        save(args.output, figures)
        figures["kept"] = kept(args.data, args.seed, path)
        save(args.output, figures)
    for units in UNITS:
        print(f"\n| {units}: {' | '.join(figures[units][0])} |\n|{'---|' * len(figures[units][0])}")
        for row in figures[units]:
            print("| " + " | ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()) + " |")
        print(f"\nsignal to noise {figures[f'signal to noise of {units}']:.2f}")
        print(f"standard deviation of the differences, in standard errors: {figures[f'z of {units}']:.2f}")
    print(f"\n| stage 1 | {' | '.join(f'kept at {share:.0%}' for share in SHARES)} |\n|---|---|---|")
    for steps, row in figures["kept"].items():
        print(f"| {steps} | " + " | ".join(f"{x:.2f}" for x in row) + " |")
    if args.plot:
        lines = {
            units: {steps: [row for row in figures[units] if row["stage 1"] == steps] for steps in STAGE_1}
            for units in UNITS
        }
        plot(lines, "steps of stage 1", args.plot)


if __name__ == "__main__":
    main()
