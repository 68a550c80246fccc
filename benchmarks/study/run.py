r"""
Which search selects best, what does a selection gain, and does a ranking carry over? See `docs/reproduction.md`.

A model is tuned on every set by LoRA on all modules, and by each arm: the modules or decoder layers that a search
selects, a uniform lower rank, EVA, AdaLoRA, random draws, and full fine-tuning of a part. Arms that belong together
form a group. The learning rate of a group is chosen on a seed that is not reported.

    python -m benchmarks.study.run --data ../shared/data --output_dir benchmarks/results/study
    python -m benchmarks.study.tables benchmarks/results/study --into docs/reproduction.md

A few arms on a second model, Gemma-3-270m:

    python -m benchmarks.study.run --data ../shared/data --gemma WORK/gemma-3-270m \
        --output_dir benchmarks/results/study_gemma

A job is 100 steps. On an H200 (products in TF32), a step takes 31 ms in one process, and 19 ms with 14 processes under
CUDA's MPS; on two cores, a job takes ten minutes. A call resumes where the last one stopped, in the order of
`arms.ARMS`, and ends by `--time_limit`.
"""

import argparse
import itertools
import json
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.record import made_by, read_lines, save
from benchmarks.study.arms import SETS, TUNING_SEED, Job, Study
from benchmarks.study.problem import Example, Problem, adapted_modules, gemma, load_base, read_examples, read_text
from benchmarks.study.rankings import attribution, kappa_tune, rounded, untrained
from benchmarks.study.tasks import accuracies
from peft_ila.embedded import smollm2

TEXTS = ("text_wikitext2", "text_c4")
QUESTIONS = 1000  # of each task of lm-eval
_worker: dict[str, Any] = {}


def start(model: Path, examples: dict[str, list[Example]], device: str, steps: int, data: Path | None) -> None:
    """Make a process ready for jobs; `data` is where the tasks of lm-eval are, if they are wanted."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    if device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be recorded
    base = load_base(model, device)
    _worker.update(model=model, base=base, examples=examples, steps=steps, sizes=adapted_modules(base), data=data)


def work(job: Job) -> dict[str, Any]:
    """Do a job: what it has found, to be written as one line."""
    began = time.perf_counter()
    found = tune(job) if job.kind == "tune" else rank(job)
    return {"key": job.key, **job.described(), **found, "seconds": round(time.perf_counter() - began, 2)}


def rank(job: Job) -> dict[str, Any]:
    """The searches that need no tuned adapter, and the base model's losses."""
    base, sizes = _worker["base"], _worker["sizes"]
    if job.kind == "base":
        return {"scores": kappa_tune(base, sizes), **tasks(base)}
    problem = Problem(base, _worker["examples"][job.data], job.seed)
    measured = {"loss": problem.loss(base), "perplexities": perplexities(problem, base)}
    return {"scores": untrained(problem, sizes), **measured}


def tune(job: Job) -> dict[str, Any]:
    """The held-out loss after tuning. For LoRA on all modules, the loss on the way and the ranking too."""
    problem = Problem(_worker["base"], _worker["examples"][job.data], job.seed)
    steps, units = _worker["steps"], list(job.units)
    curve = {}
    methods = {
        "lora": lambda: problem.lora(units, job.rank),
        "full": lambda: problem.full(units),
        "eva": lambda: problem.eva(units),
        "adalora": lambda: problem.adalora(units, steps),
    }
    with methods[job.method]() as model:
        for step in problem.fit(model, job.learning_rate, steps):
            if job.ranked and step in (steps // 2, steps * 3 // 4):
                curve[step] = problem.loss(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        found = {"loss": problem.loss(model), "parameters": sum(p.numel() for p in trained), "modules": len(units)}
        forgets = job.group.startswith(("all", "modules 75", "weights"))
        if forgets or job.arm == "full search":
            found["perplexities"] = perplexities(problem, model)
        if forgets and job.seed != TUNING_SEED:
            found |= tasks(model.get_base_model() if isinstance(model, PeftModel) else model)
        if job.ranked:
            found |= {"curve": curve, "scores": {"full search": rounded(attribution(model, problem))}}
    return found


def perplexities(problem: Problem, model: Any) -> dict[str, float]:
    """The loss on plain text, which tuning on dialogues may raise."""
    return {name: problem.loss(model, _worker["examples"][name]) for name in TEXTS}


def tasks(model: Any) -> dict[str, Any]:
    """The accuracies that lm-eval finds, where they are wanted."""
    data = _worker["data"]
    return {"accuracies": accuracies(model, _worker["model"], data, QUESTIONS)} if data else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the directory of the JSONL files")
    parser.add_argument("--gemma", type=Path, help="instead of SmolLM2-135M-Instruct: a directory for Gemma-3-270m")
    parser.add_argument("--tasks", action="store_true", help="HellaSwag, ARC-easy and PIQA too: pip install lm-eval")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--time_limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--jobs", type=int, help="the maximum number of jobs")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    began = time.perf_counter()

    model = gemma(args.gemma) if args.gemma else smollm2()
    examples = {data: read_examples(args.data / f"{data}.jsonl", model) for data in SETS}
    examples |= {text: read_text(args.data / f"{text}.jsonl", model) for text in TEXTS}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    sizes = adapted_modules(load_base(model, "cpu"))
    header = args.output_dir / "made_by.json"
    devices = json.loads(header.read_text())["devices"] if header.exists() else {}
    devices[name] = made_by()
    save(header, {"model": model.name, "steps": args.steps, "units": list(sizes), "devices": devices})
    file = args.output_dir / "figures.jsonl"
    rows = read_lines(file)
    study = Study(rows, sizes, second=bool(args.gemma))
    done = {row["key"] for row in rows}
    running: dict[Future[dict[str, Any]], str] = {}
    initial = (model, examples, device, args.steps, args.data if args.tasks else None)
    context = torch.multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(args.processes, context, start, initial) as pool,
        file.open("a", encoding="utf-8") as output,
    ):
        started = 0
        while True:
            if time.perf_counter() - began < args.time_limit:
                todo = (job for job in study.jobs() if job.key not in done and job.key not in running.values())
                for job in itertools.islice(todo, args.processes - len(running)):
                    if started != args.jobs:
                        running[pool.submit(work, job)] = job.key
                        started += 1
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                done.add(key)
                if error := future.exception():
                    print(key, repr(error), flush=True)  # the other jobs go on; this one is tried by the next call
                    continue
                row = {**future.result(), "device": name}
                study.add(row)
                output.write(json.dumps(row, ensure_ascii=False) + "\n")
                output.flush()
                print(f"{time.perf_counter() - began:.0f} s", key, row.get("loss"), row["seconds"], flush=True)


if __name__ == "__main__":
    main()
