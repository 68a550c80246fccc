"""What a selection saves while it is tuned."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class FrozenPrefix(TrainerCallback):
    """
    Spares the backward pass through the layers below the lowest one that trains, for any trainer of adapters.

    Nothing there needs a gradient. But whenever checkpointing is on, PEFT, transformers and TRL make the output of the
    embeddings require one (`enable_input_require_grads`), since reentrant checkpointing needs it; the other kind, the
    default of transformers 5, does not. While training runs, this callback cuts the graph there again. It does nothing
    if the embeddings are trained, or under reentrant checkpointing, where the lowest layer would get no gradient.
    """

    def __init__(self) -> None:
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.on_train_end(args, state, control)  # of a run that was broken off
        embeddings = model.get_input_embeddings()
        options: Any = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and options.get("use_reentrant"):
            logger.warning(
                "Reentrant gradient checkpointing computes the gradients of all layers; with `use_reentrant=False` "
                "the backward pass would end at the lowest layer that trains."
            )
        elif not any(parameter.requires_grad for parameter in embeddings.parameters()):
            # called after the hook that sets `requires_grad`, which cannot be removed once it was set twice
            self._hook = embeddings.register_forward_hook(lambda module, args, output: output.detach())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
