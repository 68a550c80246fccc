"""
Measures the loss and the gates' gradient with a trainer's own training step; trains nothing.

Depends on transformers' `Trainer` and accelerate's engines.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import DistributedType, find_batch_size
from torch.distributed.tensor import DTensor
from transformers import set_seed

from ..tuner.config import GateMode
from ..tuner.model import ILAModel


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
            return self._run(step, "soft" if closed else "open", closed)
        finally:
            del accelerator.backward

    @torch.no_grad()
    def evaluate(self) -> torch.Tensor:
        """The loss and the number of examples of each evaluation batch, with all gates open.

        Returns:
            Shape (batches, 2), fp32 on the CPU, from all processes.
        """
        for gate in self._gates:
            gate.mode, gate.probed = "open", False
        trainer, rows = self._trainer, []
        for batch in trainer.get_eval_dataloader():
            size = find_batch_size(batch) or 1
            loss, *_ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
            rows.append(torch.stack([loss.detach().float().mean(), torch.tensor(float(size), device=loss.device)]))
        return trainer.accelerator.gather(torch.stack(rows)).cpu()

    def gradient(self, step: Step, scores: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
        """
        The gradient and the loss of one step, means over all processes.

        Args:
            step: The step.
            scores: Shape (gates,): the gates are σ(scores), and the gradient is ∂L/∂scores. With `None` the gates
                are 0, and the gradient is ∂L/∂γ.

        Returns:
            The gradient, shape (gates,), fp32 on the CPU, and the loss.
        """
        if scores is not None:
            self.set_scores(scores.tolist())
        return self._finite(self._take_gradient, step, "soft", scores is None)

    def gradient_norms(self, step: Step) -> tuple[torch.Tensor, float]:
        """
        (α/r)·‖∂L/∂B‖₁ of each unit at B = 0, for the mean gradient over all processes, and the loss.

        Returns:
            The norms, shape (gates,), fp32 on the CPU, and the loss.
        """
        return self._open([weight for *_, weight in self._ila.zero_initialised_factors()], self._take_norms, step)

    def slope(
        self, step: Step, weights: Sequence[torch.nn.Parameter], contract: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, float]:
        """
        A linear function of one step's gradient, and the loss, means over all processes.

        Args:
            step: The step.
            weights: The weights whose gradients are computed, with all gates open.
            contract: Turns their `grad` into a tensor.
        """

        def take() -> torch.Tensor:
            taken = contract()
            for weight in weights:
                weight.grad = None
            return self._trainer.accelerator.reduce(taken.to(self._trainer.accelerator.device), "mean").cpu()

        return self._open(weights, take, step)

    def _open(
        self, weights: Iterable[torch.nn.Parameter], take: Callable[[], torch.Tensor], step: Step
    ) -> tuple[torch.Tensor, float]:
        """The result of `take` on the weights' gradients, with all gates open, and the loss."""
        self._ila.train_beside_scores(weights)
        try:
            return self._finite(take, step, "open", False)
        finally:
            self._ila.train_beside_scores(())

    def _finite(
        self, take: Callable[[], torch.Tensor], step: Step, mode: GateMode, probed: bool
    ) -> tuple[torch.Tensor, float]:
        scaler = self._trainer.accelerator.scaler  # of fp16
        while True:
            loss = self._run(step, mode, probed)
            gradient, scale = take(), scaler.get_scale() if scaler else 1.0
            if gradient.isfinite().all():
                return gradient / scale, loss
            if scale <= 1 or not math.isfinite(loss):
                raise ValueError(
                    "The gradient of the gates is not finite on a training batch. Check the data and the loss."
                )
            scaler.update(scale / 2)  # fp16 overflow: try again

    def _run(self, step: Step, mode: GateMode, probed: bool) -> float:
        for gate in self._gates:
            gate.mode, gate.probed = mode, probed
        trainer = self._trainer
        trainer.current_gradient_accumulation_steps = len(step.batches)
        # losses may change their inputs
        losses = [trainer.training_step(trainer.model, copy.copy(b), step.num_items) for b in step.batches]
        return trainer.accelerator.gather(torch.stack(losses).sum().reshape(1)).mean().item()

    def _take_gradient(self) -> torch.Tensor:
        weights = [gate.weight for gate in self._gates]
        local = torch.cat([_local_gradient(weight).to(weights[0].device) for weight in weights])
        for weight in weights:
            weight.grad = None
        if isinstance(weights[0], DTensor):
            # FSDP2 has taken the mean over the processes, and each holds a part of the scores
            return _sum_of_parts(local, weights[0]).cpu()
        return self._trainer.accelerator.reduce(local, "mean").cpu()

    def _take_norms(self) -> torch.Tensor:
        norms: dict[str, list[torch.Tensor]] = {}
        weight: Any = None
        for unit, scaling, weight in self._ila.zero_initialised_factors():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad  # an expert may get no batch
            weight.grad = None
            if isinstance(gradient, DTensor):
                gradient = gradient.to_local()
            else:
                gradient = self._trainer.accelerator.reduce(gradient, "mean")
            norms.setdefault(unit, []).append(scaling * gradient.float().abs().sum())
        device = self._gates[0].weight.device
        local = torch.stack([torch.stack([norm.to(device) for norm in own]).sum() for own in norms.values()])
        return (_sum_of_parts(local, weight) if isinstance(weight, DTensor) else local).cpu()

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


def _sum_of_parts(local: torch.Tensor, sharded: DTensor) -> torch.Tensor:
    mesh = sharded.device_mesh
    torch.distributed.all_reduce(local, group=mesh.get_group(mesh.ndim - 1))
    return local


def _local_gradient(score: torch.Tensor) -> torch.Tensor:
    if (gradient := score.grad) is None:  # no batch reached the unit
        return torch.zeros(1)
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return local.float().sum().reshape(1)  # an empty shard (another process holds the score) adds 0


@contextlib.contextmanager
def measuring(trainer: Any, ila: ILAModel, seed: int | None = None) -> Iterator[Measurement]:
    """
    Prepare a trainer's active adapter for measurement: mode "soft", no dropout, data in the seed's order.

    At the end all gates are open, those of mode "joint" folded into B, and the rest of the trainer and its model is
    restored. After an error the adapter is restored too.
    """
    seed, data_seed = (trainer.args.seed, trainer.args.data_seed) if seed is None else (seed, seed)
    with _prepared(trainer), _adapter_as_before(ila), _untouched(trainer), _evaluating(trainer.model):
        trainer.accelerator.dataloader_config.data_seed = data_seed  # accelerate orders the data by this copy of it
        set_seed(seed)
        yield Measurement(trainer, ila)


@contextlib.contextmanager
def _prepared(trainer: Any) -> Iterator[None]:
    """Prepare the model as `train` does: device, precision and gradient checkpointing."""
    model, args, trained = trainer.model, trainer.args, bool(trainer.accelerator._models)
    _shard(trainer)
    if not trained and not trainer.accelerator.is_fsdp2:
        trainer.accelerator.prepare_model(model, evaluation_mode=True)
    already = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if trained or not args.gradient_checkpointing or already:
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
def _adapter_as_before(ila: ILAModel) -> Iterator[None]:
    (name,) = ila.active_adapters
    config = ila.peft_config[name]
    mode: GateMode = config.gate_mode
    parts = (".lora_gate.", ".lora_B.", ".lora_embedding_B.") if mode == "joint" else (".lora_gate.",)
    parameters = dict(ila.model.named_parameters())
    values = {key: p.detach().clone() for key, p in parameters.items() if any(part in key for part in parts)}
    trainable = {key: p.requires_grad for key, p in parameters.items()}
    try:
        if mode == "joint":
            ila.fold_gates()
        ila.set_gate_mode("open")
        trainable_when_open = {key: p.requires_grad for key, p in parameters.items()}
        ila.change_config(name, inference_mode=False)
        ila.set_gate_mode("soft")
        yield
        mode, trainable = "open", trainable_when_open
    except BaseException:
        for key, value in values.items():
            parameters[key].data.copy_(value)
        raise
    finally:
        for gate in ila.gates().values():
            gate.probed = False
        ila.change_config(name, inference_mode=config.inference_mode)
        ila.set_gate_mode(mode)
        for key, parameter in parameters.items():
            parameter.requires_grad_(trainable[key])


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


def check_engine(accelerator: Any) -> None:
    """Refuse engines whose training steps cannot be measured."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = "DeepSpeed"  # its engine takes the optimiser's step inside `backward`
    elif accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        engine = "FSDP1"  # it fixes which parameters need gradients when it wraps the model
    else:
        return
    raise ValueError(
        f"`learn_gates` does not run under {engine}. Use DDP or FSDP2, or save the adapter by "
        "`trainer.save_model(path)` and run `peft-ila rank --adapter path`."
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
