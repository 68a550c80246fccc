"""
What does a part cost? A step of tuning it, by LoRA or its weights, and an adapter served unmerged, whole and pruned.

    python -m benchmarks.pruning.cost benchmarks/results/pruning --output benchmarks/results/pruning_cost.json

SmolLM2-135M in fp32. A step has 4×128 tokens, and LoRA r = 8. It is timed without the optimizer's part. A prompt has
256 tokens, and 8 more follow it one by one. The pruned adapters have the ranks that `benchmarks/pruning/run.py` found
on its first set; costs do not depend on weights. Times are medians of ratios to LoRA on all modules in the same round
(see `cost/step_cost.py`).
"""

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from benchmarks.cost.step_cost import IDS, interleaved, load, saved_bytes, seconds
from benchmarks.pruning.figures import Figures
from benchmarks.record import save, table
from benchmarks.study.arms import layers_within, modules_within
from benchmarks.study.problem import RANK, adapted_modules
from peft_ila import LayerImportance

PROMPT = 256  # tokens
ROUNDS = 15


def parts() -> dict[str, Any]:
    """LoRA on all modules and on parts of them, and full fine-tuning of the same and of three quarters."""
    sizes = adapted_modules(load("fp32"))
    everything, places = sum(sizes.values()), range(len(sizes))
    ranking = LayerImportance.load("smollm2-135m-instruct")
    scores = dict(zip(ranking.units, ranking.scores))
    units = {
        "all": list(sizes),
        "best modules": modules_within(0.3 * everything, scores, sizes),
        "last layers": layers_within(0.3 * everything, dict(zip(sizes, places)), sizes),
        "first layers": layers_within(0.3 * everything, dict(zip(sizes, (-i for i in places))), sizes),
    }
    configs = {name: LoraConfig(r=RANK, target_modules=own) for name, own in units.items()}
    configs["rank 1"] = LoraConfig(r=1, target_modules=units["all"])
    models = {name: get_peft_model(load("fp32"), config) for name, config in configs.items()}
    for name, own in (
        ("all weights", units["all"]),
        ("best weights", modules_within(0.75 * everything, scores, sizes)),
    ):
        models[name] = load("fp32").requires_grad_(False)
        for unit in own:
            models[name].get_submodule(unit).requires_grad_(True)
    return models


def trained(model: Any) -> int:
    """The number of its trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@torch.no_grad()
def prompt(model: Any) -> float:
    """The seconds that a prompt takes."""
    start = time.perf_counter()
    model(input_ids=IDS.view(-1)[None, :PROMPT], use_cache=True)
    return time.perf_counter() - start


@torch.no_grad()
def token(model: Any) -> float:
    """The seconds of a token after a prompt."""
    cache = model(input_ids=IDS.view(-1)[None, :PROMPT], use_cache=True).past_key_values
    start = time.perf_counter()
    for place in range(PROMPT, PROMPT + 8):
        model(input_ids=IDS.view(-1)[None, place : place + 1], past_key_values=cache, use_cache=True)
    return (time.perf_counter() - start) / 8


def ratios(steps: dict[str, Any], against: str) -> dict[str, float]:
    """The median of the ratios to one of them."""
    taken = interleaved(steps, ROUNDS)
    return {name: statistics.median(a / b for a, b in zip(own, taken[against])) for name, own in taken.items()}


def served(figures: Figures) -> dict[str, Any]:
    """Adapters with the ranks of a whole one and of pruned ones."""
    names = list(figures.units)
    found = {"whole": get_peft_model(load("fp32"), LoraConfig(r=figures.rank, target_modules=names))}
    for share in (0.25, 0.125, 0.05):
        ranks = figures.ranks(("rounds", share), figures.runs[0])
        if ranks:
            kept = {name: rank for name, rank in zip(names, ranks) if rank}
            config = LoraConfig(r=figures.rank, target_modules=list(kept), rank_pattern=kept)
            found[f"{100 * share:g} % kept"] = get_peft_model(load("fp32"), config)
    return found


def file_size(model: PeftModel) -> int:
    """Of the saved adapter, in bytes."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return (Path(directory) / SAFETENSORS_WEIGHTS_NAME).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="those of `benchmarks.pruning.run`")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    models = parts()
    kept = {name: saved_bytes(model) for name, model in models.items()}
    taken = ratios({name: functools.partial(seconds, model) for name, model in models.items()}, "all")
    steps = {
        name: {"trained": trained(model), "bytes": kept[name] / kept["all"], "time": taken[name]}
        for name, model in models.items()
    }
    table(["tuned", "parameters", "bytes", "time"], ([name, *own.values()] for name, own in steps.items()))

    adapters = served(Figures.load(args.results))
    timed = {"none": load("fp32").eval()} | {name: model.eval() for name, model in adapters.items()}
    of_prompt, of_token = (
        ratios({name: functools.partial(measure, model) for name, model in timed.items()}, "whole")
        for measure in (prompt, token)
    )
    costs = {name: {"prompt": of_prompt[name], "token": of_token[name]} for name in timed}
    for name, model in adapters.items():
        modules = sum(isinstance(module, LoraLayer) for module in model.modules())
        costs[name] = {"bytes": file_size(model), "modules": modules, **costs[name]}
    columns = ("bytes", "modules", "prompt", "token")
    table(["adapter", *columns], ([name, *map(own.get, columns)] for name, own in costs.items()))
    save(args.output, {"steps": steps, "served": costs})


if __name__ == "__main__":
    main()
