"""The gate inside a LoRA layer.

The gate multiplies the rank-r activation between `lora_A` and `lora_B`, not the layer's output. A factor on the output
makes autograd keep a tensor of the output's size (1.20 times the memory of a LoRA step on SmolLM2, against 0.77 here).
One hook gates every PEFT LoRA layer that calls `lora_B(lora_A(x))`, quantised or not. LoRA of a parameter (fused
experts) has no such activation: the gate multiplies one of its two factors. A variant such as DoRA is not a product:
the gate multiplies its difference from the base layer.
"""

import contextlib
import functools
from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch
from peft.tuners.lora import Embedding, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.autograd.function import once_differentiable

# "joint" and "soft": γ = σ(s); "open": γ = 1; "closed": γ = 0; "probed": γ = 0, and the gradient of s is ∂L/∂γ
GateState = Literal["joint", "soft", "open", "closed", "probed"]


class Gate(nn.Module):
    """
    The gate of one unit. Its `weight` is the score s.

    Its `state` is the adapter's mode, where "hard" makes each gate "open" or "closed". [`learn_gates`] probes gates.
    """

    def __init__(self, score: float) -> None:
        super().__init__()
        # of shape (1,), since FSDP refuses scalars; PEFT sets what trains
        self.weight = nn.Parameter(torch.full((1,), float(score)), requires_grad=False)
        self.state: GateState = "joint"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the gate to a rank-r activation of any shape and float dtype."""
        if self.state == "open":
            return x
        if self.state == "closed":
            return torch.zeros_like(x)  # a constant: nothing is kept for the backward pass
        if self.state == "probed":
            return x.detach() * (self.weight - self.weight.detach()).to(x)
        # Computed from the leaf at every call, so that a recomputed checkpoint gets its own graph. `to(x)` keeps the
        # fp32 score from promoting a bf16 activation, and moves the gate to its device.
        return x * torch.sigmoid(self.weight).to(x)

    def trains(self, name: str) -> bool:
        """Whether the state trains the weights of this name in a layer, such as `lora_A`."""
        states = ("joint", "soft", "probed") if name == "lora_gate" else ("joint", "open")
        return self.state in states

    def pre_forward_hook(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Gate the input of `lora_B`. A bound method, so that copies and pickles keep gate and layer together."""
        return None if self.state == "open" else (self(args[0]), *args[1:])


class _Gates(nn.ModuleDict):
    """A layer's `lora_gate`. PEFT sees only the gates that train: it calls a partly frozen adapter irregular."""

    def items(self) -> Any:
        gates: Any = super().items()
        return [(name, gate) for name, gate in gates if gate.trains("lora_gate")]


class _GatedModuleDict(nn.ModuleDict):
    """A layer's `lora_B`. It gates each module that PEFT adds or replaces (hot-swapping)."""

    ila_gates: dict[str, Gate]

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        self._gate(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self._gate(name)

    def _gate(self, name: str) -> None:
        if isinstance(module := self._modules.get(name), nn.Module) and name in self.ila_gates:
            hook = self.ila_gates[name].pre_forward_hook
            if hook not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(hook)


def target_name(path: str, layer: object) -> str:
    """
    The base model's name of the module or parameter that the LoRA layer at this path adapts.

    The LoRA layers of two parameters of one module are nested: the inner one is the outer one's `base_layer`.
    """
    if isinstance(layer, ParamWrapper):
        return f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
    return path.partition(".base_layer.")[0]  # `MultiheadAttention` holds a second LoRA layer, its output projection


def is_gated(module: nn.Module) -> bool:
    """Whether the module is a LoRA layer with gates (`layer.gates`, one per adapter)."""
    return isinstance(module, LoraLayer) and hasattr(module, "gates")


def forget(layer: Any, adapter_name: str) -> None:
    """Delete an adapter from a LoRA layer before a new one takes its name. Active adapters stay active."""
    active, layer._active_adapter = layer._active_adapter, []
    layer.delete_adapter(adapter_name)
    layer._active_adapter = active


def add_gate(layer: Any, adapter_name: str, gate: Gate, owner: bool) -> None:
    """
    Gate an adapter that `update_layer` has just created. The layer's class becomes the gated subclass.

    The unit's first layer, the owner, registers the gate and saves the score. The others hold a plain reference: a
    parameter registered in several modules is untied on a bf16 base and by `low_cpu_mem_usage=True`.
    """
    if not is_gated(layer):
        layer.__class__ = _gated_class(layer.__class__)
        layer.lora_gate = _Gates()
        layer.gates = {}
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_gate")
        layer.other_param_names = (*layer.other_param_names, "gates")
        layer.lora_B.__class__ = _GatedModuleDict
        layer.lora_B.ila_gates = {}
    layer.gates[adapter_name] = gate
    if owner:
        layer.lora_gate[adapter_name] = gate
        layer._move_adapter_to_device_of_base_layer(adapter_name)
    if adapter_name in layer.lora_variant:
        layer.lora_variant[adapter_name] = _GatedVariant(layer.lora_variant[adapter_name], gate)
    elif adapter_name in layer.lora_B:
        layer.lora_B.ila_gates[adapter_name] = gate
        layer.lora_B[adapter_name] = layer.lora_B[adapter_name]  # gates it
    elif isinstance(layer, Embedding):
        layer.output_fns[adapter_name] = gate  # PEFT calls it on the rank-r result of the lookup


def freeze(layer: Any, adapter_name: str, trained: Collection[str] | None = None) -> None:
    """Tell PEFT what of the adapter does not train, whatever activates it later. By default, the state decides."""
    gate = layer.gates[adapter_name]
    frozen = tuple(
        name for name in layer.adapter_layer_names if not (gate.trains(name) if trained is None else name in trained)
    )
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: frozen}


class _Probe(torch.autograd.Function):
    """
    Return a layer's output or weight unchanged, with the gate's gradient at γ = 0:
    ∂L/∂γ = scaling · ⟨∂L/∂tensor, left @ right⟩, where scaling · left @ right is the delta of the output or weight.

    Args:
        tensor: Shape (..., columns); its other dimensions hold as many rows as `left`.
        score: Shape (1,); its gradient is ∂L/∂γ.
        left: Shape (rows, r), or (experts, rows, r).
        right: Shape (r, columns), or (experts, r, columns).
        scaling: α/r.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, score: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        ctx.save_for_backward(left, right)
        ctx.scaling = scaling
        return tensor.data  # the model may change it in place, which is not allowed for a view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        left, right = ctx.saved_tensors
        rows = grad.reshape(*left.shape[:-1], grad.shape[-1])
        worth = (left.mT.to(grad.dtype) @ rows).float().mul_(right).sum()
        return grad, (worth * ctx.scaling).view(1), None, None, None


def _soft_adapter(layer: Any) -> str | None:
    """A linear layer's adapter if it alone is active, only its gate trains and its B is a bare weight."""
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.gates or layer.gates[names[0]].state not in ("soft", "probed"):
        return None
    if layer.disable_adapters or layer.merged:
        return None
    lora_B = layer.lora_B._modules.get(names[0])
    # other hooks, or another `forward`, may move, gather or change the input or weight of `lora_B`
    bare = type(lora_B) is nn.Linear and len(lora_B._forward_pre_hooks) == 1 and not lora_B._forward_hooks
    return names[0] if bare and "forward" not in vars(lora_B) else None


class _ParameterProbe(nn.Module):
    """Parametrises a parameter whose gate is probed."""

    def __init__(self, gate: Gate, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.of = (gate, left.detach(), right.detach(), scaling)  # in a tuple: else the gate is registered twice

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        gate, left, right, scaling = self.of
        return _Probe.apply(weight, gate.weight.to(weight.device), left, right, scaling)


class _GatedVariant:
    """
    A LoRA variant such as DoRA. The gate multiplies the difference of its output or merged weight from the base
    layer's: θ₀ + γ·(θ − θ₀). A and B are not gated: a factor on them would not scale this difference.
    """

    def __init__(self, variant: Any, gate: Gate) -> None:
        self.variant = variant
        self.gate = gate

    def __getattr__(self, name: str) -> Any:
        if name in ("variant", "gate"):  # during a copy
            raise AttributeError(name)
        return getattr(self.variant, name)

    def _between(self, base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return other if self.gate.state == "open" else base + self.gate(other - base)

    def forward(self, module: Any, active_adapter: str, x: Any, result: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.gate.state == "closed":
            return result
        other = self.variant.forward(module, active_adapter=active_adapter, x=x, result=result, **kwargs)
        return self._between(result, other)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        if self.gate.state != "open":  # the variant cannot unmerge a partly gated weight
            module._cache_store(f"{active_adapter}-ungated", orig_weight.detach().clone())
        return self._between(orig_weight, self.variant.merge_safe(module, active_adapter, orig_weight))

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        if self.gate.state == "open":
            self.variant.merge_unsafe(module, active_adapter, orig_weight)
        else:
            orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        if self.gate.state == "open":
            return self.variant.unmerge(module, active_adapter, orig_weight)
        module._cache_pop(f"{active_adapter}-weight_norm")
        return module._cache_pop(f"{active_adapter}-ungated")


@functools.cache
def _gated_class(base: type[LoraLayer]) -> type[LoraLayer]:
    # With a single base only, the class of an instance of `base` can be changed to the subclass.
    class Gated(base):  # type: ignore[valid-type, misc]
        def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            if adapter_name in self.gates:  # PEFT adapts a base model again without deleting the old adapter
                forget(self, adapter_name)
            super().update_layer(adapter_name, *args, **kwargs)

        def delete_adapter(self, adapter_name: str) -> None:
            super().delete_adapter(adapter_name)
            self.lora_B.ila_gates.pop(adapter_name, None)

        def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> torch.Tensor:
            delta = super().get_delta_weight(adapter, *args, **kwargs)
            gated = adapter in self.gates and adapter not in self.lora_variant
            return self.gates[adapter](delta) if gated else delta

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _new_gated, (base,), self.__dict__  # pickle cannot find this class by its name

    gated = _gated_parameter(Gated) if issubclass(base, ParamWrapper) else _gated_module(Gated)
    # PEFT prints the name, and recognises linear layers by it
    gated.__name__ = gated.__qualname__ = base.__name__
    gated.__module__ = base.__module__
    return gated


def _gated_parameter(gated: Any) -> Any:
    class GatedParameter(gated):
        @contextlib.contextmanager
        def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
            probed = [name for name in active_adapters if name in self.gates and self.gates[name].state == "probed"]
            if len(active_adapters) != 1 or not probed or self.num_experts == 1:
                with super()._activate_lora(active_adapters):
                    yield
                return
            # like PEFT, but returns the parameter itself: autograd would keep a sum of its size
            probe = _ParameterProbe(self.gates[probed[0]], *super().get_delta_factors(probed[0]))
            module, name = self.get_base_layer(), self.parameter_name
            requires_grad = self.get_param().requires_grad
            nn.utils.parametrize.register_parametrization(module, name, probe)
            module.parametrizations[name].original.requires_grad_(requires_grad)
            try:
                with nn.utils.parametrize.cached():
                    yield
            finally:
                self._remove_parametrizations()

        def get_delta_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, float]:
            left, right, scaling = super().get_delta_factors(adapter)
            return left, self.gates[adapter](right) if adapter in self.gates else right, scaling

    return GatedParameter


def _gated_module(gated: Any) -> Any:
    class GatedModule(gated):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            adapter = _soft_adapter(self)
            if adapter is None or len(args) != 1 or kwargs:  # such as the adapters of a mixed batch
                return super().forward(*args, **kwargs)
            # Most of a step in "soft" is the frozen model's. PEFT's own forward pass adds three tensors of the
            # output's size to the backward pass, and copies the output of a 4-bit layer.
            (x,) = args
            output = self.base_layer(x)
            gate, lora_A, lora_B = self.gates[adapter], self.lora_A[adapter], self.lora_B[adapter]
            with torch.set_grad_enabled(torch.is_grad_enabled() and gate.state != "probed"):
                x = self._cast_input_dtype(x, lora_A.weight.dtype)
                rank_r = lora_A(self.lora_dropout[adapter](x))
            scaling = self.scaling[adapter]
            if gate.state == "probed":
                rank_r = rank_r.reshape(-1, rank_r.shape[-1])
                return _Probe.apply(output, gate.weight.to(output.device), rank_r, lora_B.weight.t(), scaling)
            rank_r = rank_r * scaling
            if rank_r.dtype != output.dtype:
                return (output + lora_B(rank_r)).to(output.dtype)
            base, rank_r = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (output, gate(rank_r)))
            return torch.addmm(base, rank_r, lora_B.weight.t()).view(output.shape)

        def _embed(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            output = super()._embed(input, weight, *args, **kwargs)
            if "output_fn" not in kwargs:  # mixed-adapter batches do not pass it
                (name,) = (name for name in self.gates if self.lora_embedding_A[name].is_set_to(weight.T))
                output = output if name in self.lora_variant else self.gates[name](output)
            return output

    return GatedModule


def _new_gated(base: type[LoraLayer]) -> LoraLayer:
    cls = _gated_class(base)
    return cls.__new__(cls)
