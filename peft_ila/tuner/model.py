"""ILAModel: injection, modes, masks and scores of gated LoRA."""

import copy
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast, get_args

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import _validate_lora_adapter_state_dict
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import nn

from ..choices import Ranks
from ..export.adapters import SAVED_PREFIX, save_adapter
from ..export.plain import lora_options, to_plain_lora
from ..export.ranks import to_reduced_lora
from ..ranking.importance import LayerImportance
from ..units import unit_of
from ..version import __version__
from .config import GateMode, ILAConfig
from .layer import Gate, add_gate, forget, freeze_by_mode, is_gated, target_name

_TIED = (
    "ILA does not support `ensure_weight_tying` for embeddings and a head that adapters target: tied adapters share "
    "their weights but would get separate gates. Leave both out of `target_modules`, or leave out "
    "`ensure_weight_tying`."
)


class Factors(NamedTuple):
    """
    The factors of one weight delta (α/r)·B·A.

    Attributes:
        module: The name of the module in the base model.
        scaling: α/r.
        a: Shape (r, in); for a convolution (r, in, …).
        b: Shape (out, r); for a convolution (out, r, 1, …).
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
    _beside_scores: tuple[nn.Parameter, ...] = ()

    # `prefix`, `tuner_layer_cls` and `target_module_mapping` are LoRA's: the prefix `lora_` makes PEFT and
    # transformers save, load and merge the scores with the LoRA weights.

    def _create_and_replace(  # type: ignore[override]  # as in LoraModel
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )
        # a parameter that is wrapped for another adapter gets no second layer
        added = isinstance(target, ParamWrapper) and target.parameter_name == kwargs.get("parameter_name")
        self._add_gate(target if added else getattr(parent, target_name), current_key, adapter_name)

    def _add_gate(self, target: nn.Module, name: str, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        unit = unit_of(name, config.granularity)
        gate = None if unit == name else self._find_gate(unit, adapter_name)
        owner = gate is None
        if gate is None:
            gate = Gate(config.gate_init)
        # `MultiheadAttention` holds a second LoRA layer, its output projection
        for module in [target] if isinstance(target, ParamWrapper) else list(target.modules()):
            if isinstance(module, LoraLayer):
                add_gate(module, adapter_name, gate, owner)
                owner = False

    def _find_gate(self, unit: str, adapter_name: str) -> Gate | None:
        for module in self.model.get_submodule(unit).modules():
            if is_gated(module) and adapter_name in module.gates:
                return module.gates[adapter_name]
        return None

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
        lora = copy.deepcopy(LoraConfig(**lora_options(config)))
        convert_peft_config_for_transformers(lora, model, None)
        for option in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
            setattr(config, option, getattr(lora, option))

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
        if parameters:
            self.change_config(adapter_name, gated_parameters=parameters)
        self._apply_mode(adapter_name)

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
        targets = [(key, layer) for key, layer in tuner.model.named_modules() if isinstance(layer, LoraLayer)]
        key: str
        layer: Any
        for key, layer in targets:
            for name in configs:
                if name in layer.r and (isinstance(layer, ParamWrapper) or ".base_layer." not in key):
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
        scores = [
            f"{name}.lora_gate.{adapter_name}.weight"
            for name, module in model.named_modules()
            if is_gated(module) and adapter_name in module.lora_gate
        ]
        saved = {key for key in state_dict if ".lora_gate." in key}
        if not saved:  # a plain LoRA adapter: its scores start at `gate_init`
            state_dict |= {key: torch.full((1,), float(config.gate_init)) for key in scores}
            return state_dict
        # transformers' own loading strips this prefix later
        ours, theirs = ({key.removeprefix(SAVED_PREFIX) for key in keys} for keys in (scores, saved))
        if difference := sorted(ours ^ theirs):
            raise ValueError(
                f"The adapter has {len(saved)} gates, but the model has {len(scores)} for it: {difference[0]!r} is "
                "in only one of them. Load the adapter into the base model it was trained on."
            )
        return state_dict

    # ------------------------------------------------------------------------------------------------------------
    # Modes
    # ------------------------------------------------------------------------------------------------------------

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
        if mode not in get_args(GateMode):
            raise ValueError(f"`mode` must be one of {get_args(GateMode)}, got {mode!r}.")
        for name in self._adapter_names(adapter_name):
            config = self.peft_config[name]
            if mode == "hard" and not config.gate_mask:
                raise ValueError(f"Adapter {name!r} has no mask yet; call `apply_mask(units)` instead.")
            self.check_unmerged(name)
            self.change_config(name, gate_mode=mode)
            self._apply_mode(name)

    def change_config(self, adapter_name: str, **options: Any) -> None:
        """Set options in a copy of an adapter's configuration; other models may share the original."""
        self.peft_config[adapter_name] = config = copy.copy(self.peft_config[adapter_name])
        for option, value in options.items():
            setattr(config, option, value)

    def apply_mask(self, units: Iterable[str], adapter_name: str | None = None) -> None:
        """
        Set mode "hard": γ = 1 for these units, which train, and 0 for the rest, which are frozen.

        Args:
            units (`Iterable[str]`): The units to keep, such as `importance.select(top_p=0.3)`.
            adapter_name (`str`, *optional*): The adapter, by default the active ones.

        Raises:
            ValueError: `units` is empty or names a unit that the adapter does not have.
        """
        if isinstance(units, str):
            raise TypeError(f"`units` must be a collection of unit names, got the string {units!r}.")
        kept = set(units)
        for name in self._adapter_names(adapter_name):
            known = self.gates(name)
            if unknown := sorted(kept - known.keys()):
                raise ValueError(
                    f"Adapter {name!r} has no units {unknown[:5]} ({len(unknown)} of {len(kept)} are unknown). It has "
                    f"{len(known)} units, such as {next(iter(known))!r}. Was the ranking made on another model?"
                )
            if not kept:
                raise ValueError("The mask keeps no unit; select at least one.")
            self.check_unmerged(name)
            self.change_config(name, gate_mask=[unit for unit in known if unit in kept])
            self.set_gate_mode("hard", name)

    def _apply_mode(self, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        gates = self.gates(adapter_name)
        kept = config.gate_mask or []
        if config.gate_mode == "hard" and (unknown := sorted(set(kept) - gates.keys())):
            raise ValueError(f"`gate_mask` has units that the model lacks: {unknown[:5]}.")
        for unit, gate in gates.items():
            gate.mode = config.gate_mode
            gate.kept = unit in kept
        for *_, layer in self._gated_layers(adapter_name):
            freeze_by_mode(layer, adapter_name)
        if adapter_name in self.active_adapters:
            self.set_adapter(self.active_adapter, inference_mode=config.inference_mode)
            self._mark_only_adapters_as_trainable(self.model)
        self._settle_dropout_and_dtype(adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._freeze_beside_scores()

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        self._freeze_beside_scores()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        soft = [name for name, config in self.peft_config.items() if config.gate_mode == "soft"]
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):  # `modules_to_save`, token indices
                module.set_requires_grad(soft, requires_grad=False)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._freeze_beside_scores()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._freeze_beside_scores()

    def _freeze_beside_scores(self) -> None:
        # In mode "soft" the layers freeze A and B; this freezes biases and `modules_to_save`.
        if not any(self.peft_config[name].gate_mode == "soft" for name in self.active_adapters):
            return
        scores = {id(gate.weight) for name in self.active_adapters for gate in self.gates(name).values()}
        for parameter in self.model.parameters():
            if id(parameter) not in scores:
                parameter.requires_grad_(False)
        for weight in self._beside_scores:
            weight.requires_grad_(True)

    def train_beside_scores(self, weights: Iterable[nn.Parameter]) -> None:
        """Train only these weights beside the scores in mode "soft", also after a loss has switched adapters."""
        for weight in self._beside_scores:
            weight.requires_grad_(False)
        self._beside_scores = tuple(weights)
        for weight in self._beside_scores:
            weight.requires_grad_(True)

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

    # ------------------------------------------------------------------------------------------------------------
    # Units and scores
    # ------------------------------------------------------------------------------------------------------------

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
        """
        The gates of an adapter by unit, in model order.

        Args:
            adapter_name (`str`, *optional*): The adapter, by default the active one.
        """
        adapter_name = self._one_adapter(adapter_name)
        granularity = self.peft_config[adapter_name].granularity
        return {
            unit_of(name, granularity): layer.gates[adapter_name]
            for _, name, layer in self._gated_layers(adapter_name)
        }

    def layer_importance(self, adapter_name: str | None = None) -> LayerImportance:
        """
        Make a ranking from the current scores, independent of the model. Under FSDP2, call it on all processes.

        Args:
            adapter_name (`str`, *optional*): The adapter, by default the active one.

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
            lookalikes=[
                name
                for name, _ in self.model.named_modules()
                if name.rpartition(".")[2] in last_components and name not in gated
            ],
            parameters={
                name: layer.r[adapter_name] / config.r
                for name, layer in gated.items()
                if isinstance(layer, ParamWrapper)
            },
        )

    def zero_initialised_factors(self, adapter_name: str | None = None) -> Iterator[tuple[str, float, nn.Parameter]]:
        """The unit, the scaling α/r and the zero-initialised factor (B; A for embeddings) of each LoRA layer."""
        adapter_name = self._one_adapter(adapter_name)
        granularity = self.peft_config[adapter_name].granularity
        for _, name, layer in self._gated_layers(adapter_name):
            embedding = adapter_name in layer.lora_embedding_A
            weight = layer.lora_embedding_A[adapter_name] if embedding else layer.lora_B[adapter_name].weight
            yield unit_of(name, granularity), layer.scaling[adapter_name], weight

    def factors(self, adapter_name: str | None = None) -> Iterator[Factors]:
        """The factors of each weight delta, in model order."""
        adapter_name = self._one_adapter(adapter_name)
        for _, name, layer in self._gated_layers(adapter_name):
            embedding = adapter_name in layer.lora_embedding_A
            a = layer.lora_embedding_A[adapter_name] if embedding else layer.lora_A[adapter_name].weight
            yield Factors(name, layer.scaling[adapter_name], a, cast(nn.Parameter, _lora_b(layer, adapter_name)))

    def is_trained(self, adapter_name: str | None = None) -> bool:
        """
        Whether the adapter changes the model; a fresh one does not. Under FSDP2, call it on all processes.

        Args:
            adapter_name (`str`, *optional*): The adapter, by default the active one.
        """
        return any(bool(_whole(weight).any()) for *_, weight in self.zero_initialised_factors(adapter_name))

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
            self._multiply_gates_into_b(name)
            self.set_gate_mode("open", name)

    @torch.no_grad()
    def _multiply_gates_into_b(self, adapter_name: str) -> None:
        if self.peft_config[adapter_name].use_dora:
            raise ValueError(
                f"Adapter {adapter_name!r} is a DoRA adapter, so its gates cannot be multiplied into B. Train it in "
                'mode "open".'
            )
        for *_, layer in self._gated_layers(adapter_name):
            weight = _lora_b(layer, adapter_name)
            weight.copy_(layer.gates[adapter_name](weight))

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
        """
        adapter_name = self._one_adapter(adapter_name)
        saved = get_peft_model_state_dict(
            self.model,
            adapter_name=adapter_name,
            save_embedding_layers="auto" if _has_embeddings(self.model) else False,
        )
        state_dict = {f"{SAVED_PREFIX}{key}": tensor.detach().cpu() for key, tensor in saved.items()}
        importance = self.layer_importance(adapter_name)
        known = (self.peft_config[adapter_name], importance.lookalikes, importance.metadata["model_type"])
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
        names = [own for name in dict.fromkeys(adapters) for own in self._adapter_names(name)]
        layers = [(layer, name) for name in names for *_, layer in self._gated_layers(name)]
        before = [(layer.gates[name].mode, _lora_b(layer, name).detach().clone()) for layer, name in layers]
        try:
            for name in names:
                self._multiply_gates_into_b(name)
            for layer, name in layers:
                layer.gates[name].mode = "open"  # PEFT combines either B or the weight delta, which is gated
            super().add_weighted_adapter(adapters, weights, adapter_name, **kwargs)
        finally:
            for (layer, name), (mode, weight) in zip(layers, before):
                layer.gates[name].mode = mode
                _lora_b(layer, name).data.copy_(weight)
        self.set_gate_mode("open", adapter_name)


def disable_cpu_4bit_packing(model: nn.Module) -> None:
    """
    Keep bitsandbytes from packing 4-bit weights, which is permanent, at the first evaluation on a CPU with
    AVX512-BF16. The kernel for packed weights has no backward pass, and PEFT cannot merge them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _has_embeddings(model: Any) -> bool:
    # speech models have none and raise, which PEFT does not expect when their `lm_head` is adapted
    try:
        return hasattr(model, "get_input_embeddings") and model.get_input_embeddings() is not None
    except NotImplementedError:
        return False


def _check_mask(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """
    A trainer that resumes reads the weights and the optimiser state, but not the mask. If both runs started from the
    same weights, another mask shows in them: a closed unit has moved and a kept one has not.
    """
    same: dict[str, bool] = {}
    for key, parameter in model.named_parameters():
        path, _, part = key.partition(".lora_")
        if key in state_dict and part and not part.startswith("gate"):
            plain = type(parameter) is nn.Parameter and not parameter.is_meta
            equal = plain and torch.equal(state_dict[key].to(parameter), parameter)
            same[path] = same.get(path, True) and equal
    layers: dict[str, Any] = dict(model.named_modules())
    kept = {path for path in same if layers[path].gates[adapter_name].kept}
    moved = [path for path in same if not same[path] and path not in kept]
    unmoved = [path for path in same if same[path] and path in kept]
    if moved and unmoved:
        raise ValueError(
            f"The weights are from a run with another mask: it trained {moved[0]!r}, which this model's mask closes, "
            f"but not {unmoved[0]!r}, which the mask keeps. Resume with the `gate_mask` in the checkpoint's "
            "`adapter_config.json`. To change the mask, call `apply_mask` after loading."
        )


def _check_tokens(model: Any, indices: list[int] | dict[str, list[int]] | None) -> None:
    """PEFT does not check the tokens; on a GPU, the lookup fails later and elsewhere."""
    tokens = [token for own in indices.values() for token in own] if isinstance(indices, dict) else indices
    if tokens and _has_embeddings(model):
        parts = model.get_input_embeddings().modules()  # another adapter may have wrapped them
        known = next((part.num_embeddings for part in parts if hasattr(part, "num_embeddings")), math.inf)
        if max(tokens) >= known:
            raise ValueError(
                f"`trainable_token_indices` has the token {max(tokens)}, but the model has {known} tokens. Pass a "
                "model with the adapter's vocabulary, or resize the embeddings first."
            )


def _lora_b(layer: Any, adapter_name: str) -> torch.Tensor:
    if adapter_name in layer.lora_B:
        return layer.lora_B[adapter_name].weight
    return layer.lora_embedding_B[adapter_name]


def _whole(weight: Any) -> torch.Tensor:
    # FSDP2 shards a score of shape (1,) too: it lies on one process only
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
