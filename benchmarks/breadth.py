"""
Is every configuration exact, for every model class of transformers? The counts of `docs/support.md`.

Each class of the causal, seq2seq, image-text, speech and encoder mappings is built with few layers on the meta device
and gated by "all-linear" at both granularities. The modules that PEFT really injects must agree: ILA with LoRA, and
the configurations of 10, 30, 75 and 100 % of the units (made with the model, with its configuration and without
either) with the selected units. The export of the masked adapter must agree in configuration and keys. ILA must refuse
a class that LoRA refuses.

    python -m benchmarks.breadth --output benchmarks/results/breadth.json

40 minutes on one core. Results in the output are not computed again. `--only Llama Mixtral` runs some families.
"""

import argparse
import copy
import json
import logging
import random
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from benchmarks.record import save
from peft_ila import ILAConfig, LayerImportance
from peft_ila.export.plain import to_plain_lora

MAPPINGS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "SEQUENCE_CLASSIFICATION",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
)
SHARES = (0.1, 0.3, 0.75, 1.0)
LAYERS = 4
_COUNTS = """
    num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers
    depth num_text_layers
""".split()


def classes() -> dict[str, type[PretrainedConfig]]:
    """The name of each model class, and its configuration class."""
    found = {}
    for mapping in MAPPINGS:
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            config = transformers.CONFIG_MAPPING[model_type]
            for name in (names,) if isinstance(names, str) else names:
                found[name] = config
    return found


def small(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with few layers, also in its parts."""
    config = copy.deepcopy(config)
    for name in config.to_dict():
        value = getattr(config, name, None)
        if isinstance(value, PretrainedConfig):
            setattr(config, name, small(value))
    if getattr(config, "vocab_size", 0) is None:
        config.vocab_size = 32  # the size of a tokenizer's
    for name in _COUNTS:
        count = getattr(config, name, None)
        if isinstance(count, int) and count > LAYERS:
            for other, value in vars(config).copy().items():
                if isinstance(value, list) and len(value) == count:
                    setattr(config, other, value[:LAYERS])
            setattr(config, name, LAYERS)
    return config


def build(name: str, config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        return getattr(transformers, name)(copy.deepcopy(config))


def buildable(name: str, config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """A configuration from which the class can be built, small where possible."""
    for shrink in (small, copy.deepcopy):
        try:
            config = shrink(config_class())
            build(name, config)
            return config
        except Exception as error:  # some default configurations are inconsistent
            problem = error
    raise problem


def adapted(model: Any) -> set[str]:
    """The modules and parameters that LoRA adapts, read from the model itself."""
    found = set()
    for path, module in model.named_modules():
        path = path.removeprefix("base_model.model.")
        if isinstance(module, ParamWrapper):
            found.add(f"{path.replace('.base_layer', '')}.{module.parameter_name}")
        elif hasattr(module, "lora_A") and ".base_layer." not in path:
            found.add(path)
    return found


def injected(name: str, config: PretrainedConfig, lora: Any) -> Any:
    return get_peft_model(build(name, config), copy.deepcopy(lora), low_cpu_mem_usage=True)


def differences(name: str, config: PretrainedConfig, shares: tuple[float, ...] = SHARES) -> list[str]:
    """The differences, one line each. "refused" alone if LoRA refuses the model too."""
    options: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}
    try:
        expected = adapted(injected(name, config, LoraConfig(**options)))
    except Exception:
        expected = None
    found = []
    for granularity in ("layer", "module"):
        ila_config = ILAConfig(**options, granularity=granularity, gate_mode="open")
        try:
            model = injected(name, config, ila_config)
        except Exception as error:
            if expected is None:
                return ["refused"]
            return [f"{granularity}: ILA refuses what LoRA takes: {type(error).__name__}: {error}"]
        if adapted(model) != expected:
            found.append(f"{granularity}: ILA adapts {len(adapted(model))}, LoRA {len(expected or ())}")
            continue
        importance = _ranking(model)
        found += [f"{granularity}, {line}" for line in _selections(name, config, importance, shares)]
        found += [f"{granularity}, {line}" for line in _export(name, config, model, importance)]
    return found


def _ranking(model: PeftModel) -> LayerImportance:
    # scores of a model on the meta device are there too
    for gate in model.gates().values():
        gate.weight = torch.nn.Parameter(torch.zeros(1))
    importance = model.layer_importance()
    scores = random.Random(0)
    importance.scores = [scores.uniform(-3, 3) for _ in importance.units]
    return importance


def _selections(
    name: str, config: PretrainedConfig, importance: LayerImportance, shares: tuple[float, ...]
) -> list[str]:
    found, right = [], []
    given = {"the model": build(name, config), "its configuration": copy.deepcopy(config), "neither": None}
    for share in shares:
        expected = {own for unit in importance.select(top_p=share) for own in importance.modules[unit]}
        for label, known in given.items():
            try:
                lora = importance.to_lora_config(top_p=share, r=4, model=known)
                if (lora, expected) in right:
                    continue
                hit = adapted(injected(name, config, lora))
            except Exception as error:
                found.append(f"{share:.0%} with {label}: {type(error).__name__}: {str(error)[:200]}")
                continue
            if hit == expected:
                right.append((lora, expected))
            else:
                found.append(f"{share:.0%} with {label}: PEFT adapts {len(hit)} instead of {len(expected)}")
    return found


def _export(name: str, config: PretrainedConfig, model: PeftModel, importance: LayerImportance) -> list[str]:
    selected = importance.select(top_p=0.3)
    model.apply_mask(selected)
    base = model.base_model.model
    state = get_peft_model_state_dict(base, adapter_name="default", save_embedding_layers=False)
    state = {f"base_model.model.{key}": tensor for key, tensor in state.items()}
    expected = {own for unit in selected for own in importance.modules[unit]}
    found = []
    for label, known in (("from memory", importance), ("from disk", None)):
        lookalikes = known.lookalikes if known else None
        try:
            model_type = known.metadata["model_type"] if known else None
            tensors, lora = to_plain_lora(state, model.peft_config["default"], lookalikes, model_type)
            plain = injected(name, config, lora)
        except Exception as error:
            found.append(f"export {label}: {type(error).__name__}: {str(error)[:200]}")
            continue
        keys = get_peft_model_state_dict(plain, adapter_name="default", save_embedding_layers=False).keys()
        if adapted(plain) != expected or keys != tensors.keys():
            found.append(f"export {label}: PEFT adapts {len(adapted(plain))} instead of {len(expected)}")
    return found


def outcome(lines: list[str]) -> str | list[str]:
    """A summary of the differences."""
    if not lines:
        return "exact"
    if lines == ["refused"]:
        return "refused as by LoRA"
    if all("has no `architectures`" in line for line in lines):
        return "exact, but asks for the model instead of its configuration"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[], help="prefixes of class names, by default all")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    figures: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    outcomes: dict[str, Any] = figures.setdefault("outcomes", {})
    for number, (name, config_class) in enumerate(classes().items()):
        if name in outcomes or (args.only and not name.startswith(tuple(args.only))):
            continue
        try:
            config = buildable(name, config_class)
        except Exception as error:
            outcomes[name] = f"not built: {type(error).__name__}: {str(error)[:150]}"
            continue
        lines = differences(name, config)
        outcomes[name] = outcome(lines)
        if outcomes[name] != "exact":
            print(name, outcomes[name], flush=True)
        if number % 10 == 0:
            save(args.output, figures)
    counts = Counter(o.partition(":")[0] if isinstance(o, str) else "differs" for o in outcomes.values())
    figures["counts"] = dict(counts)
    save(args.output, figures)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))


if __name__ == "__main__":
    main()
