"""
The cost of tuning a selection, compared with LoRA on all layers: bytes kept by autograd, FLOPs and the time of a step.

The ranking's own selection is used, scattered as it is. Gradient checkpointing is off, on, and on with `FrozenPrefix`;
on NF4 (whose products PyTorch's counter misses), only the last. Times are medians of ratios to the step of full LoRA
in the same round, see `step_cost.py`.

    python -m benchmarks.cost.selection --importance demo_output/learned/importance.json \
        --output benchmarks/results/selection.json

SmolLM2-135M, r = 16, 4×128 tokens; 20 minutes on 2 quiet cores.
"""

import argparse
import functools
import statistics
from pathlib import Path
from types import SimpleNamespace

from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost.step_cost import interleaved, load, loss, seconds
from benchmarks.record import save
from peft_ila import FrozenPrefix, LayerImportance
from peft_ila.measure import saved_tensor_bytes

SHARES = (0.1, 0.2, 0.3, 0.5, 0.75)
# the base, whether activations are checkpointed, `FrozenPrefix`
SETTINGS = (("fp32", False, False), ("fp32", True, False), ("fp32", True, True), ("NF4", True, True))
ROUNDS = 7


def adapted(config: LoraConfig, base: str, checkpointing: bool, prefix: bool) -> PeftModel:
    model = get_peft_model(load(base), config).train()
    if checkpointing:
        model.enable_input_require_grads()  # as TRL does
        model.get_base_model().gradient_checkpointing_enable()
    if prefix:
        arguments = SimpleNamespace(gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=None)
        FrozenPrefix().on_train_begin(arguments, None, None, model=model)
    return model


def count(model: PeftModel) -> tuple[int, int]:
    """Bytes kept for the backward pass, and FLOPs of a step."""
    with FlopCounterMode(display=False) as flops:
        loss(model).backward()
    return saved_tensor_bytes(model, lambda: loss(model)), flops.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--importance", required=True, help="a ranking of SmolLM2's decoder layers")
    parser.add_argument("--bases", nargs="+", default=["fp32", "NF4"], choices=["fp32", "NF4"])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    importance = LayerImportance.load(args.importance)

    def config(share: float) -> LoraConfig:
        return importance.to_lora_config(top_p=share, r=16, lora_alpha=32)

    rows = []
    print("| base | checkpointing | share | layers | lowest | bytes | FLOPs | time |\n" + "|---" * 8 + "|")
    for base, checkpointing, prefix in SETTINGS:
        if base not in args.bases:
            continue
        full = adapted(config(1.0), base, checkpointing, False)
        whole, work = count(full)
        label = "on, `FrozenPrefix`" if prefix else "on" if checkpointing else "off"
        for share in SHARES:
            selection = config(share)
            model = adapted(selection, base, checkpointing, prefix)
            kept, flops = count(model)
            steps = {"own": functools.partial(seconds, model), "full": functools.partial(seconds, full)}
            taken = interleaved(steps, ROUNDS)
            row = {
                "base": base,
                "checkpointing": label,
                "share": share,
                "layers": len(selection.layers_to_transform),
                "lowest layer": min(selection.layers_to_transform),
                "bytes": kept / whole,
                "FLOPs": None if base == "NF4" else flops / work,
                "time": statistics.median(own / other for own, other in zip(taken["own"], taken["full"])),
            }
            rows.append(row)
            print("| " + " | ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()) + " |")
    save(args.output, {"rows": rows})


if __name__ == "__main__":
    main()
