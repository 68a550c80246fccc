"""The GPU memory of fine-tuning, from a model's configuration alone: `peft-ila plan`."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from ..export.skeleton import meta_skeleton
from ..measure import saved_tensors
from ..ranking.importance import LayerImportance
from ..tuner.config import ILAConfig
from ..tuner.model import ILAModel
from .arguments import LORA_R, StepArguments

SHARES = (1.0, 0.75, 0.5, 0.3, 0.1)
# bitsandbytes' NF4 without nested quantisation: 4 bits, and a scale of 4 bytes per 64 weights
_NF4_BYTES = 0.5 + 4 / 64
ADAMW = 2  # moments per trained parameter, of its size
# in fp32, in the backward pass of the loss: of the log-probabilities and of the logits
_GRADIENTS_OF_LOGITS = 2


@dataclass
class Memory:
    """
    The memory of a training step, in bytes. The GPU's context, the kernels' workspaces and the allocator's losses are
    not counted.

    Args:
        weights: The base model's weights.
        adapter: The adapter's weights, in fp32 as PEFT makes them.
        gradients: The gradients of the trainable parameters.
        optimizer: AdamW's moments; in stage 2, those of stage 1, which are still held.
        activations: The tensors kept for the backward pass, without the logits.
        recomputed: Under gradient checkpointing, the most that one layer keeps while it is recomputed.
        logits: The tensors of the vocabulary's size that the loss keeps, and two gradients of that size.
        trainable: The number of trainable parameters, not of bytes.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    recomputed: int
    logits: int
    trainable: int

    @property
    def peaks(self) -> tuple[int, int]:
        """The peaks with the logits and with the gradients. The logits are freed before any layer has gradients."""
        held = self.weights + self.adapter + self.optimizer + self.activations
        return held + self.logits, held + self.recomputed + self.gradients

    @property
    def total(self) -> int:
        """The peak of the step."""
        return max(self.peaks)


def plan(
    config: PretrainedConfig,
    importance: LayerImportance | None = None,
    batch_size: int = StepArguments.per_device_train_batch_size,
    max_length: int = StepArguments.max_length,
    load_in_4bit: bool = StepArguments.load_in_4bit,
    gradient_checkpointing: bool = StepArguments.gradient_checkpointing,
    dtype: torch.dtype = torch.bfloat16,
    shares: Sequence[float] = SHARES,
    r: int = LORA_R,
    **lora: Any,
) -> dict[str, Memory]:
    """
    The memory of tuning all, 75, 50, 30 and 10 % of the units (by default), and of the search.

    The model is built without weights and runs a training step with tensors without data. So the tensors kept for the
    backward pass are counted exactly, as on the CPU. A GPU's kernels may keep less, such as for attention. Of the
    temporary tensors of the backward pass, only those of the logits are counted.

    Args:
        config ([`~transformers.PretrainedConfig`]): The configuration of a causal language model.
        importance ([`LayerImportance`], *optional*):
            The ranking that selects the units. Without it, decoder layers are spread evenly from the first one on,
            which needs the most memory.
        batch_size (`int`): The number of examples per step.
        max_length (`int`): The number of tokens per example.
        load_in_4bit (`bool`): Whether the linear layers are quantised to NF4.
        gradient_checkpointing (`bool`): Whether activations are recomputed (non-reentrant).
        dtype (`torch.dtype`):
            The dtype of the activations and of the weights that are not quantised. In half precision, the step runs
            under autocast, as in trainers with `bf16=True`.
        shares (`list[float]`): The shares of units to tune.
        r (`int`): LoRA's rank.
        **lora: Other options of [`~peft.LoraConfig`].

    Returns:
        `dict`: A [`Memory`] for each share, such as `"30%"`; for `"rank"`, the search without training; and for
        `"rank, stage 2"`, the search after training, whose stage 1 needs as much as `"100%"`.

    Raises:
        ValueError: The configuration makes no causal language model, or the ranking is of another one.
    """
    lora["r"] = r
    skeleton = meta_skeleton(config, importance.units if importance else ())
    if importance is None:
        importance = _layers(skeleton, lora)
    step = Step(skeleton, batch_size, max_length, load_in_4bit, gradient_checkpointing, dtype)
    needed = {}
    for share in shares:
        needed[f"{share:.0%}"] = step.memory(importance.to_lora_config(top_p=share, model=config, **lora))
    whole = importance.to_lora_config(top_p=1.0, **lora)
    granularity = importance.metadata.get("granularity", "layer")
    needed["rank"] = step.memory(whole, untrained=True)
    needed["rank, stage 2"] = step.memory(ILAConfig.from_lora(whole, granularity=granularity, gate_mode="soft"))
    return needed


def table(needed: dict[str, Memory]) -> str:
    """The result of [`plan`], in GB of 10⁹ bytes."""
    columns = ("weights", "adapter", "gradients", "optimizer", "activations", "recomputed", "logits", "total")
    lines = [f"{'GB':<14}" + "".join(f"{column:>13}" for column in columns) + f"{'trained':>14}"]
    for row, memory in needed.items():
        gigabytes = "".join(f"{getattr(memory, column) / 1e9:>13.2f}" for column in columns)
        lines.append(f"{row:<14}{gigabytes}{memory.trainable:>14,}")
    return "\n".join([*lines, "Not counted: the GPU's context, the kernels' workspaces, the allocator's losses."])


def _layers(skeleton: nn.Module, lora: dict[str, Any]) -> LayerImportance:
    """A ranking that selects decoder layers evenly, always including the first."""
    own = ILAConfig(**{"target_modules": "all-linear", **lora})
    model: Any = _inject(copy.deepcopy(skeleton), own)
    for gate in model.gates().values():
        gate.weight = nn.Parameter(torch.zeros(1))
    ranking: LayerImportance = model.layer_importance()
    order: list[int] = []
    for parts in (2**k for k in range(20)):  # 0, then ½, ¼ ¾, …
        order += [i for i in range(0, len(ranking.units), max(1, len(ranking.units) // parts)) if i not in order]
    scores = {position: float(-rank) for rank, position in enumerate(order)}
    ranking.scores = [scores[position] for position in range(len(ranking.units))]
    return ranking


def _inject(skeleton: nn.Module, config: PeftConfig) -> PeftModel:
    with torch.device("meta"):
        return get_peft_model(skeleton, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)


class Step:
    """
    A training step of a model, run without data to count its memory.

    Args:
        skeleton: The model on the meta device.
        batch_size, max_length, load_in_4bit, gradient_checkpointing, dtype: See [`plan`].
    """

    def __init__(
        self,
        skeleton: nn.Module,
        batch_size: int,
        max_length: int,
        load_in_4bit: bool,
        gradient_checkpointing: bool,
        dtype: torch.dtype,
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"The batch size and the length must be at least 1, got {batch_size} and {max_length}.")
        self._skeleton: Any = skeleton.to(dtype)
        self._shape = (batch_size, max_length)
        self._four_bit = load_in_4bit
        self._checkpointing = gradient_checkpointing
        self._dtype = dtype

    def memory(self, config: PeftConfig, untrained: bool = False) -> Memory:
        """
        Args:
            config: The adapter.
            untrained: Whether the step is of the search without training: only B has gradients, nothing has moments.
        """
        model = self._with_adapter(config)
        for name, parameter in model.named_parameters():
            if untrained and (".lora_A." in name or ".lora_embedding_B." in name):
                parameter.requires_grad_(False)
        adapter, trainable = _adapter(model)
        gates = sum(p.numel() for name, p in model.named_parameters() if "lora_gate" in name)
        vocabulary = model.get_input_embeddings().num_embeddings
        with self._without_data(model):
            activations, logits, recomputed = self._kept(model, vocabulary)
        return Memory(
            weights=self._weights(),
            adapter=adapter * 4,
            gradients=trainable * 4,
            optimizer=0 if untrained else (adapter - gates) * 4 * ADAMW,
            activations=activations,
            recomputed=recomputed,
            logits=logits + self._shape[0] * self._shape[1] * vocabulary * 4 * _GRADIENTS_OF_LOGITS,
            trainable=trainable,
        )

    def memory_by_module(self, config: PeftConfig, names: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
        """
        The memory by module.

        Args:
            config: The adapter.
            names: Modules, none inside another.

        Returns:
            The number of trainable parameters in each; and the bytes kept for the backward pass when each is first
            entered, in this order, with the total under `""` at the end.
        """
        model = self._with_adapter(config)
        base = model.get_base_model()
        trained = {name: _adapter(base.get_submodule(name))[1] for name in names}
        kept: dict[str, int] = {}
        named = {base.get_submodule(name): name for name in names}

        def enter(module: nn.Module, args: Any) -> None:
            kept.setdefault(named[module], saved.bytes())

        with self._without_data(model), saved_tensors(model) as saved:
            for module in named:
                module.register_forward_pre_hook(enter)
            self._loss(model)
            return trained, {**kept, "": saved.bytes()}

    def _with_adapter(self, config: PeftConfig) -> Any:
        model: Any = _inject(copy.deepcopy(self._skeleton), config)
        if isinstance(model.base_model, ILAModel):
            for gate in model.gates().values():
                gate.probed = True
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
            elif parameter.requires_grad:
                raise ValueError(f"Only adapters are counted, but {name} is also trainable.")
        return model

    @contextlib.contextmanager
    def _without_data(self, model: Any) -> Iterator[None]:
        base = model.get_base_model()
        with _fake(model):
            try:
                base.train()
                if self._checkpointing:
                    # "gradient" before transformers 5.23
                    kind = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
                    getattr(base, f"{kind}_checkpointing_enable")({"use_reentrant": False})
                yield
            except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
                name = type(base).__name__
                raise ValueError(f"A training step of {name} cannot run without data: {error}") from error

    def _loss(self, model: Any) -> None:
        ids = torch.zeros(self._shape, dtype=torch.long)
        half = self._dtype != torch.float32
        with torch.autocast("cpu", self._dtype) if half else contextlib.nullcontext():  # else the caller's
            model(input_ids=ids, labels=ids)

    def _kept(self, model: Any, vocabulary: int) -> tuple[int, int, int]:
        recomputed = self._most_of_a_layer(model) if self._checkpointing else 0
        with saved_tensors(model) as saved:
            self._loss(model)
            logits = saved.bytes(vocabulary)
            return saved.bytes() - logits, logits, recomputed

    def _most_of_a_layer(self, model: Any) -> int:
        """The most that one of the layers keeps while it is recomputed."""
        before, most = 0, 0

        def enter(layer: nn.Module, args: Any) -> None:
            nonlocal before
            before = saved.bytes()

        def leave(layer: nn.Module, args: Any, output: Any) -> None:
            nonlocal most
            most = max(most, saved.bytes() - before)

        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
        hooks += [layer.register_forward_hook(leave) for layer in layers]
        for layer in layers:
            layer.gradient_checkpointing = False
        with saved_tensors(model) as saved:
            self._loss(model)
        for layer in layers:
            layer.gradient_checkpointing = True
        for hook in hooks:
            hook.remove()
        return most

    def _weights(self) -> int:
        linear = set()
        if self._four_bit:
            head = self._skeleton.get_output_embeddings()
            linear = {m.weight for m in self._skeleton.modules() if isinstance(m, nn.Linear) and m is not head}
        return round(
            sum(p.numel() * (_NF4_BYTES if p in linear else p.element_size()) for p in self._skeleton.parameters())
        )


def _adapter(module: nn.Module) -> tuple[int, int]:
    """The numbers of adapter parameters and of trainable ones in a module."""
    own = [parameter for name, parameter in module.named_parameters() if "lora_" in name]
    return sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)


@contextlib.contextmanager
def _fake(model: nn.Module) -> Iterator[None]:
    """Replace all parameters and buffers with tensors without data, as if on the CPU."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # torch logs operations that need data
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                        module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
            yield
    finally:
        logging.disable(level)
