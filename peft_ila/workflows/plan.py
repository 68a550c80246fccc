"""What fine-tuning needs of a GPU's memory, from a model's configuration alone: what `peft-ila plan` does."""

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
# of bitsandbytes' NF4 without nested quantisation: 4 bits, and 4 bytes of scale for each 64 weights
_NF4_BYTES = 0.5 + 4 / 64
ADAMW = 2  # moments of each trained parameter, as large as it
# of the logits in fp32, while the loss is differentiated: that of the log-probabilities, and that of the logits
_GRADIENTS_OF_LOGITS = 2


@dataclass
class Memory:
    """
    Bytes that a training step needs. Beside them a GPU holds its context, the kernels' workspaces, and what the
    allocator loses.

    Args:
        weights: Of the base model.
        adapter: Its weights, in fp32 as PEFT makes them.
        gradients: Of what trains.
        optimizer: AdamW's moments of what trains; in stage 2 of what stage 1 has trained, which are still held.
        activations: What is kept for the backward pass, without the logits.
        recomputed: Under gradient checkpointing, the most that one layer keeps while it is computed again.
        logits: What the loss keeps of the size of the vocabulary, and the two gradients of that size.
        trainable: The number of trained parameters, which is no number of bytes.
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
        """With the logits, and with the gradients: what the logits need is gone before a layer has gradients."""
        held = self.weights + self.adapter + self.optimizer + self.activations
        return held + self.logits, held + self.recomputed + self.gradients

    @property
    def total(self) -> int:
        """The most at any time."""
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
    What tuning a share of the units needs, by default all, 75, 50, 30 and 10 %, and what the search itself needs.

    The model is built without weights, and a training step of it is taken with tensors that have no data, so that
    what it keeps is counted, not estimated: exactly what it would keep on the CPU. The kernels of a GPU may keep
    less, such as for attention. What the backward pass works with beside that is counted of the logits only.

    Args:
        config ([`~transformers.PretrainedConfig`]): That of a causal language model.
        importance ([`LayerImportance`], *optional*):
            Which units are selected. Without it, as many decoder layers are spread evenly from the first one on, which
            is the most that so many can need.
        batch_size (`int`): The number of examples of a step.
        max_length (`int`): Their number of tokens.
        load_in_4bit (`bool`): Whether the linear layers are quantised to NF4.
        gradient_checkpointing (`bool`): Whether activations are computed again, without reentrance.
        dtype (`torch.dtype`):
            Of the weights that are not quantised, and of the activations: in half precision the step is taken under
            autocast, as trainers take it with `bf16=True`.
        shares (`list[float]`): Of the units to tune.
        r (`int`): LoRA's rank.
        **lora: Other options of [`~peft.LoraConfig`].

    Returns:
        `dict`: By the share, such as `"30%"`; `"rank"`, the search without training; and `"rank, stage 2"`, that of
        what was learned, whose first stage is as `"100%"`.

    Raises:
        ValueError: No causal language model can be built of the configuration, or the ranking is of another one.
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
    """What [`plan`] finds, in GB of 10⁹ bytes."""
    columns = ("weights", "adapter", "gradients", "optimizer", "activations", "recomputed", "logits", "total")
    lines = [f"{'GB':<14}" + "".join(f"{column:>13}" for column in columns) + f"{'trained':>14}"]
    for row, memory in needed.items():
        gigabytes = "".join(f"{getattr(memory, column) / 1e9:>13.2f}" for column in columns)
        lines.append(f"{row:<14}{gigabytes}{memory.trainable:>14,}")
    return "\n".join([*lines, "Beside it: the GPU's context, the kernels' workspaces, what the allocator loses."])


def _layers(skeleton: nn.Module, lora: dict[str, Any]) -> LayerImportance:
    """A ranking that selects decoder layers evenly, the first one always."""
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
    A training step of a model, taken without data, so that what it needs is counted.

    Args:
        skeleton: The model on the meta device.
        batch_size, max_length, load_in_4bit, gradient_checkpointing, dtype: See [`plan`].

    Raises:
        ValueError: The batch or the length is empty.
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
            untrained: Whether the step is one of the search without training: B has gradients, and nothing moments.

        Raises:
            ValueError: The step cannot be taken without data, or trains more than adapters.
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
        Where in the model the bytes are needed.

        Args:
            config: What trains.
            names: Modules, none within another.

        Returns:
            The number of trained parameters in each; and the bytes kept for the backward pass at the
            moment when each is first entered, in this order, with those of the whole pass under `""` at the end.

        Raises:
            ValueError: See [`memory`].
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
                raise ValueError(f"Only adapters are counted, but {name} is to be trained, too.")
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
                raise ValueError(f"No training step of {name} can be taken without data: {error}") from error

    def _loss(self, model: Any) -> None:
        ids = torch.zeros(self._shape, dtype=torch.long)
        half = self._dtype != torch.float32
        with torch.autocast("cpu", self._dtype) if half else contextlib.nullcontext():  # a caller's own stays
            model(input_ids=ids, labels=ids)

    def _kept(self, model: Any, vocabulary: int) -> tuple[int, int, int]:
        recomputed = self._most_of_a_layer(model) if self._checkpointing else 0
        with saved_tensors(model) as saved:
            self._loss(model)
            logits = saved.bytes(vocabulary)
            return saved.bytes() - logits, logits, recomputed

    def _most_of_a_layer(self, model: Any) -> int:
        """The most that one of the layers keeps while it is computed again."""
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
    """The number of the adapter's parameters in a module, and of those that train."""
    own = [parameter for name, parameter in module.named_parameters() if "lora_" in name]
    return sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)


@contextlib.contextmanager
def _fake(model: nn.Module) -> Iterator[None]:
    """Tensors that know their size and no data in place of all parameters and buffers, as if on the CPU."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # torch logs whatever it cannot do without data
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
