"""
Write the study's tables, as Markdown, between the marks in `docs/choosing.md` and `docs/reproduction.md`.

    python -m benchmarks.study.tables benchmarks/results/study benchmarks/results/study_gemma \
        --into docs/choosing.md docs/reproduction.md
"""

import argparse
import collections
import contextlib
import functools
import io
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import table
from benchmarks.study import claims
from benchmarks.study.arms import ALIGNMENT, BOTH, CHANCE, SEEDS, SETS, TUNING_SEED, TUNING_SETS
from benchmarks.study.figures import LORA, NAMES, RUNS, Figures, Run, difference, estimate, mean, nearness
from benchmarks.study.run import TEXTS
from peft_ila.files import whole_file

BEGIN, END = "<!-- {}, made by {} -->\n", "<!-- end -->"
INTRODUCTION = """
"Gained" is the gain in held-out loss as a share of the gain of LoRA on all modules (r = 8). A run is one data set with
one seed. Means are taken over the seeds of a set, then over the sets. ± is the standard error over the sets, of which
there are few: three, or five where a ranking is used on another set. Comparisons use paired differences. "random" is
the mean of five draws for 30 % of SmolLM2's modules on the alignment sets, and one draw elsewhere.
"""
TASKS = (("HellaSwag, norm.", "hellaswag acc_norm"), ("ARC-easy", "arc_easy acc"), ("PIQA", "piqa acc"))


def searches(figures: Figures, group: str, title: str) -> None:
    """The arms of one group against the full search and against chance."""
    arms = [arm for arm in figures.arms(group) if not arm.startswith("of ")]
    if not arms:
        return
    print(f"### {title}\n")

    def row(arm: str) -> list[Any]:
        gained = functools.partial(figures.gained, group, arm)
        by_set = [estimate(gained, [(data, seed) for seed in SEEDS]) for data in ALIGNMENT]
        cells = [x and f"{x.mean:.3f}" + ("" if x.runs == len(SEEDS) else f" ({x.runs})") for x in by_set]
        own = estimate(gained)
        against = [figures.less(group, arm, (group, other)) for other in ("full search", "random")]
        return [arm, own.runs if own else 0, own, *cells, *against]

    columns = ["ranking", "runs", "gained", *(NAMES[data] for data in ALIGNMENT)]
    table([*columns, "minus the full search", "minus random"], map(row, arms))


def carried(figures: Figures) -> None:
    """Rankings of one set, tuned on another."""
    print("### Does a ranking work on other data? (modules, 30 % of the parameters)\n")
    group = "modules 30"

    def row(label: str, arm: str, runs: list[Run]) -> list[Any]:
        cells = [mean(figures.gained(group, arm, (data, seed)) for seed in SEEDS) for data in SETS]
        return [label, *cells, figures.less(group, arm, (group, "full search"), runs)]

    every = list(itertools.product(SETS, SEEDS))
    rows = [row("the set's own", "full search", [])]
    rows += [
        row(f"of {NAMES[data]}", f"of {data}", [run for run in every if run[0] != data])
        for data in SETS
        if f"of {data}" in figures.arms(group)
    ]
    rows += [row(arm, arm, every) for arm in ("mean of other sets", "random")]
    table(["ranking", *(f"tuned on {NAMES[data]}" for data in SETS), "minus the set's own"], rows)


def budgets(figures: Figures) -> None:
    """Everything that was tuned, with its parameters."""
    print("### At equal and at fewer parameters\n")
    shown = ("again", *BOTH, "random", "bottom", "uniform", "EVA", "AdaLoRA")
    rows = []
    for group in dict.fromkeys(key[0] for key in figures.tuned):
        for arm in (arm for arm in figures.arms(group) if arm in shown):
            own = estimate(functools.partial(figures.gained, group, arm))
            draws = itertools.product(CHANCE if arm == "random" else (arm,), RUNS)
            found = [figures.tuned[key] for draw, run in draws if (key := (group, draw, *run)) in figures.tuned]
            parameters, rate = statistics.mean(x["parameters"] for x in found), found[0]["learning_rate"]
            number = own.runs if own else 0
            rows.append([group, arm, f"{rate:g}", f"{parameters:,.0f}", number, own, figures.less(group, arm)])
    columns = ["group", "ranking", "learning rate", "parameters", "runs", "gained", "minus LoRA on all"]
    table(columns, rows)


def forgetting(figures: Figures) -> None:
    """A part frozen, against LoRA on all: the gain, the perplexity of plain text, and the tasks of lm-eval."""
    print("### Freezing a part: gain and forgetting\n")
    tasks = TASKS if figures.untuned.get("accuracies") else ()
    lora = {text: figures.known(LORA, "perplexities", text) for text in TEXTS}
    lora |= {name: figures.known(("all", "again"), "accuracies", name) for _, name in tasks}
    base = {text: {run: figures.base[run]["perplexities"][text] for run in RUNS} for text in TEXTS}
    before = [f"{_perplexity(lora[text])} (before tuning {_perplexity(base[text])})" for text in TEXTS]
    print("Each figure is the change against LoRA on all in the same runs: in perplexity", end="")
    if tasks:
        print(", and in accuracy by lm-eval on 1,000 questions each (one model: ± 0.015)", end="")
    print(f". LoRA's own perplexities are {' and '.join(before)}", end="")
    if tasks:
        known = [f"{estimate(lora[name].get)} ({figures.untuned['accuracies'][name]:.3f})" for _, name in tasks]
        print(f", its accuracies (before tuning) {', '.join(known)}", end="")
    print(".\n")
    rows = []
    for group, arm in dict.fromkeys(key[:2] for key in figures.tuned):
        own = {text: figures.known((group, arm), "perplexities", text) for text in TEXTS}
        if group == "all" or not own[TEXTS[0]]:
            continue
        changes = [estimate(_change(own[text], lora[text]).get) for text in TEXTS]
        kept = [difference(figures.known((group, arm), "accuracies", n).get, lora[n].get) for _, n in tasks]
        rows.append([group, arm, len(own[TEXTS[0]]), figures.less(group, arm), *changes, *kept])
    columns = [*(f"{NAMES[text]}, %" for text in TEXTS), *(name for name, _ in tasks)]
    table(["tuned", "ranking", "runs", "gained, minus LoRA on all", *columns], rows)


def _change(losses: dict[Run, float], others: dict[Run, float]) -> dict[Run, float]:
    """The change in perplexity, in per cent."""
    return {run: 100 * math.expm1(loss - others[run]) for run, loss in losses.items() if run in others}


def _perplexity(losses: dict[Run, float]) -> str:
    """The mean of the runs'."""
    return f"{statistics.mean(map(math.exp, losses.values())):.2f}"


def agreement(figures: Figures) -> None:
    """How much rankings of different data have in common."""
    print("### Are the important units the same?\n")
    print("A layer's score is the sum of its modules' scores. Pairs of two sets share the seed and the initial A.\n")
    rows = [
        [search, "layers" if layers else "modules", label, len(own[0]), *map(statistics.mean, own)]
        for search, layers in itertools.product(BOTH, (False, True))
        for label, own in figures.overlaps(layers, search).items()
    ]
    table(["search", "units", "pairs of rankings", "n", "overlap@75", "overlap@30", "Spearman"], rows)
    print("The overlap is the intersection over the union; by chance it is 0.60 and 0.18.\n")


def others(figures: Figures) -> None:
    """How near the other searches come to the full search of the same run."""
    print("### How close do other rankings come to the full search's?\n")
    rows = []
    for name in dict.fromkeys(name for _, _, name in figures.scores if name != "full search"):
        found: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
        for run, layers in itertools.product(itertools.product(SETS, SEEDS), (False, True)):
            own, full = figures.ranking(run, name, layers), figures.ranking(run, "full search", layers)
            if own and full:
                found[layers].append(nearness(own, full))
        modules, whole = (list(map(statistics.mean, zip(*found[layers]))) for layers in (False, True))
        # all modules of a layer have the same score by aletheia-lora
        rows.append([name, len(found[True]), *([None] * 3 if name == "aletheia-lora" else modules), *whole])
    rows.sort(key=lambda row: -row[-1])
    numbers = ("overlap@75", "overlap@30", "Spearman")
    table(["search", "runs", *(f"{what}: {n}" for what in ("modules", "layers") for n in numbers)], rows)


def rates(figures: Figures) -> None:
    """The sweeps by which learning rates were chosen."""
    sets = ", ".join(NAMES[data] for data in TUNING_SETS)
    print(f"### Learning rates\n\nMean held-out loss of {sets}, seed {TUNING_SEED}. The best rate is bold.\n")
    by_group: dict[str, dict[float, list[float]]] = {}
    for row in figures.swept:
        by_group.setdefault(row["group"], {}).setdefault(row["learning_rate"], []).append(row["loss"])
    columns = sorted({rate for own in by_group.values() for rate in own})
    rows = []
    for group, own in by_group.items():
        means = {rate: statistics.mean(x) for rate, x in own.items() if len(x) == len(TUNING_SETS)}
        best = min(means.values(), default=None)
        cells = [means.get(rate) for rate in columns]
        rows.append([group, *(x and (f"**{x:.4f}**" if x == best else f"{x:.4f}") for x in cells)])
    table(["group", *(f"{rate:g}" for rate in columns)], (row for row in rows if any(row[1:])))


def curves(figures: Figures) -> None:
    """Whether full LoRA's loss has flattened."""
    print("### LoRA on all modules: held-out loss\n")
    rows = []
    for data in SETS:
        own = [row for key, row in figures.tuned.items() if key[:3] == (*LORA, data)]
        if own:
            points = [statistics.mean(row["curve"][step] for row in own) for step in own[0]["curve"]]
            base = figures.base[data, own[0]["seed"]]["loss"]
            rows.append([NAMES[data], len(own), base, *points, statistics.mean(row["loss"] for row in own)])
    table(["set", "runs", "before", "half way", "three quarters", "at the end"], rows)


def machines(figures: Figures) -> str:
    """How many jobs ran where, and with what."""
    jobs = collections.Counter(row["device"] for row in figures.rows)
    return "; ".join(
        f"{jobs[device]} jobs on {device} ({', '.join(map(' '.join, made['versions'].items()))})"
        for device, made in figures.made_by["devices"].items()
    )


def verdicts(models: list[Figures]) -> None:
    """The claims."""
    names = [f"{figures.made_by['model']} (runs)" for figures in models]
    table(["claim", "the paper", *names, "verdict"], claims.rows(models))


def summary(models: list[Figures]) -> None:
    """What a selection gains, chosen and random: the first model's figures."""
    shown = {
        "75 % of the modules": "modules 75",
        "30 % of the modules": "modules 30",
        "10 % of the modules": "modules 10",
        "30 % of the decoder layers": "layers 30",
    }

    def row(tuned: str) -> list[Any]:
        own = (estimate(functools.partial(models[0].gained, shown[tuned], arm)) for arm in ("full search", "random"))
        return [tuned, *own]

    table(["LoRA on", "chosen by importance", "chosen at random"], map(row, shown))


def every_table(models: list[Figures]) -> None:
    """Those of each model in turn."""
    print(INTRODUCTION.strip(), end="\n\n")
    for figures in models:
        steps = figures.made_by["steps"]
        print(f"## {figures.made_by['model']}\n")
        print(f"{steps} steps of 8 examples of at most 192 tokens. {machines(figures)}.\n")
        curves(figures)
        searches(figures, "modules 30", "Which search finds the best modules? (30 % of the parameters)")
        searches(figures, "layers 30", "Which search finds the best decoder layers? (30 % of the parameters)")
        if "mean of other sets" in figures.arms("modules 30"):
            carried(figures)
        agreement(figures)
        others(figures)
        budgets(figures)
        forgetting(figures)
        rates(figures)


TABLES = {"the summary": summary, "the claims": verdicts, "the tables": every_table}


def insert(page: str, models: list[Any], tables: dict[str, Callable[[list[Any]], None]], made_by: str) -> str:
    """A page with the tables that it has marks for."""
    for name, write in tables.items():
        begin = BEGIN.format(name, made_by)
        before, found, rest = page.partition(begin)
        if not found:
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            write(models)
        page = f"{before}{begin}{output.getvalue().strip()}\n{END}{rest.partition(END)[2]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="directories of results, one per model")
    parser.add_argument("--into", type=Path, nargs="+", required=True, help="the pages with the marks")
    args = parser.parse_args()
    models = [Figures.load(results) for results in args.results]
    for path in args.into:
        page = insert(path.read_text(encoding="utf-8"), models, TABLES, "benchmarks/study/tables.py")
        with whole_file(path) as temporary:
            temporary.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
