"""Freezes all but a selection, and ends the backward pass at the lowest layer that trains."""

import contextlib
import logging
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class FrozenPrefix(TrainerCallback):
    """
    Ends the backward pass at the lowest layer that trains, for any trainer.

    The layers below need no gradient. But under gradient checkpointing, PEFT, transformers and TRL make the output of
    the embeddings require one (`enable_input_require_grads`), since reentrant checkpointing needs it. During training,
    this callback cuts the graph there. It does nothing if the embeddings train, or under reentrant checkpointing,
    where the lowest layer would get no gradient. Non-reentrant checkpointing is the default of transformers 5, but not
    of `prepare_model_for_kbit_training`: pass `gradient_checkpointing_kwargs={"use_reentrant": False}` there.
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.on_train_end(args, state, control)  # of an interrupted run
        if _checkpoints_reentrantly(model):
            logger.warning(
                "Reentrant gradient checkpointing computes the gradients of all layers. With `use_reentrant=False` "
                "the backward pass ends at the lowest layer that trains."
            )
            return
        for embeddings in _input_embeddings(model):
            if not any(parameter.requires_grad for parameter in embeddings.parameters()):
                # runs after the hook that sets `requires_grad`, which cannot be removed once it is set twice
                self._hooks.append(embeddings.register_forward_hook(lambda module, args, output: output.detach()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _checkpoints_reentrantly(model: nn.Module) -> bool:
    # asks the model, not the trainer: checkpointing may be enabled by hand
    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in modules]
    # without a setting, as in a model's own code, torch's default holds
    return any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions)


def _input_embeddings(model: nn.Module) -> set[nn.Module]:
    """The embeddings of each inner model, such as an image encoder, as `enable_input_require_grads` finds them."""
    found = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            with contextlib.suppress(NotImplementedError):
                found.add(module.get_input_embeddings())
    return {embeddings for embeddings in found if isinstance(embeddings, nn.Module)}


def freeze(model: nn.Module, units: Iterable[str], all_but: bool = False) -> list[str]:
    """
    Set `requires_grad=False` on all parameters of the units, or on all but these. A tied weight is frozen only if all
    its names are to be frozen.

    Args:
        model: A plain model, without adapters.
        units: Names of modules and parameters.
        all_but: Whether to freeze everything but the units.

    Returns:
        The names of the frozen parameters, in the order of the model.

    Raises:
        TypeError: `units` is a string.
        ValueError: The model lacks a unit; then nothing is frozen.
    """
    if isinstance(units, str):
        raise TypeError(f"`units` must be a list of names, got the string {units!r}.")
    own = set(units)
    check_units(model, own)
    prefixes = tuple(f"{unit}." for unit in own)
    # by `id`, since one tied weight may be inside and outside of the units
    kept = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if (name in own or name.startswith(prefixes)) == all_but
    }
    names = [name for name, parameter in model.named_parameters() if id(parameter) not in kept]
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names


def check_units(model: nn.Module, units: Collection[str]) -> None:
    """Raise a `ValueError` if the model lacks one of the units."""
    known = {name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))}
    if missing := sorted(set(units) - known):
        raise ValueError(
            f"The model has no {missing[0]!r} ({len(missing)} of {len(units)} units are missing). Pass the plain "
            "model that was ranked, not a `PeftModel` or another architecture."
        )
