"""
Which estimator of importance finds the modules that matter? The tables of `docs/appendix/rankings.md`.

For each data set and seed: fine-tune SmolLM2-135M with LoRA (kept for the next call), then rank its 210 modules by
several estimators. All use the same training batches and may set the gates γ to any values; their cost is the number
of batches with a backward pass. "Kept" is (L(0) − L(mask)) / (L(0) − L(1)) on held-out examples, with only the deltas
of the top modules on and without retraining. For "layers", whole decoder layers are ranked by the sum of their
modules' scores.

    python -m benchmarks.estimators.quality --data ../shared/data/sft_alpaca_gpt4.jsonl ../shared/data/sft_lima.jsonl \
        ../shared/data/sft_dolly.jsonl --seeds 0 1 2 --output_dir benchmarks/results/estimators

On one core, stage 1 takes 7 minutes per run, each estimator 4. Results in the output are not computed again. Without
`--data`, only the tables are printed.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.helpers import KappaTuneSelector

from benchmarks.problem import Problem, base_model, top
from benchmarks.record import save
from benchmarks.study.arms import by_layer
from peft_ila import LayerImportance
from peft_ila.search.descent import Descent

SHARES = (0.1, 0.3, 0.5, 0.75)
BATCHES = 32
PATH = (1 / 8, 3 / 8, 5 / 8, 7 / 8)


def random_masks(problem: Problem) -> torch.Tensor:
    """Attribution along the path, but at random masks instead of equal gates."""
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for i, batch in enumerate(problem.batches):
        draw = torch.rand(len(problem.units), generator=generator)
        gradients.append(problem.gradient((draw < PATH[i % len(PATH)]).float(), batch))
    return -torch.stack(gradients).mean(0)


def shrinking_masks(problem: Problem, last: float = 0.1, decay: float = 0.9) -> torch.Tensor:
    """Attribution along a path of hard masks, which keep ever fewer of the units with the greatest running score."""
    n = len(problem.units)
    total = torch.zeros(n)
    for i, batch in enumerate(problem.batches):
        gamma = torch.zeros(n)
        gamma[top(total, last ** (i / (BATCHES - 1)))] = 1
        if i == 0:
            gamma.fill_(1)
        total = decay * total - (1 - decay) * problem.gradient(gamma, batch)
    return total


def at_points(
    problem: Problem,
    points: tuple[float, ...],
    batches: int = BATCHES,
    loss: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """The mean of −∂L/∂γ with equal gates, at these values in turn, one batch each."""
    ones = torch.ones(len(problem.units))
    gradients = [
        problem.gradient(ones * points[i % len(points)], batch, loss)
        for i, batch in enumerate(problem.batches[:batches])
    ]
    return -torch.stack(gradients).mean(0)


def descent(
    problem: Problem,
    penalty: Callable[[float], float],
    start: torch.Tensor | float = 2.0,
    lr: float = 0.15,
    batches: slice = slice(BATCHES),
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
) -> torch.Tensor:
    """Descent on L + λ·mean(γ), γ = σ(s), where `penalty` gives λ for a progress from 0 to 1: s after each step."""
    n = len(problem.units)
    s = (torch.zeros(n) + start).requires_grad_()
    steps = optimizer([s], lr=lr)
    history = []
    for i, batch in enumerate(problem.batches[batches]):
        gamma = torch.sigmoid(s.detach())
        gradient = problem.gradient(gamma, batch) + penalty(i / len(problem.batches[batches])) / n
        s.grad = gradient * gamma * (1 - gamma)
        steps.step()
        history.append(s.detach().clone())
    return torch.stack(history)


def pressure(problem: Problem, **options: Any) -> torch.Tensor:
    """Descent under a fixed penalty: what all deltas together are worth."""
    return descent(problem, lambda _: problem.worth, **options)


def pressure_sgd(problem: Problem, scale: float = 1.0) -> torch.Tensor:
    """The same by plain SGD; the penalty alone moves a score by `scale`·γ(1 − γ) a step."""
    return pressure(problem, lr=scale * len(problem.units) / problem.worth, optimizer=torch.optim.SGD)


def of_the_package(problem: Problem, **settings: Any) -> torch.Tensor:
    """As `learn_gates(method="descent")`."""
    search = Descent(len(problem.units), BATCHES, **settings)
    for batch in problem.batches:
        gamma = torch.sigmoid(search.scores)
        search.step(problem.gradient(gamma, batch) * gamma * (1 - gamma))
    return search.scores


def hard_concrete(problem: Problem) -> torch.Tensor:
    """Louizos et al. 2018 (https://arxiv.org/abs/1712.01312), with λ on the expected share of gates that are not 0."""
    n = len(problem.units)
    low, high, temperature = -0.1, 1.1, 2 / 3
    generator = torch.Generator().manual_seed(0)
    s = torch.full((n,), 2.0, requires_grad=True)
    adam = torch.optim.Adam([s], lr=0.15)
    for batch in problem.batches:
        u = torch.rand(n, generator=generator).clamp(1e-6, 1 - 1e-6)
        gamma = (torch.sigmoid((u.log() - (1 - u).log() + s) / temperature) * (high - low) + low).clamp(0, 1)
        active = torch.sigmoid(s - temperature * math.log(-low / high))
        gradient = problem.gradient(gamma, batch)
        adam.zero_grad()
        ((gradient * gamma).sum() + problem.worth * active.mean()).backward()
        adam.step()
    return s.detach()


def straight_through(problem: Problem, start: torch.Tensor, share: float, batches: slice) -> torch.Tensor:
    """The forward pass has the hard top-H mask; the gradient reaches all scores as if it had not."""
    s = (start / start.std()).requires_grad_()
    adam = torch.optim.Adam([s], lr=0.1)
    for batch in problem.batches[batches]:
        gamma = torch.zeros(len(s))
        gamma[top(s.detach(), share)] = 1
        s.grad = problem.gradient(gamma, batch)
        adam.step()
    return s.detach()


def delta_norm(problem: Problem) -> torch.Tensor:
    layers = dict(problem.model.base_model.model.named_modules())
    norms = []
    for unit in problem.units:
        layer = layers[unit]
        delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        norms.append(float(delta.norm()))
    return torch.tensor(norms)


def gradient_norm(problem: Problem, batches: int = 8) -> torch.Tensor:
    """‖∂L/∂W‖_F of the base model."""
    model = base_model().eval()
    weights = [model.get_submodule(unit).weight for unit in problem.units]
    for batch in problem.batches[:batches]:
        problem.cost += 1
        model(**batch, use_cache=False).loss.backward(inputs=weights)
    return torch.stack([weight.grad.norm() for weight in weights])


def kappa_tune(problem: Problem) -> torch.Tensor:
    """PEFT's KappaTune: the smaller the condition number of W, the better a target."""
    order = KappaTuneSelector(base_model(), show_progress=False).get_best_targets()
    return torch.tensor([-float(order.index(unit)) for unit in problem.units])


def random_scores(problem: Problem, draw: int) -> torch.Tensor:
    return torch.rand(len(problem.units), generator=torch.Generator().manual_seed(draw))


def zscore(scores: torch.Tensor) -> torch.Tensor:
    return (scores - scores.mean()) / scores.std()


SECOND_HALF = slice(BATCHES // 2, BATCHES)
ESTIMATORS: dict[str, Callable[[Problem], torch.Tensor]] = {
    "first order at γ = 0": lambda p: at_points(p, (0.0,)),
    "path": lambda p: at_points(p, PATH),
    "path, loss per example": lambda p: at_points(p, PATH, loss=p.loss_per_example),
    "random masks": random_masks,
    "shrinking masks": shrinking_masks,
    "path of 1 point": lambda p: at_points(p, (1 / 2,)),
    "path of 2 points": lambda p: at_points(p, (1 / 4, 3 / 4)),
    "path of 8 points": lambda p: at_points(p, tuple((i + 1 / 2) / 8 for i in range(8))),
    "path 16 + pressure 16": lambda p: pressure(
        p, start=zscore(at_points(p, PATH, BATCHES // 2)), batches=SECOND_HALF
    )[-1],
    "path 16 + straight-through 16 at 30 %": lambda p: straight_through(
        p, at_points(p, PATH, BATCHES // 2), 0.3, SECOND_HALF
    ),
    "pressure": lambda p: pressure(p)[-1],
    "pressure, SGD": lambda p: pressure_sgd(p)[-1],
    "annealed pressure": lambda p: descent(p, lambda progress: 2 * progress * p.worth)[-1],
    "descent, budget 30 %": lambda p: of_the_package(p, budget=0.3, learning_rate=0.3),
    "hard-concrete": hard_concrete,
    "plain descent from s = 4": of_the_package,
    "first order at γ = 1": lambda p: at_points(p, (1.0,)),
    "norm of ΔW": delta_norm,
    "gradient norm": gradient_norm,
    "KappaTune": kappa_tune,
    "first": lambda p: torch.arange(len(p.units), 0, -1.0),
    "last": lambda p: torch.arange(float(len(p.units))),
    "random 0": lambda p: random_scores(p, 0),
    "random 1": lambda p: random_scores(p, 1),
    "random 2": lambda p: random_scores(p, 2),
}
LAYERS_TOO = ("first order at γ = 0", "path", "norm of ΔW")  # the others keep less at the same share of modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], help="JSONL files with `messages`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60, help="the steps of stage 1")
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    parser.add_argument(
        "--adapters", type=Path, default=Path("adapters"), help="the directory of the adapters of stage 1"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="the directory of the figures of each run")
    args = parser.parse_args()

    for seed, data in itertools.product(args.seeds, args.data):
        file = args.output_dir / f"{Path(data).stem}_{seed}.json"
        run = json.loads(file.read_text()) if file.exists() else {"estimators": {}}
        todo = [estimator for estimator in args.estimators if not complete(run, estimator)]
        if not todo:
            continue
        problem = Problem(data, seed, args.steps, args.adapters / file.stem, BATCHES)
        run |= {"units": problem.units, "loss_base": problem.loss_closed, "loss_tuned": problem.loss_open}
        for estimator in todo:
            found = run["estimators"].get(estimator, {})
            if not found:
                problem.cost = 0
                scores = ESTIMATORS[estimator](problem)
                found = {"cost": problem.cost, "scores": scores.tolist()}
                found["kept"] = [problem.kept(scores, share) for share in SHARES]
            if estimator in LAYERS_TOO:
                scores = torch.tensor(found["scores"])
                found["kept_layers"] = [problem.kept(problem.of_layers(scores), share) for share in SHARES[:2]]
            run["estimators"][estimator] = found
            save(file, run)
            print(file.stem, estimator, [round(kept, 3) for kept in found["kept"]], flush=True)
    print_tables({file.stem: json.loads(file.read_text()) for file in sorted(args.output_dir.glob("*.json"))})


def complete(run: dict[str, Any], estimator: str) -> bool:
    found = run["estimators"].get(estimator, {})
    return bool(found) and (estimator not in LAYERS_TOO or "kept_layers" in found)


def print_tables(runs: dict[str, Any]) -> None:
    shares = [f"{share:.0%}" for share in SHARES]
    table("run", ["estimator", *shares, *(f"layers {share}" for share in shares[:2])])
    for name, run in runs.items():
        for estimator, found in run["estimators"].items():
            row(name, estimator, *found["kept"], *found.get("kept_layers", []))

    table("estimator", ["mean of runs", *shares])
    for estimator in ESTIMATORS:
        kept = [run["estimators"][estimator]["kept"] for run in runs.values() if estimator in run["estimators"]]
        if kept:
            row(estimator, len(kept), *map(statistics.mean, zip(*kept)))

    table("estimator", ["pairs of rankings", "n", "overlap@75", "overlap@30", "Spearman"])
    for estimator, layers in itertools.product(ESTIMATORS, (False, True)):
        rankings = {
            name: ranking(run, estimator, layers) for name, run in runs.items() if estimator in run["estimators"]
        }
        units = "layers" if layers else "modules"
        for label, figures in agreements(rankings).items():
            row(f"{estimator} ({units})", label, len(figures), *map(statistics.mean, zip(*figures)))

    for name, run in runs.items():
        estimators = [estimator for estimator in ESTIMATORS if estimator in run["estimators"]]
        if len(estimators) < 5:
            continue
        table(f"{name}: Spearman / overlap@30", [str(i) for i in range(len(estimators))])
        for i, a in enumerate(estimators):
            pairs = [agreement(ranking(run, a), ranking(run, b)) for b in estimators]
            row(f"{i} {a}", *(f"{figures[2]:.2f} / {figures[1]:.2f}" for figures in pairs))


def ranking(run: dict[str, Any], estimator: str, layers: bool = False) -> LayerImportance:
    scores = dict(zip(run["units"], run["estimators"][estimator]["scores"]))
    if layers:
        scores = by_layer(scores)
    return LayerImportance(list(scores), list(scores.values()))


def agreements(rankings: dict[str, LayerImportance]) -> dict[str, list[tuple[float, float, float]]]:
    """Between two seeds, between two data sets, and between data sets after averaging over the seeds of each."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for (name, a), (other, b) in itertools.combinations(rankings.items(), 2):
        one, two = name.rpartition("_")[0], other.rpartition("_")[0]
        labels = ("two seeds", f"two seeds of {one}") if one == two else ("two data sets", f"{one}, {two}")
        for label in labels:
            found.setdefault(label, []).append(agreement(a, b))
    by_set = itertools.groupby(rankings, lambda name: name.rpartition("_")[0])
    means = {data: average([rankings[name] for name in names]) for data, names in by_set}
    if len(means) < len(rankings):
        for (one, a), (two, b) in itertools.combinations(means.items(), 2):
            found[f"{one}, {two}, means over seeds"] = [agreement(a, b)]
    return found


def average(rankings: list[LayerImportance]) -> LayerImportance:
    scores = torch.stack([zscore(torch.tensor(ranking.scores)) for ranking in rankings])
    return LayerImportance(rankings[0].units, scores.mean(0).tolist())


def agreement(a: LayerImportance, b: LayerImportance) -> tuple[float, float, float]:
    return a.overlap(b, 0.75), a.overlap(b, 0.3), a.spearman(b)


def table(first: str, columns: list[str]) -> None:
    print(f"\n| {first} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")


def row(*cells: Any) -> None:
    print("| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


if __name__ == "__main__":
    main()
