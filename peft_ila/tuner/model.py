"""ILAModel: injection, modes, masks and scores of gated LoRA."""

import contextlib
import copy
import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.save_and_load import _validate_lora_adapter_state_dict
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import nn

from ..choices import Ranks
from ..export.adapters import SAVED_PREFIX, save_adapter
from ..export.plain import to_plain_lora
from ..export.ranks import to_reduced_lora
from ..ranking.importance import LayerImportance
from ..units import unit_of
from ..version import __version__
from .config import GateMode, ILAConfig
from .layer import Gate, GateState, add_gate, forget, freeze, is_gated, target_name

_TIED = (
    "ILA does not support `ensure_weight_tying` for embeddings and a head that adapters target: tied adapters share "
    "their weights but would get separate gates. Leave both out of `target_modules`, or leave out "
    "`ensure_weight_tying`."
)


class Factors(NamedTuple):
    """
    The factors of one weight delta (α/r)·B·A.

    `a` has the shape (r, in), and `b` (out, r); those of a convolution have its kernel's dimensions after these.
    """

    module: str
    scaling: float
    a: nn.Parameter
    b: nn.Parameter


class ILAModel(LoraModel):
    """
    LoRA with one learnable gate per unit that multiplies the weight deltas: W = W₀ + γ·(α/r)·B·A, γ = σ(s).

    The method is described in https://huggingface.co/papers/2410.17875. Create the model with
    `get_peft_model(model, ILAConfig(...))`. All methods can be called on the [`~peft.PeftModel`].

    Args:
        model ([`torch.nn.Module`]): The model to adapt.
        config ([`ILAConfig`]): The configuration of the model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on the meta device, to load faster.
    """

    peft_config: dict[str, Any]

    # `prefix`, `tuner_layer_cls` and `target_module_mapping` are LoRA's: the prefix `lora_` makes PEFT and
    # transformers save, load and merge the scores with the LoRA weights.

    def _create_and_replace(  # type: ignore[override]  # as in LoraModel
        self, lora_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, **kwargs: Any
    ) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, **kwargs)
        # a parameter that is wrapped for another adapter gets no second layer
        added = isinstance(target, ParamWrapper) and target.parameter_name == kwargs.get("parameter_name")
        self._add_gate(target if added else getattr(parent, target_name), kwargs["current_key"], adapter_name)

    def _add_gate(self, target: nn.Module, name: str, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        unit = unit_of(name, config.granularity)
        others = [] if unit == name else self.model.get_submodule(unit).modules()
        gate = next((m.gates[adapter_name] for m in others if is_gated(m) and adapter_name in m.gates), None)
        owner = gate is None
        # `MultiheadAttention` holds a second LoRA layer, its output projection
        for module in [target] if isinstance(target, ParamWrapper) else list(target.modules()):
            if isinstance(module, LoraLayer):
                gate = gate or Gate(config.gate_init)
                add_gate(module, adapter_name, gate, owner)
                owner = False

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        raise ValueError(_TIED)

    # PEFT makes the next three checks only for the type LORA.

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        super()._check_target_module_compatiblity(LoraConfig(), model, target_name)

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        state_dict = super()._get_adapter_state_dict(*args, **kwargs)
        _validate_lora_adapter_state_dict(state_dict, adapter_name=kwargs["adapter_name"])
        return state_dict

    def _target_experts(self, model: nn.Module, adapter_name: str) -> None:
        # PEFT translates "all-linear" and the names of fused experts into `target_parameters` only for the type LORA.
        config = self.peft_config[adapter_name]
        config.peft_type = PeftType.LORA
        try:
            convert_peft_config_for_transformers(config, model, None)
        finally:
            config.peft_type = PeftType("ILA")

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _check_tokens(model, self.peft_config[adapter_name].trainable_token_indices)
        self._target_experts(model, adapter_name)
        self.check_unmerged(adapter_name)
        for module in model.modules():  # `get_peft_model` may be called again on a base model
            if isinstance(module, LoraLayer) and adapter_name in module.r:
                forget(module, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._settle(adapter_name)

    def _settle(self, adapter_name: str) -> None:
        disable_cpu_4bit_packing(self.model)
        parameters = {
            path: name for path, name, layer in self._gated_layers(adapter_name) if isinstance(layer, ParamWrapper)
        }
        self._change(adapter_name, **({"gated_parameters": parameters} if parameters else {}))

    @classmethod
    def from_lora(cls, model: PeftModel, **gate_options: Any) -> PeftModel:
        """
        Gate a model's LoRA adapters in place, to rank trained LoRA adapters by stage 2 alone.

        Args:
            model ([`~peft.PeftModel`]): A model with LoRA adapters only.
            **gate_options: `granularity`, `gate_init`, `gate_mode` of [`ILAConfig`]; by default the gates are open.

        Returns:
            [`~peft.PeftModel`]: The same model.

        Raises:
            TypeError: The model has adapters of another method.
            ValueError: An option of an adapter would bypass the gate.
        """
        tuner: Any = model.base_model
        if type(tuner) is not LoraModel:
            raise TypeError(f"`model` must be a PeftModel with LoRA adapters, got one with {type(tuner).__name__}.")
        if any(getattr(config, "target_modules_to_tie", None) for config in tuner.peft_config.values()):
            raise ValueError(_TIED)
        configs = {
            name: ILAConfig.from_lora(cast(LoraConfig, config), **{"gate_mode": "open", **gate_options})
            for name, config in tuner.peft_config.items()
        }
        tuner.__class__ = cls
        model.peft_type = PeftType("ILA")
        tuner.peft_config.update(configs)  # the dict is shared by the model, the tuner and the base model
        for key, layer in list(tuner.model.named_modules()):
            if isinstance(layer, LoraLayer) and (isinstance(layer, ParamWrapper) or ".base_layer." not in key):
                for name in configs:
                    if name in layer.r:
                        tuner._add_gate(layer, target_name(key, layer), name)
        for name in configs:
            tuner._settle(name)
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # PEFT translates the names of older transformers only for the type LORA
        state_dict = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), state_dict, adapter_name)
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if config.gate_mode == "hard" and not config.inference_mode:
            _check_mask(model, adapter_name, state_dict)
        scores = [key for key, _ in model.named_parameters() if key.endswith(f".lora_gate.{adapter_name}.weight")]
        saved = [key for key in state_dict if ".lora_gate." in key]
        if not saved:  # a plain LoRA adapter: its scores start at `gate_init`
            return state_dict | {key: torch.full((1,), float(config.gate_init)) for key in scores}
        # transformers' own loading strips this prefix later
        ours, theirs = ({key.removeprefix(SAVED_PREFIX) for key in keys} for keys in (scores, saved))
        if difference := sorted(ours ^ theirs):
            raise ValueError(
                f"The adapter has {len(saved)} gates, but the model has {len(scores)} for it: {difference[0]!r} is "
                "in only one of them. Load the adapter into the base model it was trained on."
            )
        return state_dict

    def set_gate_mode(self, mode: GateMode, adapter_name: str | None = None) -> None:
        """
        Set how the gates act and what trains, see [`ILAConfig`]. The mode is saved with the adapter.

        In mode "soft" the scores are at least fp32, whatever cast them before, LoRA's dropout is off, and
        `modules_to_save` and biases are frozen.

        Args:
            mode (`str`): `"joint"`, `"open"`, `"soft"` or `"hard"`; `"hard"` restores the last mask.
            adapter_name (`str`, *optional*): The adapter, by default the active ones.

        Raises:
            ValueError: The mode is unknown, the adapter does not exist or is merged, or `"hard"` has no mask.
        """
        for name in self._adapter_names(adapter_name):
            self.check_unmerged(name)
            self._change(name, gate_mode=mode)

    def apply_mask(self, units: Iterable[str], adapter_name: str | None = None) -> None:
        """
        Set mode "hard": γ = 1 for these units, which train, and 0 for the rest, which are frozen.

        Args:
            units (`Iterable[str]`): The units to keep, such as `importance.select(top_p=0.3)`.
            adapter_name (`str`, *optional*): The adapter, by default the active ones.

        Raises:
            ValueError: `units` is empty or names a unit that the adapter does not have.
        """
        mask = units if isinstance(units, str) else list(units)  # a string is refused
        for name in self._adapter_names(adapter_name):
            self.check_unmerged(name)
            self._change(name, gate_mode="hard", gate_mask=mask)

    def _change(self, adapter_name: str, trained: Collection[str] | None = None, **options: Any) -> None:
        """
        Bring the model to an adapter's mode, after setting these options in a copy of its configuration, which other
        models may share. What of its layers trains is `trained`, such as `lora_B`, or what the mode says.
        """
        config = copy.copy(self.peft_config[adapter_name])
        vars(config).update(options)
        config.check_gates()
        gates = self.gates(adapter_name)
        states: dict[str, GateState] = dict.fromkeys(gates, config.gate_mode)
        if config.gate_mode == "hard":
            kept = set(config.gate_mask)
            if unknown := sorted(kept - gates.keys()):
                raise ValueError(
                    f"Adapter {adapter_name!r} has no units {unknown[:5]} ({len(unknown)} of {len(kept)} are unknown) "
                    f"but {len(gates)} others, such as {next(iter(gates))!r}. Was the mask made on another model?"
                )
            config.gate_mask = [unit for unit in gates if unit in kept]
            states = {unit: "open" if unit in kept else "closed" for unit in gates}
        if options:
            self.peft_config[adapter_name] = config
        for unit, gate in gates.items():
            gate.state = states[unit]
        for *_, layer in self._gated_layers(adapter_name):
            freeze(layer, adapter_name, trained)
        if adapter_name in self.active_adapters:
            self._mark_only_adapters_as_trainable(self.model)
            self.set_adapter(self.active_adapter, inference_mode=config.inference_mode)
        self._settle_dropout_and_dtype(adapter_name)

    @contextlib.contextmanager
    def measured(self, trained: Collection[str] = ("lora_gate",)) -> Iterator[None]:
        """
        Let the loss of the active adapter be measured, with any gates, and the gradients of `trained`, the parts of
        the layers.

        The mode is "soft", also of an adapter that was loaded for inference, and the gates of mode "joint" are folded
        into B. At the end all gates are open. After an error the adapter is as before, whatever the block has done to
        the scores, or to A and B of a trained adapter if B is in `trained`.
        """
        (name,) = self.active_adapters
        config = self.peft_config[name]
        mode = config.gate_mode
        weights = [gate.weight for gate in self.gates(name).values()]
        # a fresh adapter is only measured, and a copy of it would count in the memory of a search without training
        if mode == "joint" or ("lora_B" in trained and self.is_trained(name)):
            weights += [weight for *_, a, b in self.factors(name) for weight in (a, b)]
        before = [(weight, weight.detach().clone()) for weight in weights]
        trainable = [p for n, p in self.model.named_parameters() if ".lora_" not in n and p.requires_grad]
        try:
            if mode == "joint":
                self._fold(name)
            self._change(name, trained, gate_mode="soft", inference_mode=False)
            yield
            mode = "open"
        except BaseException:
            for weight, value in before:
                weight.data.copy_(value)
            raise
        finally:
            self._change(name, gate_mode=mode, inference_mode=config.inference_mode)
            for parameter in trainable:  # also those of the base model that were set by hand
                parameter.requires_grad_(True)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._freeze_outside()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_outside()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._freeze_outside()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._freeze_outside()

    def _freeze_outside(self) -> None:
        # In mode "soft" the layers freeze A and B; this freezes biases and `modules_to_save`.
        if any(self.peft_config[name].gate_mode == "soft" for name in self.active_adapters):
            for name, parameter in self.model.named_parameters():
                if ".lora_" not in name:
                    parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "ILAModel":
        super().train(mode)
        for name, config in self.peft_config.items():
            if config.gate_mode == "soft":
                self._settle_dropout_and_dtype(name)
        return self

    def _settle_dropout_and_dtype(self, adapter_name: str) -> None:
        # Repeated by `train()`, since trainers cast trainable parameters later: TRL's QLoRA path makes them bf16,
        # where one step at s = 4 is 0.03 and an update vanishes.
        soft = self.peft_config[adapter_name].gate_mode == "soft"
        for *_, layer in self._gated_layers(adapter_name):
            if adapter_name in layer.lora_dropout:
                layer.lora_dropout[adapter_name].train(layer.training and not soft)
            score = layer.gates[adapter_name].weight
            if soft and score.dtype in (torch.float16, torch.bfloat16):
                score.data = score.data.float()

    def _adapter_names(self, adapter_name: str | None) -> list[str]:
        if adapter_name is None:
            return self.active_adapters
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name!r} does not exist; the model has {sorted(self.peft_config)}.")
        return [adapter_name]

    def _one_adapter(self, adapter_name: str | None) -> str:
        names = self._adapter_names(adapter_name)
        if len(names) != 1:
            raise ValueError(f"{len(names)} adapters are active: {names}. Pass `adapter_name` to choose one.")
        return names[0]

    def _gated_layers(self, adapter_name: str) -> Iterator[tuple[str, str, Any]]:
        """The path of each layer, the name of its target in the base model, and the layer."""
        for path, module in self.model.named_modules():
            if is_gated(module) and adapter_name in module.gates:
                yield path, target_name(path, module), module

    def gates(self, adapter_name: str | None = None) -> dict[str, Gate]:
        """The gates of an adapter, by default the active one, by unit in model order."""
        adapter_name = self._one_adapter(adapter_name)
        granularity = self.peft_config[adapter_name].granularity
        return {
            unit_of(name, granularity): layer.gates[adapter_name]
            for _, name, layer in self._gated_layers(adapter_name)
        }

    def layer_importance(self, adapter_name: str | None = None) -> LayerImportance:
        """
        Make a ranking, independent of the model, from the scores of an adapter, by default the active one.

        Under FSDP2, call it on all processes.

        Raises:
            ValueError: A score is not finite.
        """
        adapter_name = self._one_adapter(adapter_name)
        config = self.peft_config[adapter_name]
        gated = {name: layer for _, name, layer in self._gated_layers(adapter_name)}
        modules: dict[str, list[str]] = {}
        for name in gated:
            modules.setdefault(unit_of(name, config.granularity), []).append(name)
        last_components = {name.rpartition(".")[2] for name in gated}
        others = [name for name, _ in self.model.named_modules() if name not in gated]
        parameters = {name: layer for name, layer in gated.items() if isinstance(layer, ParamWrapper)}
        return LayerImportance(
            units=list(modules),
            scores=[_whole(gate.weight).item() for gate in self.gates(adapter_name).values()],
            metadata={
                "model": config.base_model_name_or_path,
                "model_type": getattr(getattr(self.model, "config", None), "model_type", None),
                "task_type": config.task_type,
                "granularity": config.granularity,
                "r": config.r,
                "lora_alpha": config.lora_alpha,
                "versions": {
                    "peft-ila": __version__,
                    **{module.__name__: module.__version__ for module in (peft, torch, transformers)},
                },
            },
            modules=modules,
            lookalikes=[name for name in others if name.rpartition(".")[2] in last_components],
            parameters={name: layer.r[adapter_name] / config.r for name, layer in parameters.items()},
        )

    def factors(self, adapter_name: str | None = None) -> Iterator[Factors]:
        """The factors of each weight delta, in model order."""
        adapter_name = self._one_adapter(adapter_name)
        for _, name, layer in self._gated_layers(adapter_name):
            if adapter_name in layer.lora_A:
                a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            else:
                a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
            yield Factors(name, layer.scaling[adapter_name], a, b)

    def is_trained(self, adapter_name: str | None = None) -> bool:
        """
        Whether an adapter, by default the active one, changes the model; a fresh one does not.

        Under FSDP2, call it on all processes.
        """
        return any(bool(_whole(a).any() and _whole(b).any()) for *_, a, b in self.factors(adapter_name))

    def check_unmerged(self, adapter_name: str) -> None:
        """Raise a `ValueError` if the adapter is merged: if its gates changed, it could not be unmerged."""
        if any(adapter_name in layer.merged_adapters for *_, layer in self._gated_layers(adapter_name)):
            raise ValueError(f"Adapter {adapter_name!r} is merged; call `unmerge_adapter` to change its gates.")

    def fold_gates(self, adapter_name: str | None = None) -> None:
        """
        Multiply the gates into B and open them. The outputs stay the same.

        The scores keep their values and the mode becomes "open". [`learn_gates`] calls this after a "joint" stage 1.

        Args:
            adapter_name (`str`, *optional*): The adapter, by default the active ones.

        Raises:
            ValueError: The adapter is merged or uses DoRA.
        """
        for name in self._adapter_names(adapter_name):
            self.check_unmerged(name)
            self._fold(name)
            self._change(name, gate_mode="open")

    @torch.no_grad()
    def _fold(self, adapter_name: str) -> None:
        if self.peft_config[adapter_name].use_dora:
            raise ValueError(
                f"Adapter {adapter_name!r} is a DoRA adapter, so its gates cannot be multiplied into B. Train it in "
                'mode "open".'
            )
        gates = [layer.gates[adapter_name] for *_, layer in self._gated_layers(adapter_name)]
        for gate, (*_, b) in zip(gates, self.factors(adapter_name)):
            b.copy_(gate(b))
        for gate in gates:  # several layers may share one
            gate.state = "open"

    def to_lora(
        self, output_dir: str | os.PathLike[str], adapter_name: str | None = None, ranks: Ranks | None = None
    ) -> LoraConfig:
        """
        Write an equivalent plain LoRA adapter: gates multiplied into B, closed units left out.

        `PeftModel.from_pretrained` and servers for LoRA adapters load it without peft-ila.

        Args:
            output_dir (`str`): Where to write `adapter_config.json` and `adapter_model.safetensors`.
            adapter_name (`str`, *optional*): The adapter, by default the active one.
            ranks (`str`, *optional*):
                `"mixed"` or `"uniform"`: leave out directions whose column of B is 0 and set α/r = 1, see [`prune`].
                The gates must be open.

        Returns:
            [`~peft.LoraConfig`]: The written configuration.

        Raises:
            ValueError: With `ranks`, a gate is not open, or the adapter is one of DoRA, of experts or of convolutions.
        """
        adapter_name = self._one_adapter(adapter_name)
        if ranks and any(layer.gates[adapter_name].state != "open" for *_, layer in self._gated_layers(adapter_name)):
            raise ValueError(
                f"`ranks={ranks!r}` needs open gates, and adapter {adapter_name!r} has others. Call `fold_gates()`, "
                "or write it without `ranks` to leave out closed units."
            )
        try:
            self.model.get_input_embeddings()
            embeddings: Any = "auto"
        except (AttributeError, NotImplementedError):  # of speech models, which PEFT does not expect to have none
            embeddings = False
        saved = get_peft_model_state_dict(self.model, adapter_name=adapter_name, save_embedding_layers=embeddings)
        state_dict = {f"{SAVED_PREFIX}{key}": tensor.detach().cpu() for key, tensor in saved.items()}
        known = (self.peft_config[adapter_name], self.layer_importance(adapter_name).lookalikes)
        if ranks is None:
            tensors, config = to_plain_lora(state_dict, *known)
        else:
            tensors, config = to_reduced_lora(state_dict, *known, ranks)
        save_adapter(tensors, config, output_dir)
        return config

    def add_weighted_adapter(  # type: ignore[override]
        self, adapters: list[str], weights: list[float], adapter_name: str, **kwargs: Any
    ) -> None:
        """Like [`~peft.LoraModel.add_weighted_adapter`], on the gated deltas. The new adapter's gates are open."""
        if adapter_name in self.peft_config:
            return
        names = list(dict.fromkeys(adapters))
        before = [(b, b.detach().clone()) for name in names for *_, b in self.factors(name)]
        try:
            for name in names:
                self._fold(name)  # PEFT combines either B or the weight delta, which is gated
            super().add_weighted_adapter(adapters, weights, adapter_name, **kwargs)
        finally:
            for b, value in before:
                b.data.copy_(value)
            for name in names:
                self._change(name)
        self._change(adapter_name, gate_mode="open")


def disable_cpu_4bit_packing(model: nn.Module) -> None:
    """
    Keep bitsandbytes from packing 4-bit weights, which is permanent, at the first evaluation on a CPU with
    AVX512-BF16. The kernel for packed weights has no backward pass, and PEFT cannot merge them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _check_mask(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """
    A trainer that resumes reads the weights and the optimiser state, but not the mask. If both runs started from the
    same weights, another mask shows in them: a closed unit has moved and a kept one has not.
    """
    kept: dict[str, bool] = {}  # by the path of a layer
    moved: set[str] = set()
    for key, parameter in model.named_parameters():
        path, _, part = key.partition(".lora_")
        if key in state_dict and part and not part.startswith("gate"):
            layer: Any = model.get_submodule(path)
            kept[path] = layer.gates[adapter_name].state == "open"
            plain = type(parameter) is nn.Parameter and not parameter.is_meta
            if not (plain and torch.equal(state_dict[key].to(parameter), parameter)):
                moved.add(path)
    closed = [path for path in moved if not kept[path]]
    unmoved = [path for path in kept if kept[path] and path not in moved]
    if closed and unmoved:
        raise ValueError(
            f"The weights are from a run with another mask: it trained {min(closed)!r}, which this model's mask "
            f"closes, but not {unmoved[0]!r}, which the mask keeps. Resume with the `gate_mask` in the checkpoint's "
            "`adapter_config.json`. To change the mask, call `apply_mask` after loading."
        )


def _check_tokens(model: Any, indices: list[int] | dict[str, list[int]] | None) -> None:
    """PEFT does not check the tokens; on a GPU, the lookup fails later and elsewhere."""
    tokens = [token for own in indices.values() for token in own] if isinstance(indices, dict) else indices
    known = getattr(getattr(model, "config", None), "vocab_size", math.inf)
    if tokens and max(tokens) >= known:
        raise ValueError(
            f"`trainable_token_indices` has the token {max(tokens)}, but the model has {known} tokens. Pass a model "
            "with the adapter's vocabulary, or resize the embeddings first."
        )


def _whole(weight: Any) -> torch.Tensor:
    # FSDP2 shards a score of shape (1,) too: it lies on one process only
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
