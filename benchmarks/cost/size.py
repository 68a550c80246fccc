"""
The cost of gates on models of any size, counted on the meta device.

First the FLOPs of a step of 4×128 tokens (r = 16, all linear modules), compared with the floor: the frozen model with
the gradient carried down to the first decoder layer. Then the time of injection, ranking, conversion (checked by
injection) and plot on a model of 126 decoder layers and 405 billion parameters.

    python -m benchmarks.cost.size --output benchmarks/results/size.json
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import save
from peft_ila import ILAConfig
from peft_ila.search.directions import Directions
from peft_ila.search.pruning import Found
from peft_ila.workflows.prune import draw, summarised

OPTIONS = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
    )


SHAPES = {
    "SmolLM2-135M": llama(576, 1536, 30, 9, 3, 49152),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128256),
    "Llama-3.1-405B": llama(16384, 53248, 126, 128, 8, 128256),
}


def model(config: LlamaConfig) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def flops(step: torch.nn.Module) -> int:
    ids = torch.zeros(4, 128, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        step.train()(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


def flops_to_floor(config: LlamaConfig) -> dict[str, float]:
    frozen = model(config).requires_grad_(False)
    frozen.model.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_())
    floor = flops(frozen)
    with torch.device("meta"):
        figures = {"LoRA": flops(get_peft_model(model(config), LoraConfig(**OPTIONS))) / floor}
        gated = get_peft_model(model(config), ILAConfig(**OPTIONS))
    for mode in ("open", "stage 2", "soft", "joint"):
        gated.set_gate_mode("soft" if mode == "stage 2" else mode)
        for gate in gated.gates().values():
            gate.probed = mode == "stage 2"
        figures[mode] = flops(gated) / floor
    return figures


def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(*args, **kwargs), time.perf_counter() - start


def seconds(config: LlamaConfig, granularity: str) -> dict[str, float]:
    lora, ila = LoraConfig(**OPTIONS), ILAConfig(**OPTIONS, granularity=granularity)
    bases = model(config), model(config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, plain = timed(get_peft_model, bases[0], lora, low_cpu_mem_usage=True)
    gated, injection = timed(get_peft_model, bases[1], ila, low_cpu_mem_usage=True)
    for i, gate in enumerate(gated.gates().values()):
        gate.weight = torch.nn.Parameter(torch.tensor([float(i % 17)]))
    importance, ranking = timed(gated.layer_importance)
    _, conversion = timed(importance.to_lora_config, top_p=0.3, model=config)
    _, plot = timed(importance.plot)
    return {
        "units": len(importance.units),
        "LoRA's injection, s": plain,
        "ILA's injection, s": injection,
        "ranking, s": ranking,
        "conversion, s": conversion,
        "plot, s": plot,
        "more memory, MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def pruning_seconds(config: LlamaConfig, rank: int) -> dict[str, float]:
    """The parts of `prune` that grow with the number of directions: all but the training steps and evaluations."""
    with torch.device("meta"):
        options = {**OPTIONS, "r": rank, "granularity": "module", "gate_mode": "open"}
        gated = get_peft_model(model(config), ILAConfig(**options))
    for name, module in gated.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default", ".lora_gate.default")):
            module.to_empty(device="cpu").weight.data.normal_()
    directions, split = timed(Directions, gated.base_model)
    worth = directions.singular_values
    kept = (worth >= worth.quantile(0.9)).float()
    found = Found(directions.modules, worth, worth, directions.sizes, kept, None, None)
    pruning, selection = timed(summarised, gated.base_model, found, {})
    directions.set_gates(kept)
    with tempfile.TemporaryDirectory() as directory:
        _, export = timed(gated.to_lora, directory, ranks="mixed")
        _, plot = timed(draw, pruning, Path(directory))
    return {"directions": len(kept), "SVD, s": split, "selection, s": selection, "export, s": export, "plot, s": plot}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    work = {shape: flops_to_floor(config) for shape, config in SHAPES.items()}
    print("| FLOPs against the floor | LoRA | open | stage 2 | soft | joint |\n|---|---|---|---|---|---|")
    for shape, figures in work.items():
        print(f"| {shape} | " + " | ".join(f"{figure:.3f}" for figure in figures.values()) + " |")

    largest = SHAPES["Llama-3.1-405B"]
    seconds(largest, "layer")  # imports, once
    rows = [seconds(largest, granularity) for granularity in ("layer", "module")]
    print(f"\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print("| " + " | ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()) + " |")
    # 882 modules; the weights of their adapters are real
    pruned = pruning_seconds(llama(1024, 2048, 126, 8, 8, 1024), 64)
    print("pruning:", pruned)
    save(args.output, {"FLOPs": work, "405B": rows, "pruning": pruned})


if __name__ == "__main__":
    main()
