"""The two stages in a user's own trainer: EpsilonStability ends the first, learn_gates is the second."""

import contextlib
import copy
import functools
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from transformers import (
    DefaultFlowCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import CallbackHandler

from .attribution import ROUND, GateAttribution, StopWhenSettled, attributions, samples_of, steps_to_settle
from .importance import LayerImportance
from .model import ILAModel

if TYPE_CHECKING:
    from .layer import Gate

logger = logging.getLogger(__name__)

# What `learn_gates` keeps of the trainer's callbacks: logging and progress, not what steers the first stage.
_LOGGING_CALLBACKS = (
    DefaultFlowCallback,
    PrinterCallback,
    DEFAULT_PROGRESS_CALLBACK,
    *dict.fromkeys(INTEGRATION_TO_CALLBACK.values()),
)


class EpsilonStability(TrainerCallback):
    """
    Ends training once it is ε-stable: |E[L(θ_{t+1})] − E[L(θ_t)]| < ε for every later t (section 2 of the paper,
    https://huggingface.co/papers/2410.17875), with the expectation replaced by a moving average.

    At every logged loss, the mean of the last `window` logged losses is compared with the mean of the `window` before
    them. When they differ by less than `epsilon` at `patience` logged losses in a row, training stops. Evaluation
    data are not needed. All processes see the same logged loss and so decide alike. A resumed run decides as an
    unbroken one: the losses are in the trainer's checkpoint.

    Args:
        epsilon (`float`): The greatest change of the smoothed loss that counts as stable, in the unit of the loss.
            The paper gives no figure; 0.02 is an assumed default.
        window (`int`): The number of logged losses to average, each the mean over `logging_steps` steps. Assumed
            default.
        patience (`int`): How many comparisons in a row must be stable. Assumed default.

    Attributes:
        change (`float`): The last difference of the two means; NaN before there were enough losses.
        stopped_at (`int`): The step at which training was stopped; `None` before.

    Raises:
        ValueError: A setting is out of range; on the start of training, logging is off; during training, the loss is
            NaN or infinite (for that, `logging_nan_inf_filter` of the training arguments is switched off).
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

    def _observe(self, loss: float) -> None:
        self._losses = [*self._losses, loss][-2 * self.window :]
        if len(self._losses) == 2 * self.window:
            self.change = (sum(self._losses[self.window :]) - sum(self._losses[: self.window])) / self.window
            self._stable = self._stable + 1 if abs(self.change) < self.epsilon else 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.logging_strategy == "no":
            raise ValueError('EpsilonStability reads the logged loss; `logging_strategy` must not be "no".')
        # The filter replaces a NaN by the mean of the losses before it, which would look stable.
        args.logging_nan_inf_filter = False
        self._reset()
        for log in state.log_history:  # of the run that is resumed
            if "loss" in log:
                self._observe(log["loss"])
        self.stopped_at = state.global_step if self._stable >= self.patience else None
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
        self._observe(loss)
        if math.isnan(self.change):
            return
        logger.info(
            f"step {state.global_step}: the smoothed loss changed by {self.change:+.4f} over {self.window} logs, "
            f"stable for {self._stable} of {self.patience} (epsilon {self.epsilon})"
        )
        self.stopped_at = state.global_step if self._stable >= self.patience else None
        if self.stopped_at is not None:
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        figures = f"smoothed loss changed by {self.change:+.4f}, epsilon {self.epsilon}"
        if self.stopped_at is not None:
            logger.info(f"Training is stable at step {self.stopped_at} ({figures}).")
        else:
            logger.warning(
                f"Training ended at step {state.global_step} before it was stable ({figures}): a ranking made now may "
                "change with more training."
            )


def learn_gates(
    trainer: Trainer,
    steps: int = 32,
    min_agreement: float | None = 0.8,
    loss_batches: int = 8,
    seed: int | None = None,
    resume_from_checkpoint: str | bool | None = None,
) -> LayerImportance:
    """
    Learn the gates of a fine-tuned ILA model and rank its units (stage 2).

    The weight deltas are frozen and only the scores get gradients, on the trainer's own data and loss. All gates are
    closed, at the base model, and each step measures −∂L/∂γ of all of them on one batch. The mean over the batches,
    the attribution of a unit, is the first-order term of what its delta alone is worth there. The score is
    n·attribution / Σ attributions − 1, for n units: a gate above ½ means that the unit is worth more than the mean.

    The paper descends on the scores of the fine-tuned model instead. At a stable point the loss is flat in every gate,
    and that ranks little better than chance; a budget's pressure mends it, but ranks worse than the gradient at the
    base model, at the same cost (docs/results.md compares them).

    The trainer's training arguments hold here too (batch size, gradient accumulation, precision, logging), except
    for those of the optimiser. Of its callbacks, those for logging and progress are called. Nothing is evaluated,
    checkpoints go to `gates/` in the output directory if the trainer saves any (none under FSDP2), and the trainer's
    own state stays.

    Afterwards A and B are bit-identical and the gates are open: the model computes what it did after stage 1. If
    stage 1 was trained in mode "joint", its gates are first folded into B, so that Δθ is what was trained.

    Args:
        trainer (`transformers.Trainer`):
            The trainer of stage 1, such as TRL's `SFTTrainer`, whose model is a `PeftModel` with one active ILA
            adapter.
        steps (`int`):
            The greatest number of steps, at least 4. The ranking from 32 batches of 8 examples was as good as settled,
            that from 8 not far behind (docs/defaults.md).
        min_agreement (`float`, *optional*):
            Stop when the ranking has settled: when the rankings from the first half of the steps and from all of them
            have overlaps of the top 30 % and 75 % and a Spearman correlation of at least this much, three times in a
            row. `None` takes all steps.
        loss_batches (`int`): The number of batches to measure L(0) and L(1) on, before anything else.
        seed (`int`, *optional*): For the order of the data, by default the trainer's `seed` and `data_seed`. The
            same seed gives the same scores.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            A checkpoint of this stage, or `True` for the last one in `gates/`. The other arguments must be those of
            the run that wrote it; the scores are then those of an unbroken run.

    Returns:
        [`LayerImportance`]: The ranking, from 8 steps on with the standard error of each score over the batches. Its
        metadata holds the settings, both losses and the sum of the attributions.

    Raises:
        TypeError: The trainer's model is not an ILA model.
        ValueError: A setting is out of range, the adapter is masked or merged, the deltas do not lower the loss (all
            of them, or a small part of all), a loss or gradient is not finite, or the trainer runs under DeepSpeed,
            FSDP1, or FSDP2 with its own activation checkpointing or with an adapter in half precision.
    """
    _check_engine(trainer.accelerator)
    ila = _ila_model(trainer)
    check_settings(steps, min_agreement, loss_batches)
    (adapter_name,) = ila.active_adapters
    config = ila.peft_config[adapter_name]
    if config.gate_mode == "hard":
        raise ValueError('The adapter is masked (mode "hard"); call `set_gate_mode("open")` to rank all its units.')
    ila.check_unmerged(adapter_name)
    if config.gate_mode == "soft":  # A and B were trained with open gates, whatever the scores are
        ila.set_gate_mode("open")

    _shard(trainer)
    model: Any = trainer.model
    was_training = model.training
    stage = _stage_trainer(trainer, steps, seed)
    seed = stage.args.seed
    with _data_seed(stage):
        set_seed(seed)
        closed, opened = measure_losses(stage, loss_batches)
        if not closed > opened:
            raise ValueError(
                f"The adapter does not lower the loss on its own training data ({closed:.4f} without it, "
                f"{opened:.4f} with it), so there is nothing to rank. Fine-tune longer, or rank on a loss that falls "
                "as the model gets better."
            )
        _shard(trainer)  # the scores are changed, not a copy that a forward pass has gathered
        if config.gate_mode == "joint":
            ila.fold_gates()
        inference_mode = config.inference_mode
        requires_grad = {name: p.requires_grad for name, p in ila.model.named_parameters()}
        gates = list(ila.gates().values())
        try:
            ila.change_config(adapter_name, inference_mode=False)
            ila.set_gate_mode("soft")
            for gate in gates:
                gate.probed = True
            # The trainer would group the scores by the names of their parameters, which changes their order.
            stage.optimizer = GateAttribution(gate.weight for gate in gates)
            if min_agreement is not None:
                stage.add_callback(StopWhenSettled(min_agreement))
            set_seed(seed)
            stage.train(resume_from_checkpoint=resume_from_checkpoint)
            # A run that is resumed at its end takes a step too many.
            samples = samples_of(stage.optimizer)[:steps]
            if min_agreement is not None:
                samples = samples[: steps_to_settle(samples, min_agreement)]
            worth, error = attributions(samples)
            attributed = worth.sum().item()
            if not attributed > 0:
                raise ValueError(
                    f"The adapter lowers the loss ({closed:.4f} without it, {opened:.4f} with it), but a small part "
                    f"of it raises the loss: the attributions add up to {attributed:.4f}. Fine-tune with a lower "
                    "learning rate, or take more steps."
                )
            mean = attributed / len(gates)
            _shard(trainer)
            for gate, value in zip(gates, (worth / mean - 1).tolist()):
                gate.weight.data.fill_(value)
        finally:
            for gate in gates:
                gate.probed = False
            ila.change_config(adapter_name, inference_mode=inference_mode)
            model.train(was_training)
            ila.set_gate_mode("open")
            for name, parameter in ila.model.named_parameters():
                parameter.requires_grad_(requires_grad[name])

    importance = ila.layer_importance()
    if len(samples) >= 2 * ROUND:
        importance.spread = (error / mean).tolist()
    importance.metadata["learn_gates"] = {
        "steps": steps,
        "steps_taken": len(samples),
        "min_agreement": min_agreement,
        "seed": seed,
        "batch_size": stage.get_total_train_batch_size(stage.args),
        "loss_closed": closed,
        "loss_open": opened,
        "attributed": attributed,
    }
    data = trainer.train_dataset
    importance.metadata["data"] = {
        "name": getattr(getattr(data, "info", None), "dataset_name", None),
        "examples": len(data) if isinstance(data, Sized) else None,
    }
    return importance


def check_settings(steps: int, min_agreement: float | None, loss_batches: int = 1) -> None:
    """
    Check arguments of [`learn_gates`], for callers that have other work to do before.

    Raises:
        ValueError: One is out of range.
    """
    for name, value, least in (("steps", steps, ROUND), ("loss_batches", loss_batches, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value}.")
    if min_agreement is not None and not 0 < min_agreement <= 1:
        raise ValueError(f"`min_agreement` must be in (0, 1], got {min_agreement}.")


def _check_engine(accelerator: Any) -> None:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # its engine takes the optimiser's step inside `backward`, and rounds the scores to bf16
        engine = "DeepSpeed"
    elif accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        engine = "version 1 of FSDP"  # which parameters need gradients is fixed when it wraps the model, for good
    elif accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.activation_checkpointing:
        # accelerate would wrap the layers again
        engine = "FSDP's own activation checkpointing (the trainer's `gradient_checkpointing` is fine)"
    else:
        return
    raise ValueError(
        f"`learn_gates` does not run under {engine}. Save the adapter that stage 1 has trained, "
        "`trainer.save_model(path)`, and rank it in a new run under DDP or FSDP2, on the command line by "
        "`peft-ila rank --adapter path`."
    )


def _shard(trainer: Trainer) -> None:
    """Under FSDP2, shard a model that has not been trained before, and one that a forward pass left whole."""
    if not trainer.accelerator.is_fsdp2:
        return
    from torch.distributed.fsdp import FSDPModule

    model: Any = trainer.model
    half = (torch.float16, torch.bfloat16)
    if any(ILAModel.prefix in name and p.dtype in half for name, p in model.named_parameters()):
        raise ValueError(
            "Under FSDP2 `learn_gates` needs an adapter in fp32, as PEFT makes it by `autocast_adapter_dtype=True`: "
            "sharded scores cannot be cast."
        )
    if not isinstance(model, FSDPModule):
        # accelerate takes a model only with an optimiser; this one has nothing to train
        trainer.accelerator.prepare(model, torch.optim.SGD([next(model.parameters())]))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _ila_model(trainer: Trainer) -> ILAModel:
    model = trainer.accelerator.unwrap_model(trainer.model)
    ila = getattr(model, "base_model", None)
    if not isinstance(ila, ILAModel):
        raise TypeError(
            "`learn_gates` needs a trainer whose model was made by `get_peft_model(model, ILAConfig(...))`, got "
            f"{type(model).__name__}."
        )
    if len(ila.active_adapters) != 1:
        raise ValueError(f"Exactly one adapter must be active, got {ila.active_adapters}.")
    return ila


def _stage_trainer(trainer: Trainer, steps: int, seed: int | None) -> Any:
    """A second trainer on the model, data and loss of the first, which keeps its own state."""
    stage: Any = copy.copy(trainer)
    stage.args = copy.copy(trainer.args)
    stage.args.output_dir = os.path.join(stage.args.output_dir, "gates")
    stage.args.max_steps = steps
    if seed is not None:
        stage.args.seed = stage.args.data_seed = seed
    stage.args.lr_scheduler_type = "constant"
    stage.args.lr_scheduler_kwargs = {}
    stage.args.warmup_steps = 0
    stage.args.weight_decay = 0.0
    stage.args.max_grad_norm = math.inf  # nothing is clipped, but fp16 gradients are unscaled
    stage.args.eval_strategy = "no"
    stage.args.eval_on_start = False
    stage.args.load_best_model_at_end = False
    stage.args.push_to_hub = False
    stage.args.neftune_noise_alpha = stage.neftune_noise_alpha = None  # the losses are measured without noise
    stage.args.save_only_model = False  # what was measured is in the optimiser
    stage.model_init = stage.optimizer = stage.lr_scheduler = None
    # a subclass's own would put others in place of those of this stage
    stage.create_optimizer = functools.partial(Trainer.create_optimizer, stage)
    stage.create_scheduler = functools.partial(Trainer.create_scheduler, stage)
    if stage.accelerator.is_fsdp2:
        # For a model that is sharded already, accelerate finds an optimiser's parameters by the address of their
        # shards, which an empty shard does not have: the state of the optimiser cannot be saved.
        stage.args.save_strategy = "no"
    stage.model_wrapped = stage.model  # which parameters need gradients is fixed when a model is wrapped
    stage.control = TrainerControl()
    callbacks = [
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, _LOGGING_CALLBACKS)
    ]
    stage.callback_handler = CallbackHandler(callbacks, stage.model, stage.processing_class, None, None)
    if "_metrics" in vars(stage):  # what TRL's trainers have gathered for their next log
        stage._metrics = copy.deepcopy(stage._metrics)
    return stage


@contextlib.contextmanager
def _data_seed(stage: Any) -> Iterator[None]:
    # accelerate, which both trainers share, orders the data by its own copy of `data_seed`
    config = stage.accelerator.dataloader_config
    before, config.data_seed = config.data_seed, stage.args.data_seed
    try:
        yield
    finally:
        config.data_seed = before


@contextlib.contextmanager
def _closed(gates: Iterable["Gate"]) -> Iterator[None]:
    # not `disable_adapter`, which switches `modules_to_save` off too
    before = [(gate, gate.mode, gate.kept) for gate in gates]
    try:
        for gate, _, _ in before:
            gate.mode, gate.kept = "hard", False
        yield
    finally:
        for gate, mode, kept in before:
            gate.mode, gate.kept = mode, kept


@torch.no_grad()
def measure_losses(trainer: Any, batches: int) -> tuple[float, float]:
    """
    The trainer's loss on its first training batches with all gates closed and as they are.

    Args:
        trainer: A trainer whose model is an ILA model.
        batches: The number of batches, each weighted alike. Batches without a label, whose mean is NaN, are left out.

    Returns:
        Both means over all processes, the one with closed gates first.

    Raises:
        ValueError: No batch gives a finite loss.
    """
    gates = list(_ila_model(trainer).gates().values())
    losses: list[list[float]] = []
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        for inputs in islice(trainer.get_train_dataloader(), batches):
            inputs = trainer._prepare_inputs(inputs)
            row = []
            for context in (_closed(gates), contextlib.nullcontext()):
                with context, trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(trainer.model, copy.copy(inputs))
                row.append(trainer.accelerator.gather(loss.detach().reshape(1)).mean().item())
            if math.isfinite(row[0]):
                losses.append(row)
    finally:
        trainer.model.train(was_training)
    if not losses:
        raise ValueError(f"None of the first {batches} training batches gives a finite loss of the base model.")
    closed, opened = zip(*losses)
    return sum(closed) / len(losses), sum(opened) / len(losses)
