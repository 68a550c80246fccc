"""
The tables of the study's figures, as Markdown, between the marks in `docs/reproduction.md`.

    python -m benchmarks.study.tables benchmarks/results/study --into docs/reproduction.md
"""

import argparse
import collections
import contextlib
import functools
import io
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.study.arms import ALIGNMENT, BOTH, CHANCE, SEEDS, SETS, TUNING_SEED, TUNING_SETS, by_layer
from benchmarks.study.run import TEXTS, read
from peft_ila import LayerImportance
from peft_ila.files import whole_file

INTRODUCTION = """SmolLM2-135M-Instruct, {steps} steps of 8 examples of at most 192 tokens. {devices}.
"Gained" is the gain in held-out loss as a share of that of LoRA on all modules (r = 8). A run is a data set and a
seed; means are over data sets, of the means over their seeds, and ± is the standard error over the data sets, which
are few: three, five where a ranking is carried over. Where two are compared, it is of paired differences. "random" is
the mean of five draws for 30 % of the modules on the alignment sets, one draw elsewhere.
"""
BEGIN, END = "<!-- made by benchmarks/study/tables.py -->\n", "<!-- end -->"
Run = tuple[str, int]
NAMES = {
    "sft_alpaca_gpt4": "Alpaca-GPT4",
    "sft_lima": "LIMA",
    "sft_dolly": "Dolly",
    "reason_gsm8k": "GSM8K",
    "reason_math": "MATH",
    "text_wikitext2": "WikiText-2",
    "text_c4": "C4",
}
RUNS = list(itertools.product(ALIGNMENT, SEEDS))
TASKS = (("HellaSwag, norm.", "hellaswag acc_norm"), ("ARC-easy", "arc_easy acc"), ("PIQA", "piqa acc"))


class Figures:
    """The rows of a study, by run and arm."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.tuned = {
            (row["group"], row["arm"], row["data"], row["seed"]): row
            for row in rows
            if row["kind"] == "tune" and row["seed"] != TUNING_SEED
        }
        self.swept = [row for row in rows if row["kind"] == "tune" and row["seed"] == TUNING_SEED]
        self.base = {(row["data"], row["seed"]): row for row in rows if row["kind"] == "rank"}
        self.untuned: dict[str, Any] = next((row for row in rows if row["kind"] == "base"), {})
        self.scores = {
            (row["data"], row["seed"], name): scores for row in rows for name, scores in row.get("scores", {}).items()
        }

    def gained(self, group: str, arm: str, run: Run) -> float | None:
        """The gain in held-out loss, as a share of that of LoRA on all modules; "random" is the mean of its draws."""
        if arm == "random":
            draws = [self.gained(group, draw, run) for draw in CHANCE]
            known = [draw for draw in draws if draw is not None]
            return statistics.mean(known) if known else None
        row, full = self.tuned.get((group, arm, *run)), self.tuned.get(("all", "full search", *run))
        if row is None or full is None:
            return None
        base = self.base[run]["loss"]
        return (base - row["loss"]) / (base - full["loss"])

    def known(self, arm: tuple[str, str], what: str, name: str) -> dict[Run, float]:
        """What was measured beside the loss, by run."""
        rows = {run: self.tuned.get((*arm, *run), {}) for run in RUNS}
        return {run: row[what][name] for run, row in rows.items() if what in row}

    def arms(self, group: str) -> list[str]:
        """Those that were run, random draws as one, the best first."""
        arms = {"random" if arm in CHANCE else arm for own, arm, _, _ in self.tuned if own == group}
        return sorted(arms, key=lambda arm: -(mean(self.gained(group, arm, run) for run in RUNS) or 0.0))


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def with_error(value: Callable[[Run], float | None], runs: Iterable[Run]) -> str:
    """
    Mean over the data sets, of the means over their seeds, ± its standard error.

    The seeds of a set share their examples, the held-out ones too, so they are no independent runs.
    """
    by_set: dict[str, list[float]] = {}
    for run in runs:
        if (own := value(run)) is not None:
            by_set.setdefault(run[0], []).append(own)
    means = [statistics.mean(own) for own in by_set.values()]
    if not means:
        return ""
    error = f" ± {statistics.stdev(means) / math.sqrt(len(means)):.3f}" if len(means) > 1 else ""
    return f"{statistics.mean(means):.3f}{error}"


def difference(a: Callable[[Run], float | None], b: Callable[[Run], float | None], runs: Iterable[Run]) -> str:
    """That of the paired differences, over the runs that have both."""

    def paired(run: Run) -> float | None:
        x, y = a(run), b(run)
        return None if x is None or y is None else x - y

    return with_error(paired, runs)


def table(columns: list[str], rows: Iterable[list[Any]]) -> None:
    """Print one."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print("| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print()


def searches(figures: Figures, group: str, title: str) -> None:
    """The arms of one group against the full search and against chance."""
    arms = figures.arms(group)
    if not arms:
        return
    print(f"### {title}\n")

    def row(arm: str) -> list[Any]:
        def own(run: Run) -> float | None:
            return figures.gained(group, arm, run)

        number = sum(own(run) is not None for run in RUNS)
        by_set = [[x for seed in SEEDS if (x := own((data, seed))) is not None] for data in ALIGNMENT]
        full, chance = (
            difference(own, lambda run, other=other: figures.gained(group, other, run), RUNS)  # type: ignore[misc]
            for other in ("full search", "random")
        )
        missing = {1: " (1 run)", 2: " (2 runs)"}
        cells = [f"{statistics.mean(known):.3f}{missing.get(len(known), '')}" if known else "" for known in by_set]
        return [arm, number, with_error(own, RUNS), *cells, full, chance]

    sets = [NAMES[data] for data in ALIGNMENT]
    columns = ["ranking", "runs", "gained", *sets, "less the full search's", "less random draws'"]
    table(columns, map(row, (arm for arm in arms if not arm.startswith("of "))))


def carried(figures: Figures) -> None:
    """Rankings of one set, tuned on another."""
    print("### Does a ranking carry over? (30 % of the parameters, modules)\n")
    rankings = [*(f"of {data}" for data in SETS), "mean of other sets", "random"]

    def own(data: str, ranking: str, seed: int) -> float | None:
        if ranking == f"of {data}":
            return figures.gained("modules 30", "full search", (data, seed))
        return figures.gained("modules 30", ranking, (data, seed))

    rows: list[list[Any]] = []
    for ranking in rankings:
        cells = [mean(own(data, ranking, seed) for seed in SEEDS) for data in SETS]
        foreign = [data for data in SETS if ranking != f"of {data}"]
        lost = difference(
            lambda run, ranking=ranking: own(run[0], ranking, run[1]),  # type: ignore[misc]
            lambda run: figures.gained("modules 30", "full search", run),
            itertools.product(foreign, SEEDS),
        )
        label = f"of {NAMES[ranking[3:]]}" if ranking.startswith("of ") else ranking
        if lost:
            rows.append([label, *("" if cell is None else f"{cell:.3f}" for cell in cells), lost])
    own_cells = [mean(figures.gained("modules 30", "full search", (data, seed)) for seed in SEEDS) for data in SETS]
    rows.insert(0, ["the set's own", *("" if cell is None else cell for cell in own_cells), ""])
    table(["ranking", *(f"tuned on {NAMES[data]}" for data in SETS), "less the set's own"], rows)


def budgets(figures: Figures) -> None:
    """Everything that was tuned, with its parameters."""
    print("### At equal parameters, and at fewer\n")
    rows = []
    for group in dict.fromkeys(key[0] for key in figures.tuned):
        for arm in figures.arms(group):
            if arm in ("again", *BOTH, "random", "bottom", "uniform", "EVA", "AdaLoRA"):
                found = [
                    row for key, row in figures.tuned.items() if key[:2] == (group, arm) and row["data"] in ALIGNMENT
                ]
                found = found or [row for key, row in figures.tuned.items() if key[0] == group]
                rate, parameters = found[0]["learning_rate"], statistics.mean(row["parameters"] for row in found)
                gained = functools.partial(figures.gained, group, arm)
                number = sum(gained(run) is not None for run in RUNS)
                less = difference(gained, functools.partial(figures.gained, "all", "full search"), RUNS)
                rows.append([group, arm, f"{rate:g}", f"{parameters:,.0f}", number, with_error(gained, RUNS), less])
    columns = ["group", "ranking", "learning rate", "parameters", "runs", "gained", "less LoRA on all"]
    table(columns, rows)


def forgetting(figures: Figures) -> None:
    """A part frozen, against LoRA on all: the gain, the perplexity of plain text, and the tasks of lm-eval."""
    print("### A part frozen: what is gained, and what must not be lost\n")
    lora = {text: figures.known(("all", "full search"), "perplexities", text) for text in TEXTS}
    lora |= {name: figures.known(("all", "again"), "accuracies", name) for _, name in TASKS}
    base = {text: {run: figures.base[run]["perplexities"][text] for run in RUNS} for text in TEXTS}
    columns = [*(f"{NAMES[text]}, %" for text in TEXTS), *(name for name, _ in TASKS)]
    print(
        "Against LoRA on all in the same runs: the change in perplexity, and in the accuracies that lm-eval finds on "
        "1,000 questions each (standard error of one model: 0.015). LoRA's own perplexities are "
        + " and ".join(f"{_perplexity(lora[text])} (before tuning {_perplexity(base[text])})" for text in TEXTS)
        + ", its accuracies "
        + ", ".join(
            f"{with_error(lora[name].get, RUNS)} ({figures.untuned['accuracies'][name]:.3f})" for _, name in TASKS
        )
        + ".\n"
    )
    rows = []
    for group, arm in dict.fromkeys(key[:2] for key in figures.tuned):
        own = {text: figures.known((group, arm), "perplexities", text) for text in TEXTS}
        if group == "all" or not any(map(any, own.values())):
            continue
        own |= {name: figures.known((group, arm), "accuracies", name) for _, name in TASKS}
        gained = functools.partial(figures.gained, group, arm)
        less = difference(gained, functools.partial(figures.gained, "all", "full search"), RUNS)
        number = sum(gained(run) is not None for run in RUNS)
        changes = [with_error(_change(own[text], lora[text]).get, RUNS) for text in TEXTS]
        kept = [difference(own[name].get, lora[name].get, RUNS) for _, name in TASKS]
        rows.append([group, arm, number, less, *changes, *kept])
    table(["tuned", "ranking", "runs", "gained, less LoRA on all", *columns], rows)


def _change(losses: dict[Run, float], others: dict[Run, float]) -> dict[Run, float]:
    """That of the perplexity, in per cent."""
    return {run: 100 * math.expm1(loss - others[run]) for run, loss in losses.items() if run in others}


def _perplexity(losses: dict[Run, float]) -> str:
    return f"{statistics.mean(map(math.exp, losses.values())):.2f}"


def overlaps(figures: Figures, units: list[str], layers: bool, search: str) -> dict[str, tuple[list[float], ...]]:
    """Of pairs of rankings by a search: their overlaps at 75 and 30 %, and their correlations."""
    rankings = {
        (data, seed): ranking(units, figures.scores[data, seed, search], layers)
        for data, seed in itertools.product(SETS, SEEDS)
        if (data, seed, search) in figures.scores
    }
    found: dict[str, list[tuple[float, float, float]]] = {}
    for ((a, s), one), ((b, t), other) in itertools.combinations(rankings.items(), 2):
        numbers = (one.overlap(other, 0.75), one.overlap(other, 0.3), one.spearman(other))
        if a == b:
            found.setdefault("two seeds of a set", []).append(numbers)
        elif s == t:
            kinds = sorted({"alignment" if data in ALIGNMENT else "reasoning" for data in (a, b)})
            found.setdefault(f"two sets: {' and '.join(kinds)}", []).append(numbers)
    return {label: tuple(map(list, zip(*own))) for label, own in sorted(found.items())}


def agreement(figures: Figures, units: list[str]) -> None:
    """How much rankings of different data have in common."""
    print("### Are the important units the same?\n")
    print("Of decoder layers by the sums of their modules' scores; two sets are of one seed, and of one draw of A.\n")
    rows = [
        [search, "layers" if layers else "modules", label, len(own[0]), *map(statistics.mean, own)]
        for search, layers in itertools.product(BOTH, (False, True))
        for label, own in overlaps(figures, units, layers, search).items()
    ]
    table(["search", "units", "pairs of rankings", "n", "overlap@75", "overlap@30", "Spearman"], rows)
    print("By chance, the overlap (of the intersection and the union) is 0.60 and 0.18.\n")


def nearness(figures: Figures, units: list[str]) -> None:
    """How near the other searches come to the full search of the same run."""
    print("### How near do other searches come to the full search's ranking?\n")
    names = dict.fromkeys(name for _, _, name in figures.scores if name != "full search")
    rows = []
    for name in names:
        found: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
        for data, seed in itertools.product(SETS, SEEDS):
            own = figures.scores.get((data, seed, name)) or figures.scores.get(("", 0, name))
            full = figures.scores.get((data, seed, "full search"))
            for layers in (False, True) if own and full else ():
                one, other = (ranking(units, scores, layers) for scores in (own, full))
                found[layers].append((one.overlap(other, 0.75), one.overlap(other, 0.3), one.spearman(other)))
        modules, whole = (list(map(statistics.mean, zip(*found[layers]))) for layers in (False, True))
        # all modules of a layer have the same score by aletheia-lora
        rows.append([name, len(found[True]), *([""] * 3 if name == "aletheia-lora" else modules), *whole])
    rows.sort(key=lambda row: -row[-1])
    numbers = ("overlap@75", "overlap@30", "Spearman")
    table(["search", "runs", *(f"{what}: {n}" for what in ("modules", "layers") for n in numbers)], rows)


def ranking(units: list[str], scores: list[float], layers: bool) -> LayerImportance:
    """The scores of modules, or of decoder layers."""
    found = dict(zip(units, scores))
    if layers:
        found = by_layer(found)
    return LayerImportance(list(found), list(found.values()))


def rates(figures: Figures) -> None:
    """The sweeps by which learning rates were chosen."""
    print(
        f"## Learning rates (seed {TUNING_SEED}, mean held-out loss of {', '.join(NAMES[s] for s in TUNING_SETS)})\n"
    )
    by_group: dict[str, dict[float, list[float]]] = {}
    for row in figures.swept:
        by_group.setdefault(row["group"], {}).setdefault(row["learning_rate"], []).append(row["loss"])
    columns = sorted({rate for own in by_group.values() for rate in own})

    def cell(own: dict[float, list[float]], rate: float) -> str:
        if len(own.get(rate, [])) < len(TUNING_SETS):
            return ""
        best = min(statistics.mean(losses) for losses in own.values())
        value = statistics.mean(own[rate])
        return f"**{value:.4f}**" if value == best else f"{value:.4f}"

    rows = [[group, *(cell(own, rate) for rate in columns)] for group, own in by_group.items()]
    table(["group", *(f"{rate:g}" for rate in columns)], (row for row in rows if any(row[1:])))


def curves(figures: Figures) -> None:
    """Whether full LoRA's loss has flattened."""
    print("### LoRA on all modules: held-out loss\n")
    rows = []
    for data in SETS:
        own = [row for key, row in figures.tuned.items() if key[:3] == ("all", "full search", data)]
        if own:
            points = [statistics.mean(row["curve"][step] for row in own) for step in own[0]["curve"]]
            base = figures.base[data, own[0]["seed"]]["loss"]
            rows.append([NAMES[data], len(own), base, *points, statistics.mean(row["loss"] for row in own)])
    table(["set", "runs", "before", "half way", "three quarters", "at the end"], rows)


def claims(figures: Figures, units: list[str]) -> None:
    """What the paper reports, and what was found here."""
    print("### The claims\n")
    rows = [
        [
            "30 % of the decoder layers come close to all",
            "0.98 of the gain (abstract)",
            f"{with_error(lambda run: figures.gained('layers 30', 'full search', run), RUNS)} of LoRA's gain on all",
        ],
        [
            "30 % of the parameters, by modules",
            "",
            f"{with_error(lambda run: figures.gained('modules 30', 'full search', run), RUNS)}",
        ],
    ]
    for group, what in (("layers 30", "layers"), ("modules 30", "modules")):
        ahead = difference(
            lambda run, group=group: figures.gained(group, "full search", run),  # type: ignore[misc]
            lambda run, group=group: figures.gained(group, "random", run),  # type: ignore[misc]
            RUNS,
        )
        rows.append([f"it matters which: the search's {what} less random ones", "better", ahead])
    for other, what in (("all", "LoRA on all"), ("modules 75", "a random quarter frozen")):
        less = difference(
            functools.partial(figures.gained, "modules 75", "full search"),
            functools.partial(figures.gained, other, "random" if other == "modules 75" else "full search"),
            RUNS,
        )
        rows.append([f"the unimportant quarter of the parameters frozen, less {what}", "better", less])
    for label, found in overlaps(figures, units, False, "full search").items():
        if label != "two seeds of a set":
            paper = {"two sets: alignment": "about 0.90", "two sets: reasoning": "0.86"}.get(label, "")
            rows.append(
                [f"the top 75 % of the modules are the same, {label}", paper, f"{statistics.mean(found[0]):.2f}"]
            )
    lost = difference(
        lambda run: figures.gained("modules 30", "mean of other sets", run),
        lambda run: figures.gained("modules 30", "full search", run),
        RUNS,
    )
    rows.append(["a ranking carries over: the mean of other sets' rankings less the set's own", "", lost])
    table(["claim", "the paper", "here"], rows)


def machines(rows: list[dict[str, Any]], devices: dict[str, Any]) -> str:
    """How many jobs ran where, and with what."""
    jobs = collections.Counter(row["device"] for row in rows)
    return "; ".join(
        f"{jobs[device]} jobs on {device} ({', '.join(map(' '.join, made['versions'].items()))})"
        for device, made in devices.items()
    )


def report(results: Path) -> str:
    """All tables."""
    made_by = json.loads((results / "made_by.json").read_text())
    rows = read(results / "figures.jsonl")
    figures = Figures(rows)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        print(INTRODUCTION.format(steps=made_by["steps"], devices=machines(rows, made_by["devices"])))
        claims(figures, made_by["units"])
        curves(figures)
        searches(figures, "modules 30", "Which search? Modules with 30 % of the parameters")
        searches(figures, "layers 30", "Which search? Decoder layers with 30 % of the parameters")
        searches(figures, "modules 10", "Which search? Modules with 10 % of the parameters")
        carried(figures)
        agreement(figures, made_by["units"])
        nearness(figures, made_by["units"])
        budgets(figures)
        forgetting(figures)
        rates(figures)
    return output.getvalue().strip() + "\n"


def insert(text: str, page: str) -> str:
    """The page with another text between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--into", type=Path, required=True, help="the page with the marks")
    args = parser.parse_args()
    page = insert(report(args.results), args.into.read_text(encoding="utf-8"))
    with whole_file(args.into) as temporary:
        temporary.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
