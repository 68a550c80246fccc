"""
The memory of a step in each mode, as the exact count of bytes that autograd keeps for the backward pass.

    python benchmarks/bytes.py

SmolLM2-135M, all linear modules, r = 16, 4×128 tokens, fp32 and NF4, both granularities. "Floor" is the frozen model
with the gradient carried down to the first decoder layer. Half a minute on 2 cores.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_ila import ILAConfig
from peft_ila.embedded import smollm2
from peft_ila.files import whole_file
from peft_ila.measure import saved_tensor_bytes

OPTIONS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def load(nf4: bool):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if nf4 else None
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32, quantization_config=quantization)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    ids = torch.randint(0, 49152, (4, 128), generator=torch.Generator().manual_seed(0))

    def count(model) -> int:
        model.train()
        return saved_tensor_bytes(model, lambda: model(input_ids=ids, labels=ids).loss)

    figures: dict[str, dict[str, int]] = {}
    for base, nf4 in (("fp32", False), ("NF4", True)):
        model = load(nf4)
        # the first decoder layer's input is what a gate in that layer would need a gradient for
        model.requires_grad_(False)
        hook = model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_())
        row = {"floor": count(model)}
        hook.remove()
        row["LoRA"] = count(get_peft_model(model, LoraConfig(**OPTIONS)))
        for granularity in ("layer", "module"):
            gated = get_peft_model(load(nf4), ILAConfig(**OPTIONS, granularity=granularity))
            for mode in ("open", "soft", "joint"):
                gated.set_gate_mode(mode)
                row[f"{mode} ({granularity})"] = count(gated)
        figures[base] = row

    print("| base | step | MB | against LoRA | against the floor |\n|---|---|---|---|---|")
    for base, row in figures.items():
        for step, number in row.items():
            print(
                f"| {base} | {step} | {number / 1e6:.1f} | {number / row['LoRA']:.3f} | {number / row['floor']:.3f} |"
            )
    if args.output:
        with whole_file(args.output) as temporary:
            temporary.write_text(json.dumps({"versions": {"torch": torch.__version__}, "bytes": figures}, indent=1))


if __name__ == "__main__":
    main()
