"""
The cost of a step in each mode: its time, and the exact count of bytes that autograd keeps for the backward pass.

    python -m benchmarks.cost.step_cost --output benchmarks/results/step_cost.json

Models: SmolLM2-135M in fp32 and NF4, one random decoder layer as wide as those of Llama-3.1-8B, and one of
Qwen3-30B-A3B with 32 of its 128 experts, which are parameters. Adapters: "all-linear", r = 16, both granularities,
4×128 tokens. "Stage 2" is the step of `learn_gates`, "prune" the step
of `prune`; "floor" is the frozen model with the gradient carried down to the
first decoder layer.

Each round runs every step once in random order, since the machine's speed drifts and a step depends on the memory left
by the previous one. A time is the median over rounds of the ratio to the floor's step (stage 2, soft), to stage 2's
(prune) or to LoRA's (open, joint). Its spread is half the interquartile range, divided by the root of the number of
rounds. A round takes 25 s on 2 quiet cores for SmolLM2.
"""

import argparse
import functools
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen3MoeConfig

from benchmarks.record import save
from peft_ila import ILAConfig
from peft_ila.embedded import smollm2
from peft_ila.measure import saved_tensor_bytes

OPTIONS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.randint(0, 49152, (4, 128), generator=torch.Generator().manual_seed(0))
WIDE = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_hidden_layers=1,
    vocab_size=1024,
)
MOE = Qwen3MoeConfig(
    hidden_size=2048,
    moe_intermediate_size=768,
    num_experts=32,
    num_experts_per_tok=8,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_hidden_layers=1,
    vocab_size=1024,
)
BASES = ("fp32", "NF4", "wide", "MoE")
# and their baselines
MODES = {"open": "LoRA", "stage 2": "floor", "prune": "stage 2", "soft": "floor", "joint": "LoRA"}


def load(base: str) -> Any:
    if base in ("wide", "MoE"):
        return AutoModelForCausalLM.from_config({"wide": WIDE, "MoE": MOE}[base]).train()
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if base == "NF4" else None
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32, quantization_config=quantization)
    return model.train()


def floor(base: str) -> Any:
    model = load(base).requires_grad_(False)
    # a gate in the first decoder layer would need the gradient of the layer's input
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def loss(model: Any) -> torch.Tensor:
    ids = IDS % model.config.vocab_size
    return model(input_ids=ids, labels=ids).loss


def seconds(model: Any) -> float:
    start = time.perf_counter()
    loss(model).backward()
    return time.perf_counter() - start


def interleaved(steps: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, list[float]]:
    """The results of each step in each round. A round takes all steps once, in random order."""
    order = random.Random(0)
    taken: dict[Any, list[float]] = {step: [] for step in steps}
    for _ in range(rounds):
        for step in order.sample(list(steps), len(steps)):
            taken[step].append(steps[step]())
    return taken


def set_mode(gated: Any, mode: str) -> None:
    gated.set_gate_mode("soft" if mode in ("stage 2", "prune") else mode)
    for gate in gated.gates().values():
        gate.probed = mode == "stage 2"
        if mode == "prune":
            gate.mode = "open"
    if mode == "prune":
        for name, parameter in gated.named_parameters():
            parameter.requires_grad_(".lora_B." in name)


def seconds_in(gated: Any, mode: str) -> float:
    set_mode(gated, mode)
    return seconds(gated)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="a JSON file to add the figures to")
    args = parser.parse_args()

    figures: dict[str, Any] = {}
    if args.output and args.output.exists():
        figures = json.loads(args.output.read_text())
    print("| base | step | MB | against LoRA | against the floor | time | ± | against |")
    print(f"|{'---|' * 8}")
    for base in args.bases:
        references = {"floor": floor(base), "LoRA": get_peft_model(load(base), LoraConfig(**OPTIONS))}
        kept = {name: saved_tensor_bytes(model, lambda model=model: loss(model)) for name, model in references.items()}
        models = {g: get_peft_model(load(base), ILAConfig(**OPTIONS, granularity=g)) for g in ("layer", "module")}
        steps: dict[Any, Callable[[], float]] = {
            (mode, granularity): functools.partial(seconds_in, gated, mode)
            for mode in args.modes
            for granularity, gated in models.items()
        }
        for name in sorted({MODES[mode] for mode in args.modes} & references.keys()):
            steps[name] = functools.partial(seconds, references[name])
        taken = interleaved(steps, args.rounds)
        own = figures.setdefault(base, {}) | {name: {"bytes": number} for name, number in kept.items()}
        for mode, granularity in itertools.product(args.modes, models):
            reference = taken[MODES[mode]] if MODES[mode] in references else taken[MODES[mode], granularity]
            found = [step / other for step, other in zip(taken[mode, granularity], reference)]
            gated = models[granularity]
            set_mode(gated, mode)
            number = saved_tensor_bytes(gated, lambda model=gated: loss(model))
            first, median, third = statistics.quantiles(found, n=4)
            spread = (third - first) / 2 / math.sqrt(len(found))
            time_to = f"time / {MODES[mode]}"
            own[f"{mode} ({granularity})"] = {"bytes": number, time_to: median, "spread": spread, "rounds": len(found)}
            print(
                f"| {base} | {mode} ({granularity}) | {number / 1e6:.1f} | {number / kept['LoRA']:.3f} "
                f"| {number / kept['floor']:.3f} | {median:.3f} | {spread:.3f} | {MODES[mode]} |",
                flush=True,
            )
        print(f"| {base} | floor, LoRA | {' and '.join(f'{n / 1e6:.1f}' for n in kept.values())} | | | | | |")
        figures[base] = own
        if args.output:
            save(args.output, figures)


if __name__ == "__main__":
    main()
