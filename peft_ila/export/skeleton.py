"""Models without weights, to see what PEFT does with a configuration. Changes with how transformers builds models."""

import copy
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def check_injection(config: PeftConfig, skeleton: nn.Module, expected: set[str]) -> None:
    """
    Inject a configuration and compare the modules that PEFT adapts with the expected ones.

    Args:
        config: The configuration; it is copied, since PEFT edits what it is given.
        skeleton: A model on the meta device, which gets the adapter.
        expected: The names of the modules that must be hit.

    Raises:
        ValueError: PEFT hits other modules.
    """
    config = copy.deepcopy(config)
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # some other initialisations read the base weights
    tuner_cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
    hit = set(tuner_cls(skeleton, config, "default", low_cpu_mem_usage=True).targeted_module_names)
    if hit != expected:
        raise ValueError(
            f"PEFT would adapt {len(hit)} modules instead of the {len(expected)} selected: it misses "
            f"{sorted(expected - hit)[:3]} and adds {sorted(hit - expected)[:3]}."
        )


def meta_skeleton(model: nn.Module | PretrainedConfig) -> nn.Module:
    """
    The plain architecture of a model on the meta device, without its weights, its quantisation or its adapters.

    Args:
        model: A model of transformers, with or without adapters, its configuration, or any other module.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if isinstance(model, PretrainedConfig):
        architecture = (model.architectures or [""])[0]
        model_class = getattr(transformers, architecture, None)
        auto: Any = (
            transformers.AutoModelForSeq2SeqLM if model.is_encoder_decoder else transformers.AutoModelForCausalLM
        )
        with torch.device("meta"):
            if model_class is not None:
                return model_class(copy.deepcopy(model))
            # a configuration with code of its own was trusted when it was loaded
            return auto.from_config(
                model, trust_remote_code=type(model).__module__.startswith("transformers_modules.")
            )
    if isinstance(model, PreTrainedModel):
        with torch.device("meta"):
            return type(model)(copy.deepcopy(model.config))
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _on_meta(tensor) for tensor in tensors})


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
