"""
Measures the loss and the gates' gradient with a trainer's own training step; trains nothing.

Depends on transformers' `Trainer` and accelerate's engines.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import set_seed
from transformers.trainer_pt_utils import find_batch_size

from ..tuner.layer import GateState
from ..tuner.model import ILAModel
from ..units import unit_of

# What gets gradients: the scores; or B, and both factors of an embedding, of which A starts at 0.
SCORES = ("lora_gate",)
FACTORS = ("lora_B", "lora_embedding_A", "lora_embedding_B")


class Step(NamedTuple):
    """The batches of one step (several under gradient accumulation) and their total number of labels."""

    batches: list[Any]
    num_items: torch.Tensor | int | None


class Measurement:
    """Losses and gradients of a trainer's steps. Made by [`measuring`]."""

    def __init__(self, trainer: Any, ila: ILAModel) -> None:
        self._trainer = trainer
        self._ila = ila
        self._gates = list(ila.gates().values())

    def steps(self) -> Iterator[Step]:
        """The steps of the training data, pass after pass, without those that have no label."""
        trainer = self._trainer
        loader, size = trainer.get_train_dataloader(), trainer.args.gradient_accumulation_steps
        try:
            for epoch in itertools.count():
                if hasattr(loader, "set_epoch"):
                    loader.set_epoch(epoch)
                iterator, found = iter(loader), False
                with _end_of_stream(trainer.train_dataset):
                    while (step := Step(*trainer.get_batch_samples(iterator, size, trainer.args.device))).batches:
                        if step.num_items is None or step.num_items > 0:  # a mean over no labels is NaN
                            found = True
                            yield step
                if not found:
                    return
        finally:
            if hasattr(loader, "end"):  # else accelerate keeps an unfinished loader active
                loader.end()

    @torch.no_grad()
    def loss(self, step: Step, closed: bool) -> float:
        """The loss of one step with all gates at 0 or at 1, the mean over all processes."""
        accelerator = self._trainer.accelerator
        accelerator.backward = lambda loss, **kwargs: None  # the last thing that a training step does
        try:
            return self._run(step, "probed" if closed else "open")
        finally:
            del accelerator.backward

    @torch.no_grad()
    def evaluate(self) -> torch.Tensor:
        """The loss and the number of examples of each evaluation batch, with all gates open.

        Returns:
            Shape (batches, 2), fp32 on the CPU, from all processes. The loss of a batch without labels is NaN.
        """
        for gate in self._gates:
            gate.state = "open"
        trainer, rows = self._trainer, []
        for batch in trainer.get_eval_dataloader():
            size = find_batch_size(batch) or 1
            loss, *_ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
            if loss is None:
                raise ValueError(
                    f"The trainer computes no loss on the held-out data, whose batches have {sorted(batch)}. Name "
                    "their labels by `label_names` in the training arguments."
                )
            rows.append(torch.stack([loss.detach().float().mean(), torch.tensor(float(size), device=loss.device)]))
        if not rows:
            raise ValueError("The held-out data give no batch. Check the data and `dataloader_drop_last`.")
        return trainer.accelerator.gather(torch.stack(rows)).cpu()

    def gradient(self, step: Step, scores: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
        """
        The gradient of one step, shape (gates,), fp32 on the CPU, and the loss, means over all processes.

        With `scores` of shape (gates,) the gates are σ(scores), and the gradient is ∂L/∂scores. Without them the gates
        are 0, and the gradient is ∂L/∂γ.
        """
        if scores is not None:
            self.set_scores(scores.tolist())
        return self._take(step, "probed" if scores is None else "soft", self._score_gradients)

    def gradient_norms(self, step: Step) -> tuple[torch.Tensor, float]:
        """
        (α/r)·‖∂L/∂B‖₁ of each unit at B = 0, shape (gates,), fp32 on the CPU, and the loss. The gradient is one step's
        mean over all processes.
        """
        return self._take(step, "open", self._norms)

    def slope(self, step: Step, contract: Callable[[], torch.Tensor]) -> torch.Tensor:
        """
        A linear function of one step's gradient, with all gates open, the mean over all processes. `contract` turns
        the `grad` of B into a tensor.
        """
        accelerator = self._trainer.accelerator
        return self._take(step, "open", lambda: accelerator.reduce(contract().to(accelerator.device), "mean"))[0]

    def _take(self, step: Step, state: GateState, take: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
        """What `take` makes of the gradients, if it is finite, on the CPU, and the loss."""
        scaler = self._trainer.accelerator.scaler  # of fp16
        while True:
            loss = self._run(step, state)
            taken, scale = take().cpu(), scaler.get_scale() if scaler else 1.0
            self._trainer.model.zero_grad()
            if taken.isfinite().all():
                return taken / scale, loss
            if scale <= 1 or not math.isfinite(loss):
                raise ValueError(
                    "The gradient of the gates is not finite on a training batch. Check the data and the loss."
                )
            scaler.update(scale / 2)  # fp16 overflow: try again

    def _run(self, step: Step, state: GateState) -> float:
        for gate in self._gates:
            gate.state = state
        trainer = self._trainer
        trainer.current_gradient_accumulation_steps = len(step.batches)
        # losses may change their inputs
        losses = [trainer.training_step(trainer.model, copy.copy(b), step.num_items) for b in step.batches]
        return trainer.accelerator.gather(torch.stack(losses).sum().reshape(1)).mean().item()

    def _gradient(self, weight: torch.nn.Parameter) -> torch.Tensor:
        """In fp32 on one device: this process's own, or under FSDP2 the mean over all."""
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad  # no batch may reach an expert
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        return whole.to(self._trainer.accelerator.device, torch.float32)

    def _score_gradients(self) -> torch.Tensor:
        # one exchange for all gates; the mean of FSDP2's equal means is the same
        return self._trainer.accelerator.reduce(
            torch.cat([self._gradient(gate.weight) for gate in self._gates]), "mean"
        )

    def _norms(self) -> torch.Tensor:
        (adapter,) = self._ila.active_adapters
        granularity = self._ila.peft_config[adapter].granularity
        norms: dict[str, Any] = dict.fromkeys(self._ila.gates(), 0.0)
        for module, scaling, *factors in self._ila.factors():
            for weight in factors:
                if weight.requires_grad:  # beside a factor that is 0, the other has no gradient
                    gradient = self._trainer.accelerator.reduce(self._gradient(weight), "mean")
                    norms[unit_of(module, granularity)] += scaling * gradient.abs().sum()
        return torch.stack(list(norms.values()))

    def set_scores(self, scores: Iterable[float]) -> None:
        _shard(self._trainer)  # so that this changes the scores, not a gathered copy
        for gate, score in zip(self._gates, scores):
            gate.weight.data.fill_(score)


@contextlib.contextmanager
def _end_of_stream(dataset: Any) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # accelerate raises it when a one-pass stream is read again
        if not isinstance(dataset, torch.utils.data.IterableDataset) or "does not contain any data" not in str(error):
            raise


@contextlib.contextmanager
def measuring(
    trainer: Any, ila: ILAModel, seed: int | None = None, trained: Collection[str] = SCORES
) -> Iterator[Measurement]:
    """
    Prepare a trainer for measurement: data in the seed's order, no dropout, and the active adapter as
    [`ILAModel.measured`] has it. The gradients are those of `trained`.

    At the end the trainer and its model are restored, but all gates are open.
    """
    seed, data_seed = (trainer.args.seed, trainer.args.data_seed) if seed is None else (seed, seed)
    with _prepared(trainer), ila.measured(trained), _untouched(trainer), _evaluating(trainer.model):
        trainer.accelerator.dataloader_config.data_seed = data_seed  # accelerate orders the data by this copy of it
        set_seed(seed)
        yield Measurement(trainer, ila)


@contextlib.contextmanager
def _prepared(trainer: Any) -> Iterator[None]:
    """Prepare the model as `train` does: device, precision and gradient checkpointing."""
    model, args = trainer.model, trainer.args
    _shard(trainer)
    if not trainer.accelerator._models and not trainer.accelerator.is_fsdp2:
        trainer.accelerator.prepare_model(model, evaluation_mode=True)
    already = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if already or not args.gradient_checkpointing:
        yield
        return
    kwargs = dict(args.gradient_checkpointing_kwargs or {})
    for own in ("every_n_layers", "offload"):  # the trainer's own; which layers are checkpointed changes no result
        kwargs.pop(own, None)
    # "gradient" before transformers 5.23
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")(kwargs or None)
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()


@contextlib.contextmanager
def _untouched(trainer: Any) -> Iterator[None]:
    """Restore the trainer's attributes at the end, with the metrics that TRL gathers for the next log."""
    before, metrics = dict(vars(trainer)), copy.deepcopy(vars(trainer).get("_metrics"))
    data, scaler = trainer.accelerator.dataloader_config, trainer.accelerator.scaler
    data_seed, scale = data.data_seed, scaler.get_scale() if scaler else 1.0
    trainer.optimizer = None  # a schedule-free one would move the weights
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(before)
        if metrics is not None:
            trainer._metrics = metrics
        data.data_seed = data_seed
        if scaler and scaler.get_scale() != scale:
            scaler.update(scale)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Switch off training-only effects on the loss, such as dropout, but not gradient checkpointing."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    checkpointed = [module for module in training if getattr(module, "gradient_checkpointing", False)]
    rates = [(m, k, v) for m in checkpointed for k, v in vars(m).items() if isinstance(v, float) and "drop" in k]
    for module in checkpointed:
        module.training = True  # transformers checkpoints only in training
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    model.train = lambda mode=True: model  # training steps call it
    try:
        yield
    finally:
        del model.train
        for module, name, rate in rates:
            setattr(module, name, rate)
        for module, was in training.items():
            module.training = was


def check_engine(trainer: Any) -> None:
    """Refuse engines whose training steps cannot be measured."""
    accelerator = trainer.accelerator
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = "DeepSpeed"  # its engine takes the optimiser's step inside `backward`
    elif accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        engine = "FSDP1"  # it fixes which parameters need gradients when it wraps the model
    elif trainer.args.n_gpu > 1:
        engine = f"`DataParallel`, which splits each batch over {trainer.args.n_gpu} GPUs"
    else:
        return
    raise ValueError(
        f"`learn_gates` and `prune` do not run under {engine}. Use one GPU (`CUDA_VISIBLE_DEVICES=0`), DDP, or "
        "FSDP2 to rank. To keep a trained adapter, save it by `trainer.save_model(path)` and run `peft-ila rank "
        "--adapter path` or `peft-ila prune path`."
    )


def _shard(trainer: Any) -> None:
    """Under FSDP2, shard a model that has not been trained, or that a forward pass left whole."""
    if not trainer.accelerator.is_fsdp2:
        return
    from torch.distributed.fsdp import FSDPModule

    model, half = trainer.model, (torch.float16, torch.bfloat16)
    if any(ILAModel.prefix in name and p.dtype in half for name, p in model.named_parameters()):
        raise ValueError(
            "Under FSDP2 `learn_gates` needs an adapter in fp32, since sharded scores cannot be cast. Use "
            "PEFT's default, `autocast_adapter_dtype=True`."
        )
    if not isinstance(model, FSDPModule):
        # accelerate takes a model only with an optimiser; this one takes no step
        trainer.accelerator.prepare(model, torch.optim.SGD([next(model.parameters())]))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
