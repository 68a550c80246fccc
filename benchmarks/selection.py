"""
What tuning a selection costs, against LoRA on all layers: bytes that autograd keeps, and the time of a step.

The selection is the ranking's own, scattered as it is. Gradient checkpointing is off and on, there without and with
`FrozenPrefix`. Times are medians of ratios to full LoRA's step just before, since the machine's speed drifts.

    python benchmarks/selection.py --importance demo_output/part_a/importance.json

SmolLM2-135M, r = 16, 4×128 tokens; 10 minutes on 2 cores.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_ila import FrozenPrefix, LayerImportance
from peft_ila.embedded import smollm2
from peft_ila.measure import saved_tensor_bytes

SHARES = (0.1, 0.2, 0.3, 0.5, 0.75)
REPEATS = 5
IDS = torch.randint(0, 49152, (4, 128), generator=torch.Generator().manual_seed(0))


def adapted(config: LoraConfig, checkpointing: bool, prefix: bool) -> PeftModel:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32), config).train()
    if checkpointing:
        model.enable_input_require_grads()  # as TRL does
        model.get_base_model().gradient_checkpointing_enable()
    if prefix:
        arguments = SimpleNamespace(gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=None)
        FrozenPrefix().on_train_begin(arguments, None, None, model=model)
    return model


def step(model: PeftModel) -> float:
    start = time.perf_counter()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--importance", required=True, help="a ranking of SmolLM2's decoder layers")
    args = parser.parse_args()
    importance = LayerImportance.load(args.importance)

    def config(share: float) -> LoraConfig:
        return importance.to_lora_config(top_p=share, r=16, lora_alpha=32)

    print("| checkpointing | share | lowest layer | bytes | time |\n|---|---|---|---|---|")
    for checkpointing, prefix in ((False, False), (True, False), (True, True)):
        full = adapted(config(1.0), checkpointing, False)
        whole = saved_tensor_bytes(full, lambda model=full: model(input_ids=IDS, labels=IDS).loss)
        label = "on, `FrozenPrefix`" if prefix else "on" if checkpointing else "off"
        for share in SHARES:
            selection = config(share)
            model = adapted(selection, checkpointing, prefix)
            kept = saved_tensor_bytes(model, lambda model=model: model(input_ids=IDS, labels=IDS).loss)
            seconds = [(step(full), step(model)) for _ in range(REPEATS)]
            ratio = statistics.median(b / a for a, b in seconds)
            lowest = min(selection.layers_to_transform)
            print(f"| {label} | {share:.0%} | {lowest} | {kept / whole:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
