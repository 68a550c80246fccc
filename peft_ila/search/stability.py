"""EpsilonStability ends stage 1."""

import logging
import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class EpsilonStability(TrainerCallback):
    """
    Ends training once it is ε-stable: |E[L(θ_{t+1})] − E[L(θ_t)]| < ε for every later t (section 2 of the paper,
    https://huggingface.co/papers/2410.17875). A moving average replaces the expectation.

    Each logged loss triggers a comparison: the mean of the last `window` losses with the mean of the `window` before.
    Training stops when the two differ by less than `epsilon` at `patience` logged losses in a row. Evaluation data
    are not needed. All processes see the same logged loss and decide alike. A resumed run decides like an
    uninterrupted one, since the trainer's checkpoint holds the losses.

    Args:
        epsilon (`float`): The loss is stable if its moving average changes by less. The paper gives no value; 0.02 is
            assumed.
        window (`int`): The number of logged losses to average; each is the mean over `logging_steps` steps. Assumed
            default.
        patience (`int`): How many comparisons in a row must be stable. Assumed default.

    Attributes:
        change (`float`): The latest difference of the two means; NaN until there are enough losses.
        stopped_at (`int`): The step at which training stopped; `None` before.

    Raises:
        ValueError: A setting is out of range, logging is off when training starts, or the loss becomes NaN or
            infinite (the callback switches `logging_nan_inf_filter` off to see this).
    """

    def __init__(self, epsilon: float = 0.02, window: int = 5, patience: int = 3) -> None:
        if not epsilon > 0:
            raise ValueError(f"`epsilon` must be greater than 0, got {epsilon}.")
        for name, value in (("window", window), ("patience", patience)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value}.")
        self.epsilon = epsilon
        self.window = window
        self.patience = patience
        self._reset()

    def _reset(self) -> None:
        self.change = math.nan
        self.stopped_at: int | None = None
        self._losses: list[float] = []
        self._stable = 0

    def _observe(self, loss: float, step: int) -> None:
        self._losses = [*self._losses, loss][-2 * self.window :]
        if len(self._losses) == 2 * self.window:
            self.change = (sum(self._losses[self.window :]) - sum(self._losses[: self.window])) / self.window
            self._stable = self._stable + 1 if abs(self.change) < self.epsilon else 0
            self.stopped_at = step if self._stable >= self.patience else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.logging_strategy == "no":
            raise ValueError('EpsilonStability reads the logged loss; `logging_strategy` must not be "no".')
        # The filter replaces NaN by the mean of the losses before, which would look stable.
        args.logging_nan_inf_filter = False
        self._reset()
        for log in state.log_history:  # of a resumed run
            if "loss" in log:
                self._observe(log["loss"], int(log["step"]))
        needed = math.ceil((2 * self.window + self.patience - 1) * state.logging_steps)
        if args.logging_strategy == "steps" and needed > state.max_steps:
            logger.warning(
                f"EpsilonStability needs {needed} steps to decide (window {self.window}, patience {self.patience}, "
                f"logging_steps {state.logging_steps}), but training ends after {state.max_steps}."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise ValueError(
                f"The training loss is {loss} at step {state.global_step}; training has diverged. Lower the learning "
                "rate or check the data."
            )
        self._observe(loss, state.global_step)
        if not math.isnan(self.change):
            logger.info(
                f"step {state.global_step}: the smoothed loss changed by {self.change:+.4f} over {self.window} logs, "
                f"stable for {self._stable} of {self.patience} (epsilon {self.epsilon})"
            )
        if self.stopped_at is not None:
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        figures = f"smoothed loss changed by {self.change:+.4f}, epsilon {self.epsilon}"
        if math.isnan(self.change):
            figures = f"{len(self._losses)} losses were logged, but comparing needs {2 * self.window}"
        if self.stopped_at is not None:
            logger.info(f"Training is stable at step {self.stopped_at} ({figures}).")
        else:
            logger.warning(
                f"Training ended at step {state.global_step} before it was stable ({figures}). The ranking may "
                "change with more training."
            )
