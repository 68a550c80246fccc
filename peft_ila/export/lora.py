"""Turns selected units into a PEFT configuration that targets exactly them."""

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PretrainedConfig

from ..units import split_layer
from .skeleton import check_injection, meta_skeleton

DECIDED_BY_SELECTION = (
    "target_modules",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
)


@dataclass
class Targets:
    """
    The modules and parameters of a ranked model.

    Args:
        modules: The target modules and parameters of every unit, selected or not, in model order.
        lookalikes: Other modules that share the last part of their name with a target module.
        parameters: The parameters among `modules`, with their ranks as multiples of LoRA's.
        model_type: The `model_type` of the model's configuration. For some types, PEFT translates names.
    """

    modules: Mapping[str, Sequence[str]]
    lookalikes: Sequence[str] = ()
    parameters: Mapping[str, float] = field(default_factory=dict)
    model_type: str | None = None

    def of(self, units: Iterable[str]) -> set[str]:
        """The modules and parameters of these units."""
        return {name for unit in units for name in self.modules[unit]}


def to_lora_config(
    targets: Targets,
    selected: Sequence[str],
    model: nn.Module | PretrainedConfig | None = None,
    config_cls: type[PeftConfig] = LoraConfig,
    **kwargs: Any,
) -> Any:
    """See [`LayerImportance.to_lora_config`]. `selected` are the units to target, in any order."""
    options = {option.name for option in fields(config_cls)}
    if not {"target_modules", "layers_to_transform", "layers_pattern"} <= options:
        raise TypeError(
            f"{config_cls.__name__} cannot target single layers; `config_cls` must have `target_modules`, "
            "`layers_to_transform` and `layers_pattern`, like LoraConfig and AdaLoraConfig."
        )
    if decided := sorted(set(kwargs) & set(DECIDED_BY_SELECTION)):
        raise ValueError(f"{decided} follow from the selected units. Leave them out.")

    expected = targets.of(selected)
    parameters = expected & targets.parameters.keys()
    if parameters and "target_parameters" not in options:
        raise TypeError(f"{config_cls.__name__} cannot target parameters such as {min(parameters)!r}.")
    # it takes all names, not only the selected ones, to tell a model from its decoder
    skeleton = None if model is None else meta_skeleton(model, targets.of(targets.modules))
    names = _Names.of_ranking(targets) if skeleton is None else _Names.of_model(skeleton)
    _check_ranked(targets, expected, names)
    for candidate in _target_candidates(targets, selected, expected - parameters):
        if parameters:
            candidate["target_parameters"] = sorted(parameters)
        config: Any = config_cls(**candidate, **kwargs)
        if names.hit_by(config) == expected:
            break
    else:
        raise ValueError(
            f"PEFT has no way to target exactly {sorted(expected)[:3]} (of {len(expected)}) in a model of type "
            f"{names.config.model_type!r}, where it takes names such as `up_proj` for fused experts. Rank the weights "
            "of such modules as parameters, by `target_parameters`."
        )
    _set_ranks(config, {name: targets.parameters[name] for name in parameters})
    if skeleton is not None:
        check_injection(config, skeleton, expected)
    return config


def _check_ranked(targets: Targets, expected: set[str], names: "_Names") -> None:
    """Check that the model is of the ranked architecture."""
    if missing := sorted(expected - names.modules - names.parameters):
        raise ValueError(
            f"The model has no modules {missing[:3]} ({len(missing)} of {len(expected)} selected modules are "
            "missing): the ranking was made on another architecture."
        )
    if targets.model_type is None:  # a ranking made by hand may cover only some layers
        return
    known = targets.of(targets.modules) | set(targets.lookalikes)
    last: dict[str, int] = {}  # ranked layer of each stack
    for stack, index in filter(None, map(split_layer, known)):
        last[stack] = max(index, last.get(stack, 0))
    endings = set(map(_last_part, known))
    alike = {name: split_layer(name) for name in names.modules if _last_part(name) in endings}
    if deeper := sorted(name for name, at in alike.items() if at and at[0] in last and at[1] > last[at[0]]):
        raise ValueError(
            f"The ranked model had no modules {deeper[:3]} ({len(deeper)} in all), which this one has: the ranking "
            "was made on another architecture."
        )


class _Names:
    """The names of a model's modules and parameters; stands in for the model when PEFT matches names."""

    def __init__(self, modules: set[str], parameters: set[str], model_type: str | None) -> None:
        self.modules = modules
        self.parameters = parameters
        self.config = SimpleNamespace(model_type=model_type)

    @classmethod
    def of_ranking(cls, targets: Targets) -> "_Names":
        parameters = set(targets.parameters)
        modules = targets.of(targets.modules) - parameters | set(targets.lookalikes)
        return cls(modules, parameters, targets.model_type)

    @classmethod
    def of_model(cls, model: nn.Module) -> "_Names":
        modules = {name for name, _ in model.named_modules() if name}
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        return cls(modules, parameters, getattr(getattr(model, "config", None), "model_type", None))

    def named_modules(self) -> Iterator[tuple[str, None]]:
        return ((name, None) for name in self.modules)

    def named_parameters(self) -> Iterator[tuple[str, None]]:
        return ((name, None) for name in self.parameters)

    def hit_by(self, config: Any) -> set[str] | None:
        """The names PEFT would adapt, after its own translation; `None` if it refuses them."""
        config = copy.deepcopy(config)
        stand_in: Any = self
        try:
            convert_peft_config_for_transformers(config, stand_in, None)
        except ValueError:
            return None
        targets = config.target_modules or ()
        modules = (name for name in self.modules if isinstance(targets, str) or _ends_in(name, targets))
        parameters = tuple(getattr(config, "target_parameters", None) or ())
        return {name for name in modules if check_target_module_exists(config, name)} | {
            name for name in self.parameters if _ends_in(name, parameters)
        }


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _ends_in(name: str, endings: Collection[str]) -> bool:
    """Whether a name is one of the endings, or ends in a dot and one. PEFT tries all of them, maybe thousands."""
    return any(name.split(".", start)[-1] in endings for start in range(name.count(".") + 1))


def _set_ranks(config: Any, multiples: Mapping[str, float]) -> None:
    """Give fused parameters the same ranks as PEFT, at the same scaling."""
    for name, multiple in multiples.items():
        if multiple != 1 and (pattern := re.escape(name)) not in config.rank_pattern:
            config.rank_pattern[pattern] = round(config.r * multiple)
            config.alpha_pattern[pattern] = config.lora_alpha * multiple


def _target_candidates(targets: Targets, selected: Sequence[str], modules: set[str]) -> Iterator[dict[str, Any]]:
    """Ways to target the modules, the most readable first. Not all of them hit only those modules."""
    if not modules:
        yield {"target_modules": []}  # `None` means PEFT's default for the model
        return
    layers = [(unit, layer) for unit in selected if (layer := split_layer(unit))]
    # units are whole layers, not modules in them
    if len(layers) == len(selected) and all(unit == f"{stack}.{index}" for unit, (stack, index) in layers):
        stacks = {stack for _, (stack, _) in layers}
        indices = sorted({index for _, (_, index) in layers})
        short = sorted(set(map(_last_part, modules)))
        within = sorted({name.removeprefix(f"{unit}.") for unit in selected for name in targets.of([unit]) & modules})
        patterns: list[str | None] = [None]
        if len(stacks) == 1:
            # PEFT inserts it in a regular expression
            stack = stacks.pop()
            patterns += [re.escape(_last_part(stack)), re.escape(stack)]
        for pattern in patterns:
            for names in (short, within):
                yield {"target_modules": names, "layers_to_transform": indices, "layers_pattern": pattern}
    yield {"target_modules": sorted(modules)}
    # one module's full name can end in another's
    yield {"target_modules": "|".join(re.escape(name) for name in sorted(modules))}
