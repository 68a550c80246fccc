"""The GPU memory of fine-tuning, from a model's configuration alone: `peft-ila plan`."""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    def total(self) -> int:
        """The peak of the step. The logits are freed before any layer has gradients."""
        held = self.weights + self.adapter + self.optimizer + self.activations
        return held + max(self.logits, self.recomputed + self.gradients)


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
            The ranking that selects the units. Without it, the first decoder layers are tuned, which need the most
            memory.
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
    """A ranking of the decoder layers, the first one first."""
    own = ILAConfig(**{"target_modules": "all-linear", **lora})
    model: Any = _inject(copy.deepcopy(skeleton), own)
    for position, gate in enumerate(model.gates().values()):
        gate.weight = nn.Parameter(torch.tensor([-float(position)]))
    ranking: LayerImportance = model.layer_importance()
    return ranking


def _inject(skeleton: nn.Module, config: PeftConfig) -> PeftModel:
    with torch.device("meta"):
        return get_peft_model(skeleton, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)


@dataclass
class Step:
    """
    A training step of a model, run without data to count its memory.

    Args:
        skeleton: The model on the meta device; it gets the dtype.
        batch_size, max_length, load_in_4bit, gradient_checkpointing, dtype: See [`plan`].
    """

    skeleton: Any
    batch_size: int = StepArguments.per_device_train_batch_size
    max_length: int = StepArguments.max_length
    load_in_4bit: bool = StepArguments.load_in_4bit
    gradient_checkpointing: bool = StepArguments.gradient_checkpointing
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_length < 1:
            raise ValueError(
                f"The batch size and the length must be at least 1, got {self.batch_size} and {self.max_length}."
            )
        self.skeleton.to(self.dtype)

    def memory(self, config: PeftConfig, untrained: bool = False) -> Memory:
        """
        Args:
            config: The adapter.
            untrained: Whether the step is of the search without training: only B has gradients, nothing has moments.
        """
        model: Any = _inject(copy.deepcopy(self.skeleton), config)
        adapter = trainable = gates = 0
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                if untrained and (".lora_A." in name or ".lora_embedding_B." in name):
                    parameter.requires_grad_(False)
                parameter.data = parameter.data.float()
                adapter += parameter.numel()
                trainable += parameter.numel() if parameter.requires_grad else 0
                gates += parameter.numel() if "lora_gate" in name else 0
            elif parameter.requires_grad:
                raise ValueError(f"Only adapters are counted, but {name} is also trainable.")
        if isinstance(model.base_model, ILAModel):
            for gate in model.gates().values():
                gate.state = "probed"
        vocabulary = model.get_input_embeddings().num_embeddings
        activations, logits, recomputed = self._kept(model, vocabulary)
        return Memory(
            weights=self._weights(),
            adapter=adapter * 4,
            gradients=trainable * 4,
            optimizer=0 if untrained else (adapter - gates) * 4 * ADAMW,
            activations=activations,
            recomputed=recomputed,
            logits=logits + self.batch_size * self.max_length * vocabulary * 4 * _GRADIENTS_OF_LOGITS,
            trainable=trainable,
        )

    def _kept(self, model: Any, vocabulary: int) -> tuple[int, int, int]:
        """The bytes kept for the backward pass: without the logits, of the logits, and of a recomputed layer."""
        base, recomputed = model.get_base_model().train(), 0
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                model.to_empty(device="cpu")
                if self.gradient_checkpointing:
                    recomputed = self._most_of_a_layer(model)
                    # "gradient" before transformers 5.23
                    kind = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
                    getattr(base, f"{kind}_checkpointing_enable")({"use_reentrant": False})
                with saved_tensors(model) as saved:
                    self._forward(model)
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            raise ValueError(f"A training step of {type(base).__name__} cannot run without data: {error}") from error
        logits = saved.bytes(vocabulary)
        return saved.bytes() - logits, logits, recomputed

    def _most_of_a_layer(self, model: Any) -> int:
        """The most that one of the layers keeps without checkpointing, as while it is recomputed."""
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        kept = [0]  # after each layer
        with saved_tensors(model) as saved:
            hooks = [layer.register_forward_hook(lambda *args: kept.append(saved.bytes())) for layer in layers]
            self._forward(model)
        for hook in hooks:
            hook.remove()
        return max((after - before for before, after in pairwise(kept)), default=0)

    def _forward(self, model: Any) -> None:
        ids = torch.zeros(self.batch_size, self.max_length, dtype=torch.long)
        half = self.dtype != torch.float32
        with torch.autocast("cpu", self.dtype) if half else contextlib.nullcontext():  # else the caller's
            model(input_ids=ids, labels=ids)

    def _weights(self) -> int:
        linear = set()
        if self.load_in_4bit:
            head = self.skeleton.get_output_embeddings()
            linear = {m.weight for m in self.skeleton.modules() if isinstance(m, nn.Linear) and m is not head}
        return round(
            sum(p.numel() * (_NF4_BYTES if p in linear else p.element_size()) for p in self.skeleton.parameters())
        )
