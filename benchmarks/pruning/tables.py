"""
Write the tables and pictures of pruning into the pages that have marks for them.

    python -m benchmarks.pruning.tables benchmarks/results/pruning benchmarks/results/pruning_{gemma,r16,r64} \
        --into README.md docs/choosing.md docs/reproduction.md docs/appendix/pruning.md \
        docs/appendix/cost.md --pictures docs
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.pruning.figures import BOTH, REPORTED, Arm, Figures
from benchmarks.pruning.run import CHECKPOINTS, FACTORS, STEPS, TEXTS
from benchmarks.record import table
from benchmarks.study.claims import Claim
from benchmarks.study.figures import NAMES, Estimate, Run, Value, estimate, less
from benchmarks.study.figures import Figures as Study
from benchmarks.study.tables import insert
from peft_ila.files import whole_file
from peft_ila.ranking.comparison import mean_and_error, spearman
from peft_ila.ranking.plotting import heatmap, new_figure, write

MADE_BY = "benchmarks/pruning/tables.py"
SHARES = (0.02, 0.05, 0.125, 0.25, 0.5, 0.75)
COST, STUDY = Path("benchmarks/results/pruning_cost.json"), Path("benchmarks/results/study")
WHOLE, TWENTIETH, EIGHTH = ("whole", 1.0), 0.05, 0.125
PRUNED = "rounds, gates"  # what `peft-ila prune` does
LABELS = {
    "base": "no adapter",
    PRUNED: "attribution, three rounds, learned gates (`peft-ila prune`)",
    "rounds": "attribution, three rounds, gates of 1",
    "attribution": "attribution, one round, gates of 1",
    "singular value, gates": "singular values, learned gates",
    "singular value": "singular values, gates of 1",
    "same rank, gates": "one rank for all modules, learned gates",
    "same rank": "one rank for all modules, gates of 1",
    "whole modules": "whole modules by attribution, gates of 1",
    "whole layers": "whole decoder layers by attribution, gates of 1",
    "random": "random directions, gates of 1",
    "attribution, 4 batches": "attribution on 4 batches instead of 16, one round, gates of 1",
    "attribution, 8 batches": "attribution on 8 batches, one round, gates of 1",
    "attribution, 32 batches": "attribution on 32 batches, one round, gates of 1",
    "all, gates": "all directions, learned gates",
} | {f"step {step}": f"the adapter after {step} of {STEPS} steps" for step in CHECKPOINTS}
PARTS = {
    "all": "LoRA on all modules",
    "rank 1": "LoRA of rank 1 on all modules",
    "best modules": "LoRA on the best modules, 30 %",
    "last layers": "LoRA on the last layers, 30 %",
    "first layers": "LoRA on the first layers, 30 %",
    "all weights": "all weights of the linear modules",
    "best weights": "those of the best modules, the rest frozen",
}
KEPT = ("rounds", EIGHTH)
QUARTER = ("attribution", 0.25)  # measured where all of the curve is
TIMES: list[Arm] = [WHOLE, *((f"times {factor}", 1.0) for factor in FACTORS)]
ON_THE_WAY: list[Arm] = [WHOLE, *((f"step {step}", 1.0) for step in CHECKPOINTS)]
CLOSED: list[Arm] = [WHOLE, *((rule, share) for rule in ("attribution", "rounds", PRUNED) for share in SHARES)]


def curves(models: list[Figures]) -> None:
    """What each rule keeps at each share."""
    figures = models[0]

    def row(arm: str) -> list[Any]:
        return [LABELS[arm], *(figures.estimate((arm, share), beside=QUARTER) for share in SHARES)]

    table(["kept of the gain, at this share of the parameters", *map(percent, SHARES)], filled(map(row, LABELS)))


def by_set(models: list[Figures]) -> None:
    """The main arms of each model, a column for each set: the mean over its seeds."""
    for figures in models:
        _by_set(figures)


def _by_set(figures: Figures) -> None:
    arms: list[Arm] = [
        (PRUNED, TWENTIETH),
        ("rounds", TWENTIETH),
        ("singular value, gates", TWENTIETH),
        ("singular value", TWENTIETH),
        (PRUNED, EIGHTH),
        ("singular value, gates", EIGHTH),
        ("same rank, gates", EIGHTH),
        ("same rank", EIGHTH),
        *((f"attribution, {batches} batches", TWENTIETH) for batches in (4, 8, 32)),
        ("attribution", TWENTIETH),
        ("all, gates", 1.0),
        *TIMES[1:],
        *ON_THE_WAY[1:],
        *trained_ranks(figures),
    ]
    runs_of = {data: [run for run in figures.runs if run[0] == data] for data, _ in figures.runs}

    def cells(value: Value) -> list[Estimate | None]:
        return [estimate(value, runs) for runs in runs_of.values()]

    def row(arm: Arm) -> list[Any]:
        name, share = arm
        kept, mean = cells(functools.partial(figures.kept, arm)), figures.estimate(arm)
        return [LABELS.get(name, name), percent(share), mean and mean.runs, *kept, mean]

    def losses(arm: Arm) -> list[Any]:
        return [len(figures.runs), *cells(functools.partial(figures.loss, arm, halves=BOTH)), None]

    rows = [["held-out loss without the adapter", "", *losses(("base", 0.0))]]
    rows += [["held-out loss with it", "", *losses(WHOLE)], *map(row, arms)]
    print(f"**{figures.name}**\n")
    names = [NAMES[data] for data in runs_of]
    table(["kept of the gain", "parameters", "runs", *names, "mean"], (x for x in rows if any(x[2:])))


def trained_ranks(figures: Figures) -> list[Arm]:
    """LoRA on all modules at other ranks."""
    return sorted({key[:2] for key in figures.rows if key[0].startswith("rank ")}, key=lambda arm: (arm[1], arm[0]))


def claims_of(figures: Figures) -> list[tuple[Claim, Estimate | None]]:
    """The bars, with what was found."""

    def kept(name: str, share: float, halves: tuple[int, ...] = BOTH) -> Value:
        return lambda run: figures.kept((name, share), run, halves)

    def minus(rule: str, rival: str, share: float) -> Value:
        return less(kept(rule, share), kept(rival, share))

    whole_curve = figures.having(QUARTER)

    def closed(run: Run) -> float | None:
        return figures.best(CLOSED, run) if run in whole_curve else None  # elsewhere few shares were tried

    scaled, on_the_way = (functools.partial(figures.best, arms) for arms in (TIMES, ON_THE_WAY))
    value, gated, rank_1 = "singular value", "singular value, gates", figures.tuned("rank 1", EIGHTH)
    found: list[tuple[str, float, Value]] = [
        ("5 % of an adapter's parameters keep 0.95 of its gain", 0.95, kept(PRUNED, TWENTIETH)),
        ("12.5 % keep all of it", 1.0, kept(PRUNED, EIGHTH)),
        ("5 %: by attribution minus by singular value, gates of 1", 0.0, minus("rounds", value, TWENTIETH)),
        ("5 %: the same, gates learned on both sides", 0.0, minus(PRUNED, gated, TWENTIETH)),
        ("12.5 %: by attribution minus by singular value, gates of 1", 0.0, minus("rounds", value, EIGHTH)),
        ("12.5 %: the same, gates learned on both sides", 0.0, minus(PRUNED, gated, EIGHTH)),
        ("12.5 %: minus one rank for all modules, gates of 1", 0.0, minus("rounds", "same rank", EIGHTH)),
        ("12.5 %: the same, gates learned on both sides", 0.0, minus(PRUNED, "same rank, gates", EIGHTH)),
        ("12.5 %: pruned minus LoRA trained at rank 1", 0.0, less(kept(PRUNED, EIGHTH, REPORTED), rank_1)),
        ("the best share of directions minus the whole adapter", 0.0, less(closed, kept(*WHOLE, REPORTED))),
        ("the same, minus the whole adapter times the best factor", 0.0, less(closed, scaled)),
        ("the same, minus the best checkpoint of the training", 0.0, less(closed, on_the_way)),
    ]
    rows = [(Claim(text, "", lambda _: None, target), estimate(value, figures.runs)) for text, target, value in found]
    alike = agreement(figures, KEPT, figures.pairs()[1])
    own = Estimate(*mean_and_error(alike), len(alike)) if len(alike) > 1 else None
    text = "12.5 %: the kept ranks of the modules agree between two data sets (Spearman; n is pairs)"
    return [*rows, (Claim(text, "", lambda _: None, 0.9, floor=0.0), own)]


def verdicts(models: list[Figures]) -> None:
    """Whether each bar is met."""
    rows = []
    for found in zip(*map(claims_of, models)):
        claim = found[0][0]
        cells = [f"{own} ({own.runs}): {claim.verdict(own)}" if own else "not run" for _, own in found]
        rows.append([claim.text, f"above {claim.target:g}", *cells])
    table(["claim", "bar", *(f"{figures.name} (runs)" for figures in models)], rows)


def parts(models: list[Figures]) -> None:
    """LoRA trained on a part of the modules or at a lower rank, against pruning."""
    figures = models[0]
    names = [(f"{method}, rank 1", EIGHTH) for method in ("EVA", "AdaLoRA")]
    names += [("last layers", 0.3), ("first layers", 0.3), ("best modules", 0.3), ("best modules", 0.1)]
    pruned = functools.partial(figures.kept, (PRUNED, EIGHTH))
    rows = []
    for arm in [*trained_ranks(figures), *(arm for name in names for arm in figures.trained(*name))]:
        kept = functools.partial(figures.kept, arm)
        own = estimate(kept, figures.runs)
        ahead = estimate(less(kept, pruned), figures.runs) if arm[1] == EIGHTH else None
        rows.append([*arm[0].split(" at "), percent(arm[1]), own and own.runs, own, ahead])
    gained = ("gained, of r = 8 on all", "minus r = 8 pruned to as much")
    table(["LoRA trained on", "learning rate", "parameters", "runs", *gained], rows)


def texts(models: list[Figures]) -> None:
    """The perplexity of plain text, in per cent of the base model's."""
    figures = models[0]
    arms = list(dict.fromkeys(key[:2] for key, row in figures.rows.items() if "texts" in row and key[1] > 0))

    def change(arm: Arm, text: str, run: Run) -> float | None:
        rows = [figures.rows.get((*own, *run)) for own in (arm, ("base on text", 0.0))]
        own, base = (row and row["texts"][text] for row in rows)
        return None if own is None or base is None else 100 * math.expm1(own - base)

    def row(arm: Arm) -> list[Any]:
        cells = [estimate(functools.partial(change, arm, text), figures.runs) for text in TEXTS]
        name = arm[0].removesuffix(" on text")
        return [LABELS.get(name, name), percent(arm[1]), cells[0] and cells[0].runs, *cells]

    table(["adapter", "parameters", "runs", *(f"{NAMES[text]}, %" for text in TEXTS)], map(row, arms))


def tasks(models: list[Figures]) -> None:
    """The accuracies of lm-eval, in per cent."""
    rows = [(key, row["accuracies"]) for key, row in models[0].rows.items() if "accuracies" in row]
    columns = ("hellaswag acc_norm", "arc_easy acc", "piqa acc")

    def cells(key: tuple[str, float, str, int], found: dict[str, float]) -> list[Any]:
        name = key[0].removesuffix(" on tasks")
        return [NAMES[key[2]], LABELS.get(name, name), percent(key[1]), *(f"{100 * found[x]:.1f}" for x in columns)]

    titles = ("HellaSwag (`acc_norm`)", "ARC-easy (`acc`)", "PIQA (`acc`)")
    table(["tuned on", "adapter", "parameters", *titles], itertools.starmap(cells, rows))


def structure(models: list[Figures]) -> None:
    """Do the kept directions lie in the same modules?"""
    figures = models[0]
    rows: list[list[Any]] = []
    seeds, sets = figures.pairs()
    for arm, pairs, label in (
        (KEPT, seeds, "with another seed"),
        (KEPT, sets, "on another set"),
        (QUARTER, sets, "on another set"),
    ):
        if found := agreement(figures, arm, pairs):
            cells = [percent(arm[1]), len(found), statistics.mean(found), min(found)]
            rows.append([f"the kept rank {label}", *cells])
    own = [value for run in figures.runs if (value := with_worth(figures, run)) is not None]
    rows.append(["the module's worth for each parameter", percent(EIGHTH), len(own), statistics.mean(own), min(own)])
    table(["kept rank of a module, and", "kept of the parameters", "n", "Spearman, mean", "least"], rows)
    print(f"The mean kept rank by kind of module, with {percent(TWENTIETH)} of the parameters kept:\n")
    found_ranks = [ranks(own, ("rounds", TWENTIETH)) for own in models]
    kinds = dict.fromkeys(name.rsplit(".", 1)[1] for name in found_ranks[0])

    def row(kind: str) -> list[Any]:
        means = (statistics.mean(v for name, v in own.items() if name.endswith(f".{kind}")) for own in found_ranks)
        return [f"`{kind}`", *(f"{mean:.2f}" for mean in means)]

    table(["module", *(f"{own.name} (runs: {len(own.runs)})" for own in models)], map(row, kinds))


def agreement(figures: Figures, arm: Arm, pairs: list[tuple[Run, Run]]) -> list[float]:
    """Spearman correlations between the kept ranks of the modules in two runs."""
    known = [(figures.ranks(arm, one), figures.ranks(arm, other)) for one, other in pairs]
    return [spearman(one, other) for one, other in known if one and other]


def with_worth(figures: Figures, run: Run) -> float | None:
    """Spearman between the kept rank of the modules and the sum of their directions' worth, for each parameter."""
    kept, whole = figures.ranks(KEPT, run), figures.rows.get((*WHOLE, *run))
    if kept is None or whole is None:
        return None
    worth = whole["worth"]
    sums = [sum(worth[i * figures.rank : (i + 1) * figures.rank]) for i in range(len(kept))]
    return spearman(kept, [own / size for own, size in zip(sums, figures.units.values())])


def ranks(figures: Figures, arm: Arm) -> dict[str, float]:
    """The mean kept rank of each module over the runs."""
    found = [own for run in figures.runs if (own := figures.ranks(arm, run))]
    return {name: statistics.mean(values) for name, values in zip(figures.units, zip(*found))}


def draw(models: list[Figures], directory: Path) -> None:
    """The curves of the first model, and where its kept directions lie."""
    figures = models[0]
    path = directory / "pruning.png"
    figure = new_figure(path)
    figure.set_size_inches(9, 3.8)
    axes = figure.subplots()

    for number, (arm, label) in enumerate(LABELS.items()):
        points = [(100 * share, own) for share in SHARES if (own := figures.estimate((arm, share), beside=QUARTER))]
        if arm == "rounds" or "batches" in arm or not points:
            continue
        style = {"color": f"C{number}", "marker": "o", "markersize": 3, "linewidth": 2.5 if arm == PRUNED else 1.2}
        x, y = [x for x, _ in points], [own.mean for _, own in points]
        axes.errorbar(x, y, [own.error or 0 for _, own in points], label=label.replace("`", ""), capsize=2, **style)
    drawn_runs = figures.having(QUARTER)
    lower = {rank: estimate(figures.tuned(f"rank {rank}", rank / figures.rank), drawn_runs) for rank in (1, 2, 4)}
    stars = {rank: own for rank, own in lower.items() if own}
    axes.errorbar(
        [100 * rank / figures.rank for rank in stars],
        [own.mean for own in stars.values()],
        [own.error or 0 for own in stars.values()],
        fmt="k*",
        markersize=11,
        markerfacecolor="none",
        label=f"LoRA trained at rank {', '.join(f'{rank} ({own.runs} sets)' for rank, own in stars.items())}",
    )
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xticks([100 * share for share in (*SHARES, 1)], [f"{100 * share:g}" for share in (*SHARES, 1)])
    axes.minorticks_off()
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("kept of the adapter's parameters, %")
    axes.set_ylabel("kept of its gain in held-out loss")
    sets = len({data for data, _ in drawn_runs})
    axes.set_title(f"{figures.name}, LoRA r = {figures.rank}, {sets} data sets", fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    write(figure, path)
    found = ranks(figures, KEPT)
    title = f"Kept rank of each module, {percent(EIGHTH)} of the parameters, mean of {len(figures.runs)} runs"
    heatmap(found, f"kept of {figures.rank} directions", title, directory / "ranks.png")


def draw_prices(figures: Figures, path: Path) -> None:
    """The gain against the cost of a step, with what no other part beats at its cost."""
    costs = json.loads(COST.read_text())["steps"]
    points = {name: gain for name, gain in prices(figures).items() if gain}
    figure = new_figure(path)
    figure.set_size_inches(9.5, 3.2)
    for axes, what, label in zip(figure.subplots(1, 2, sharey=True), ("bytes", "time"), ("activations", "time")):
        for (name, gain), marker in zip(points.items(), "o*sv^DP"):
            style = {"fmt": marker, "capsize": 2, "label": PARTS[name]}
            axes.errorbar(costs[name][what], gain.mean, gain.error or 0, **style)
        front = [
            (costs[name][what], gain.mean)
            for name, gain in points.items()
            if all(other.mean <= gain.mean or costs[n][what] > costs[name][what] for n, other in points.items())
        ]
        axes.step(*zip(*sorted(front)), where="post", color="grey", linewidth=0.8)
        axes.set_xlim(0, 1.15)
        axes.margins(y=0.15)
        axes.set_xlabel(f"{label} of a step, compared with LoRA on all modules", fontsize=8)
    figure.axes[0].set_ylabel("held-out gain, of LoRA on all", fontsize=8)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    write(figure, path)


def percent(share: float) -> str:
    """As text."""
    return f"{100 * share:g} %"


def filled(rows: Any) -> Any:
    """Those with a figure."""
    return (row for row in rows if any(row[1:]))


def choice(models: list[Figures]) -> None:
    """What to do, by what a user has."""
    figures = models[0]
    cost = json.loads(COST.read_text())["steps"]

    def costs(name: str) -> str:
        return f"{cost[name]['bytes']:.2f} of the activations and {cost[name]['time']:.2f} of the time"

    gained = prices(figures)
    seeds, sets = (statistics.mean(agreement(figures, KEPT, pairs)) for pairs in figures.pairs())
    rows = [
        [
            "**a trained LoRA adapter**",
            "[prune it](docs/howto/prune.md): `peft-ila prune`",
            f"5 % of its parameters keep {figures.estimate((PRUNED, TWENTIETH))} of its gain, 12.5 % keep "
            f"{figures.estimate((PRUNED, EIGHTH))}, for the cost of 72 training steps",
        ],
        [
            "**a limit on memory or time**",
            "[plan it](docs/howto/memory.md); NF4 and checkpointing first, the last layers if nothing else fits",
            f"the last 30 % of the layers gain {gained['last layers']} of LoRA on all for {costs('last layers')}; "
            f"the best 30 % of the modules gain {gained['best modules']} for {costs('best modules')}",
        ],
        [
            "**a budget of parameters**",
            "LoRA on all modules at a lower rank, or train r = 8 and prune",
            f"rank 1 has an eighth of the parameters of r = 8 and gains {gained['rank 1']} of what r = 8 gains, "
            "at a higher learning rate",
        ],
        [
            "**a wish to understand**",
            "[rank the adapter](docs/howto/adapter.md): `peft-ila rank --adapter`",
            "a heatmap of what fine-tuning changed *here*: the kept ranks of the modules have a Spearman "
            f"correlation of {sets:.2f} between two data sets, and of {seeds:.2f} between two seeds",
        ],
    ]
    table(["you have", "do this", "what to expect"], rows)


def price(models: list[Figures]) -> None:
    """What LoRA on a part gains, and what a step of it costs."""
    cost = json.loads(COST.read_text())["steps"]
    rows = []
    for name, gain in prices(models[0]).items():
        own = cost[name]
        state = own["trained"] * 12 / 1e6  # a gradient and two moments in fp32
        shown = (f"{own['trained'] / 1e6:.2f}", f"{state:.0f}", f"{own['bytes']:.2f}", f"{own['time']:.2f}")
        rows.append([PARTS[name], gain and gain.runs, gain or "not run", *shown])
    costs = ("trained, millions", "gradients and AdamW, MB", "activations of a step", "its time")
    table(["tuned", "runs", "gained, of LoRA on all", *costs], rows)


def prices(figures: Figures) -> dict[str, Estimate | None]:
    """The gain at the best rate of what `cost.py` measured. That of full fine-tuning is the other study's."""
    arms = (("rank 1", EIGHTH), ("best modules", 0.3), ("last layers", 0.3), ("first layers", 0.3))
    found = {name: estimate(figures.tuned(name, share), figures.runs) for name, share in arms}
    study = Study.load(STUDY)
    for name, group in (("all weights", "weights 100"), ("best weights", "weights 75")):
        found[name] = estimate(functools.partial(study.gained, group, "full search"))
    return {"all": figures.estimate(WHOLE)} | found


def serving(models: list[Figures]) -> None:
    """What an adapter costs that is not merged."""
    costs = json.loads(COST.read_text())["served"]
    rows = (
        [
            name,
            own.get("modules", 0),
            f"{own.get('bytes', 0) / 1e6:.2f}",
            f"{own['prompt']:.2f}",
            f"{own['token']:.2f}",
        ]
        for name, own in costs.items()
    )
    table(["adapter", "modules", "file, MB", "time of a prompt", "of a token"], rows)


TABLES = {
    "the price": price,
    "serving": serving,
    "the choice": choice,
    "the pruning bars": verdicts,
    "the curves": curves,
    "the sets": by_set,
    "the parts": parts,
    "plain text": texts,
    "the tasks": tasks,
    "the structure": structure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="directories of results, one per model")
    parser.add_argument("--into", type=Path, nargs="+", default=[], help="the pages with the marks")
    parser.add_argument("--pictures", type=Path, help="the directory for the pictures")
    args = parser.parse_args()
    models = [Figures.load(results) for results in args.results]
    for path in args.into:
        page = insert(path.read_text(encoding="utf-8"), models, TABLES, MADE_BY)
        with whole_file(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    if args.pictures:
        draw(models, args.pictures)
        draw_prices(models[0], args.pictures / "prices.png")
    if not args.into:
        for name, write_table in TABLES.items():
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                write_table(models)
            print(f"## {name}\n\n{output.getvalue()}")


if __name__ == "__main__":
    main()
