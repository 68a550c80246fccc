"""
The cost of a step in each mode: its time, and the exact count of bytes that autograd keeps for the backward pass.

    python -m benchmarks.cost.step_cost --output benchmarks/results/step_cost.json

Models: SmolLM2-135M in fp32 and NF4, one random decoder layer as wide as those of Llama-3.1-8B, and one of
Qwen3-30B-A3B with 32 of its 128 experts, which are parameters. Adapters: "all-linear", r = 16, both granularities,
4×128 tokens. "Stage 2" is the step of `learn_gates`, "prune" the step of `prune`. "Floor" is the frozen model with the
gradient carried down to the first decoder layer.

Each round runs every step once in random order: the machine's speed drifts, and a step depends on the memory left by
the previous one. A time is the median over rounds of the ratio to the floor's step (stage 2, soft), to stage 2's
(prune) or to LoRA's (open, joint). Its spread is half the interquartile range, divided by the root of the number of
rounds. A round takes 25 s on 2 quiet cores for SmolLM2.
"""

import argparse
import functools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen3MoeConfig

from benchmarks.record import save, table
from peft_ila import ILAConfig
from peft_ila.embedded import smollm2
from peft_ila.measure import saved_tensors

OPTIONS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.randint(0, 49152, (4, 128), generator=torch.Generator().manual_seed(0))
ONE = {"num_attention_heads": 32, "num_hidden_layers": 1, "vocab_size": 1024}
ONE_LAYER = {
    "wide": LlamaConfig(**ONE, hidden_size=4096, intermediate_size=14336, num_key_value_heads=8),
    "MoE": Qwen3MoeConfig(
        **ONE,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=32,
        num_experts_per_tok=8,
        num_key_value_heads=4,
        head_dim=128,
    ),
}
BASES = ("fp32", "NF4", *ONE_LAYER)
# and their baselines
MODES = {"open": "LoRA", "stage 2": "floor", "prune": "stage 2", "soft": "floor", "joint": "LoRA"}


def load(base: str) -> Any:
    if base in ONE_LAYER:
        return AutoModelForCausalLM.from_config(ONE_LAYER[base]).train()
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


def saved_bytes(model: Any) -> int:
    """The bytes that autograd keeps for the backward pass."""
    with saved_tensors(model) as saved:
        loss(model)
    return saved.bytes()


def set_mode(gated: Any, mode: str) -> None:
    gated.set_gate_mode("soft" if mode in ("stage 2", "prune") else mode)
    for gate in gated.gates().values():
        if mode in ("stage 2", "prune"):
            gate.state = "probed" if mode == "stage 2" else "open"
    if mode == "prune":
        for name, parameter in gated.named_parameters():
            parameter.requires_grad_(".lora_B." in name)


def seconds(model: Any, mode: str | None = None) -> float:
    if mode:
        set_mode(model, mode)
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


def measure(base: str, modes: list[str], rounds: int, figures: dict[str, Any]) -> Iterator[list[Any]]:
    """Adds the figures of a base model; yields them as rows."""
    references = {"floor": floor(base), "LoRA": get_peft_model(load(base), LoraConfig(**OPTIONS))}
    kept = {name: saved_bytes(model) for name, model in references.items()}
    figures |= {name: {"bytes": number} for name, number in kept.items()}
    steps: dict[Any, Callable[[], float]] = {
        name: functools.partial(seconds, model) for name, model in references.items()
    }
    models = {g: get_peft_model(load(base), ILAConfig(**OPTIONS, granularity=g)) for g in ("layer", "module")}
    names = [(mode, granularity) for mode in modes for granularity in models]
    for mode, granularity in names:
        steps[mode, granularity] = functools.partial(seconds, models[granularity], mode)
    taken = interleaved(steps, rounds)
    for mode, granularity in names:
        against = MODES[mode]
        reference = taken[against] if against in references else taken[against, granularity]
        ratios = [own / other for own, other in zip(taken[mode, granularity], reference)]
        first, median, third = statistics.quantiles(ratios, n=4)
        spread = (third - first) / 2 / math.sqrt(rounds)
        gated = models[granularity]
        set_mode(gated, mode)
        number = saved_bytes(gated)
        step = f"{mode} ({granularity})"
        figures[step] = {"bytes": number, f"time / {against}": median, "spread": spread, "rounds": rounds}
        yield [base, step, number / 1e6, number / kept["LoRA"], number / kept["floor"], median, spread, against]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="prune needs stage 2")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, required=True, help="a JSON file to add the figures to")
    args = parser.parse_args()
    figures: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for base in args.bases:
        rows = measure(base, args.modes, args.rounds, figures.setdefault(base, {}))
        table(["base", "step", "MB", "against LoRA", "against the floor", "time", "±", "against"], rows)
        save(args.output, figures)


if __name__ == "__main__":
    main()
