"""
What gates add on a model of 126 decoder layers and 405 billion parameters, on the meta device.

    python benchmarks/size.py
"""

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_ila import ILAConfig

CONFIG = LlamaConfig(
    hidden_size=16384,
    intermediate_size=53248,
    num_hidden_layers=126,
    num_attention_heads=128,
    num_key_value_heads=8,
    vocab_size=128256,
)


def model() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(CONFIG)


def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(*args, **kwargs), time.perf_counter() - start


def main() -> None:
    options = {"r": 16, "target_modules": "all-linear"}
    get_peft_model(model(), LoraConfig(**options), low_cpu_mem_usage=True)  # imports, once
    print(
        "| units | LoRA's injection | ILA's injection | ranking | conversion | plot | more memory |\n"
        + "|---" * 7
        + "|"
    )
    for granularity in ("layer", "module"):
        lora, ila = LoraConfig(**options), ILAConfig(**options, granularity=granularity)
        bases = model(), model()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _, plain = timed(get_peft_model, bases[0], lora, low_cpu_mem_usage=True)
        gated, injection = timed(get_peft_model, bases[1], ila, low_cpu_mem_usage=True)
        for i, gate in enumerate(gated.gates().values()):
            gate.weight = torch.nn.Parameter(torch.tensor([float(i % 17)]))
        importance, ranking = timed(gated.layer_importance)
        _, conversion = timed(importance.to_lora_config, top_p=0.3, model=CONFIG)
        _, plot = timed(importance.plot)
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        seconds = " | ".join(f"{value:.2f} s" for value in (plain, injection, ranking, conversion, plot))
        print(f"| {len(importance.units)} | {seconds} | {more:.0f} MB |")


if __name__ == "__main__":
    main()
