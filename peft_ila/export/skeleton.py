"""Models without weights, to test a PEFT configuration on."""

import copy
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def check_injection(config: PeftConfig, skeleton: nn.Module, expected: set[str]) -> None:
    """
    Inject a configuration and compare the modules and parameters that PEFT adapts with the expected ones.

    Args:
        config: The configuration.
        skeleton: A model on the meta device, which gets the adapter.
        expected: The names of the modules and parameters to adapt.
    """
    config = copy.deepcopy(config)  # PEFT edits it
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # some other initialisations read the base weights
    tuner_cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
    # some other methods cannot make their weights on the meta device
    with torch.device("meta") if isinstance(config, LoraConfig) else nullcontext():
        tuner = tuner_cls(skeleton, config, "default", low_cpu_mem_usage=True)
    hit = {*tuner.targeted_module_names, *tuner.targeted_parameter_names}
    if hit != expected:
        raise ValueError(
            f"PEFT would adapt {len(hit)} modules instead of the {len(expected)} selected: it misses "
            f"{sorted(expected - hit)[:3]} and adds {sorted(hit - expected)[:3]}."
        )


def meta_skeleton(model: nn.Module | PretrainedConfig, names: Collection[str] = ()) -> nn.Module:
    """
    The plain architecture of a model on the meta device, without its weights, its quantisation or its adapters.

    Args:
        model: A model of transformers, with or without adapters, its configuration, or any other module.
        names: Modules and parameters that the model must have, if a configuration does not name its class.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if isinstance(model, PretrainedConfig):
        return _of_config(model, names)
    if isinstance(model, PreTrainedModel):
        with torch.device("meta"):
            return type(model)(copy.deepcopy(model.config))
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _on_meta(tensor) for tensor in tensors})


def _of_config(config: PretrainedConfig, names: Collection[str]) -> nn.Module:
    try:
        with torch.device("meta"):
            skeleton = _named(config) or _with_names(config, names)
    except _IMPOSSIBLE as error:
        raise ValueError(f"No model can be built from this {type(config).__name__}: {error}") from error
    if skeleton is None:
        raise ValueError(
            f"This {type(config).__name__} has no `architectures`, so its model class is unknown. Set them, or pass "
            "the model itself."
        )
    return skeleton


def _named(config: PretrainedConfig) -> nn.Module | None:
    """The model of the class that a configuration names."""
    architectures = config.architectures if isinstance(config.architectures, list) else []
    model_class = getattr(transformers, str(architectures[0]), None) if architectures else None
    # it may name anything, so only models of transformers are called
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        own = model_class.config_class
        if own is not None and isinstance(config, own):
            return model_class(copy.deepcopy(config))
    if type(config).__module__.startswith("transformers_modules."):
        # the configuration's own code was trusted when it was loaded
        auto: Any = transformers.AutoModelForCausalLM
        return auto.from_config(config, trust_remote_code=True)
    return None


def _with_names(config: PretrainedConfig, names: Collection[str]) -> nn.Module | None:
    """The first of the heads that a configuration without `architectures` may mean, if possible with these names."""
    first = None
    for kind in _KINDS:
        try:
            skeleton = getattr(transformers, kind).from_config(copy.deepcopy(config))
        except (ValueError, *_IMPOSSIBLE):
            continue  # there is no such model, or it needs a missing option, such as a vocabulary
        known = {name for name, _ in (*skeleton.named_modules(), *skeleton.named_parameters())}
        if known.issuperset(names):
            return skeleton
        first = first or skeleton
    return first


# errors of models that cannot be built from a configuration
_IMPOSSIBLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
_KINDS = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification",
    "AutoModelForCTC",
    "AutoModelForAudioClassification",
    "AutoModel",
)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
