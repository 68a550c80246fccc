r"""
What does pruning keep of an adapter's gain, and what do its rivals? See `docs/appendix/pruning.md`.

LoRA on all modules is trained on a data set, and its directions are kept by several rules, with and without learned
gates. The rivals are LoRA trained at a lower rank or on a selection, and the whole adapter times a factor.

    python -m benchmarks.pruning.run --data ../shared/data --work WORK --output_dir benchmarks/results/pruning
    python -m benchmarks.pruning.tables benchmarks/results/pruning

On the CPU, in bfloat16 with adapters in fp32. A call resumes where the last one stopped: every figure is written as
soon as it is there. Jobs have the order of `PHASES`.
"""

import argparse
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from benchmarks.pruning.adapter import HALF, Adapter, adapter, losses
from benchmarks.record import read_lines, save
from benchmarks.study.arms import layers_within, modules_within
from benchmarks.study.problem import Problem, adapted_modules, gemma, load_base, read_examples, read_text
from benchmarks.study.rankings import untrained
from benchmarks.study.tasks import accuracies
from peft_ila.embedded import smollm2

STEPS = 60
MAX_LENGTH, PROMPT = 96, 72  # tokens
SETS = ("sft_alpaca_gpt4", "sft_lima", "sft_dolly", "reason_gsm8k", "reason_math")
TEXTS = ("text_wikitext2", "text_c4")
RATES = {"smollm2": 2e-3, "gemma": 1e-3}  # the study's best for LoRA with r = 8 on all modules
FACTORS = (0.7, 0.85, 1.15, 1.3)
CHECKPOINTS = (20, 30, 40, 50)  # steps
QUESTIONS = 200  # of each task

Losses = Callable[[], dict[str, Any]]
Arms = Iterator[tuple[str, float, Losses]]  # a name, the share of the adapter's parameters, and how to measure it
_worker: dict[str, Any] = {}


class Run:
    """A data set and a seed on one model; adapters are kept in a directory."""

    def __init__(self, data: str, seed: int) -> None:
        self.problem = Problem(_worker["base"], _worker["examples"][data], seed)
        self.sizes = adapted_modules(_worker["base"])
        self.rank, self.rate = _worker["rank"], _worker["rate"]
        self.directory = _worker["work"] / f"{_worker['model']}-{data}-{seed}"

    def trained(self, rank: int, rate: float, units: list[str] | None = None) -> dict[str, Any]:
        """The losses after LoRA. On all modules, the adapter is kept."""
        adapted = self.problem.lora(units or list(self.sizes), rank)
        return self.fitted(adapted, rate, None if units else self.path(rank, rate))

    def fitted(self, adapted: Any, rate: float, path: Path | None = None) -> dict[str, Any]:
        """The losses after training."""
        with adapted as model:
            for _ in self.problem.fit(model, rate, STEPS):
                pass
            if path:
                model.save_pretrained(path)
            return {"losses": losses(self.problem, model)}

    def path(self, rank: int, rate: float) -> Path:
        """Of an adapter on all modules."""
        return self.directory / f"r{rank}-{rate:g}"

    def adapter(self) -> Any:
        """The one that is pruned."""
        if not (self.path(self.rank, self.rate) / SAFETENSORS_WEIGHTS_NAME).exists():
            self.trained(self.rank, self.rate)
        return adapter(self.problem, self.path(self.rank, self.rate))

    def bars(self, shares: tuple[float, ...] = (0.05, 0.125), factors: tuple[float, ...] = FACTORS) -> Arms:
        """What the bars are about."""
        with self.adapter() as own:
            yield "base", 0.0, lambda: {"losses": own.losses(own.none), "tokens": self.tokens()}
            yield "whole", 1.0, lambda: {"losses": own.losses(own.all), "worth": figures(own.worth)}
            yield from self.chosen(own, "attribution", own.attribution, shares)
            yield from self.chosen(own, "singular value", own.singular_value, shares, gates=True)
            yield from self.chosen(own, "rounds", own.rounds, shares, gates=True)
            yield from self.chosen(
                own, "same rank", own.same_rank, tuple(s for s in shares if (s * self.rank).is_integer()), gates=True
            )
            for factor in factors:
                yield f"times {factor}", 1.0, lambda factor=factor: {"losses": own.losses(factor * own.all)}

    def curve(self) -> Arms:
        """The other shares and rules."""
        with self.adapter() as own:
            modules, layers = (functools.partial(own.units, granularity) for granularity in ("module", "layer"))
            yield from self.chosen(own, "attribution", own.attribution, (0.02, 0.25, 0.5, 0.75))
            yield from self.chosen(own, "singular value", own.singular_value, (0.02, 0.25, 0.5))
            yield from self.chosen(own, "same rank", own.same_rank, (0.25, 0.5))
            yield from self.chosen(own, "whole modules", modules, (0.05, 0.25, 0.5, 0.75))
            yield from self.chosen(own, "whole layers", layers, (0.25, 0.5, 0.75))
            yield from self.chosen(own, "random", own.random, (0.05, 0.5))
            yield "all, gates", 1.0, lambda: {"losses": own.losses(own.learn(own.all))}
            yield from self.chosen(own, "rounds", own.rounds, (0.02,), gates=True)
            for batches in (4, 8):
                by = functools.partial(own.attribution, batches=batches)
                yield from self.chosen(own, f"attribution, {batches} batches", by, (0.05,))

    def more_batches(self) -> Arms:
        """Attribution on twice as many; where the slopes are kept already, they begin with the same ones."""
        with self.adapter() as own:
            by = functools.partial(own.measured, batches=32)
            yield from self.chosen(own, "attribution, 32 batches", by, (0.05,))

    def quarter(self) -> Arms:
        """What `peft-ila prune` keeps at 25 %."""
        with self.adapter() as own:
            yield from self.chosen(own, "rounds", own.rounds, (0.25,), gates=True)

    def chosen(
        self,
        own: Adapter,
        name: str,
        rule: Callable[[float], torch.Tensor],
        shares: tuple[float, ...],
        gates: bool = False,
    ) -> Arms:
        """What a rule keeps at each share, and with learned gates too."""

        def measured(share: float, learned: bool) -> dict[str, Any]:
            kept = rule(share)
            used = float(own.sizes[kept > 0].sum() / own.sizes.sum())
            own_losses = own.losses(own.learn(kept) if learned else kept)
            return {"losses": own_losses, "used": round(used, 5), "ranks": own.ranks(kept)}

        for share in shares:
            yield name, share, functools.partial(measured, share, False)
            if gates:
                yield f"{name}, gates", share, functools.partial(measured, share, True)

    def other_rank(self, rank: int, times: float = 1.0) -> Arms:
        """LoRA that is trained at another rank, at a multiple of the rate."""
        rate = times * self.rate
        yield f"rank {rank} at {rate:g}", rank / self.rank, functools.partial(self.trained, rank, rate)

    def adaptive(self, method: str, rank: int, times: float) -> Arms:
        """Methods that choose the ranks themselves, at a mean rank and a multiple of the rate."""
        problem, units, rate = self.problem, list(self.sizes), times * self.rate

        def trained() -> dict[str, Any]:
            return self.fitted(
                problem.eva(units, rank) if method == "EVA" else problem.adalora(units, STEPS, rank), rate
            )

        yield f"{method}, rank {rank} at {rate:g}", rank / self.rank, trained

    def parts(self, *choices: tuple[str, float, float]) -> Arms:
        """LoRA on a part of the modules: which, their share of the parameters, and a multiple of the rate."""
        everything = sum(self.sizes.values())

        def part(name: str, share: float, rate: float) -> dict[str, Any]:
            if name == "best modules":
                scores = untrained(self.problem, self.sizes)["untrained, 16 batches"]
                units = modules_within(share * everything, dict(zip(self.sizes, scores)), self.sizes)
            else:
                places = range(len(self.sizes)) if name == "last layers" else range(len(self.sizes), 0, -1)
                units = layers_within(share * everything, dict(zip(self.sizes, places)), self.sizes)
            used = sum(self.sizes[unit] for unit in units) / everything
            return {**self.trained(self.rank, rate, units), "used": round(used, 5)}

        for name, share, times in choices:
            rate = times * self.rate
            yield f"{name} at {rate:g}", share, functools.partial(part, name, share, rate)

    def checkpoints(self) -> Arms:
        """The adapter on the way to its last step."""
        with self.problem.lora(list(self.sizes), self.rank) as model:
            for step in self.problem.fit(model, self.rate, STEPS):
                if step in CHECKPOINTS:
                    yield f"step {step}", 1.0, lambda: {"losses": losses(self.problem, model)}

    def elsewhere(self, place: str, measure: Callable[[Any], dict[str, Any]]) -> Arms:
        """What else changes, of the whole adapter and of what was pruned."""
        with self.adapter() as own:
            for name, share, gates in (
                ("base", 0.0, lambda: own.none),
                ("whole", 1.0, lambda: own.all),
                ("attribution", 0.125, lambda: own.attribution(0.125)),
                ("attribution", 0.25, lambda: own.attribution(0.25)),
                ("times 0.7", 1.0, lambda: 0.7 * own.all),
                ("rounds, gates", 0.125, lambda: own.learn(own.rounds(0.125))),
            ):
                yield f"{name} on {place}", share, lambda gates=gates: measure(own.gated(gates()))

    def texts(self, model: Any) -> dict[str, Any]:
        """The loss on plain text."""
        return {"texts": {text: self.problem.loss(model, _worker["examples"][text]) for text in TEXTS}}

    def tasks(self, model: Any) -> dict[str, Any]:
        """The accuracies that lm-eval finds."""
        base = model.get_base_model()
        return {"accuracies": accuracies(base, _worker["directory"], _worker["data"], QUESTIONS)}

    def tokens(self) -> list[int]:
        """The answers' tokens of both halves of the held-out examples."""
        counts = [len(example.tokens) - example.prompt for example in self.problem.held_out[: 2 * HALF]]
        return [sum(counts[:HALF]), sum(counts[HALF:])]


def figures(values: torch.Tensor) -> list[float]:
    """For the output."""
    return [float(f"{value:.4g}") for value in values.tolist()]


PHASES: dict[str, Callable[[Run], Arms]] = (
    {
        "bars": Run.bars,
        "bars at 5 %": lambda run: run.bars((0.05,), ()),
        "bars at 12.5 %": lambda run: run.bars((0.125,), ()),
        "curve": Run.curve,
        "quarter": Run.quarter,
        "parts": lambda run: run.parts(("last layers", 0.3, 2.0), ("best modules", 0.3, 2.0)),
        "parts, others": lambda run: run.parts(
            ("last layers", 0.3, 4.0), ("first layers", 0.3, 2.0), ("best modules", 0.1, 2.0)
        ),
        "parts, lower rates": lambda run: run.parts(
            ("last layers", 0.3, 1.0), ("best modules", 0.3, 1.0), ("first layers", 0.3, 1.0)
        ),
        "batches": Run.more_batches,
        "checkpoints": Run.checkpoints,
        "text": lambda run: run.elsewhere("text", run.texts),
        "tasks": lambda run: run.elsewhere("tasks", run.tasks),
    }
    | {
        f"rank {rank}, rate x{times:g}": functools.partial(Run.other_rank, rank=rank, times=times)
        for rank, times in (
            (1, 2),
            (1, 1),
            (1, 4),
            (8, 2),
            (16, 1),
            (16, 0.5),
            (64, 1),
            (64, 0.5),
            (2, 1),
            (4, 1),
            (2, 2),
            (4, 2),
        )
    }
    | {
        f"{method}, rank 1, rate x{times:g}": functools.partial(Run.adaptive, method=method, rank=1, times=times)
        for method, times in (
            ("EVA", 2),
            ("EVA", 1),
            ("EVA", 0.5),
            ("AdaLoRA", 2),
            ("AdaLoRA", 4),
            ("AdaLoRA", 8),
        )
    }
)


def start(directory: Path, values: dict[str, Any]) -> None:
    """Make a process ready for jobs."""
    torch.set_num_threads(1)
    _worker.update(values, base=load_base(directory, "cpu", torch.bfloat16))


def work(data: str, seed: int, phase: str) -> None:
    """Measure the arms that are not there yet, and write each when it is done."""
    for arm, share, measure in PHASES[phase](Run(data, seed)):
        key = f"{data}|{seed}|{arm}|{share:g}"
        if key in _worker["done"]:
            continue
        began = time.perf_counter()
        row = {"key": key, "data": data, "seed": seed, "arm": arm, "share": share, **measure()}
        row["seconds"] = round(time.perf_counter() - began, 1)
        with _worker["output"].open("ab", buffering=0) as file:  # one call, so processes do not mix their lines
            file.write((json.dumps(row) + "\n").encode())
        print(time.strftime("%H:%M"), key, row.get("losses"), row["seconds"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the directory of the JSONL files")
    parser.add_argument("--work", type=Path, required=True, help="where trained adapters are kept")
    parser.add_argument("--gemma", type=Path, help="instead of SmolLM2-135M-Instruct: a directory for Gemma-3-270m")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter that is pruned")
    parser.add_argument("--rate", type=float, help="its learning rate; default: the best for r = 8")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    model, directory = ("gemma", gemma(args.gemma)) if args.gemma else ("smollm2", smollm2())
    examples = {
        data: read_examples(args.data / f"{data}.jsonl", directory, MAX_LENGTH, PROMPT) for data in args.sets
    } | {text: read_text(args.data / f"{text}.jsonl", directory) for text in TEXTS}
    described = {"model": directory.name, "rank": args.rank, "rate": args.rate or RATES[model], "steps": STEPS}
    if (path := args.output_dir / "made_by.json").exists():
        before = json.loads(path.read_text())
        if before | described != before:
            parser.error(f"{args.output_dir} has the figures of another study; choose another --output_dir.")
    save(path, {**described, "units": adapted_modules(load_base(directory, "cpu"))})
    output = args.output_dir / "figures.jsonl"
    done = {row["key"] for row in read_lines(output)}
    values = {"model": model, "rank": args.rank, "rate": described["rate"]}
    values |= {"examples": examples, "work": args.work, "output": output, "done": done}
    values |= {"directory": directory, "data": args.data}
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context, start, (directory, values)) as pool:
        jobs = itertools.product(args.phases, args.seeds, args.sets)
        futures = [pool.submit(work, data, seed, phase) for phase, seed, data in jobs]
        for future in as_completed(futures):
            if error := future.exception():
                print(repr(error), flush=True)  # the other jobs go on; this one is tried by the next call


if __name__ == "__main__":
    main()
