"""ILAConfig: the options of LoraConfig and of the gates."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import LoraConfig, PeftType

from ..export.plain import lora_options
from ..units import Granularity

GateMode = Literal["joint", "open", "soft", "hard"]

# LoRA options that would silently bypass the gate or apply it twice, with the reason.
_UNSUPPORTED = {
    "layer_replication": "replicated layers share one weight but would get separate gates",
    "lora_bias": "the bias of `lora_B` would escape the gate",
    "kasa_config": "KaSA changes the base weight",
    "use_bdlora": "its forward pass bypasses the gate",
    "use_qalora": "its forward pass bypasses the gate",
    "velora_config": "its forward pass bypasses the gate",
    "monteclora_config": "its forward pass bypasses the gate",
    "arrow_config": "its forward pass bypasses the gate",
    "alora_invocation_tokens": "its forward pass bypasses the gate",
    "megatron_config": "the gate was not tested with Megatron's parallel layers",
}
# Initialisations that subtract an ungated B·A from the base weight, bypass the gate (MiCA), or remove layers (EVA).
_UNSUPPORTED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica", "eva")


@dataclass
class ILAConfig(LoraConfig):
    """
    The configuration of [`ILAModel`], LoRA with one learnable gate per unit that multiplies the weight deltas, from
    "Understanding Layer Significance in LLM Alignment" (https://huggingface.co/papers/2410.17875).

    All options of [`~peft.LoraConfig`] work except those that would bypass the gate. These raise a `ValueError`:
    `layer_replication`, `lora_bias`, KaSA, BD-LoRA, QA-LoRA, VeLoRA, MonteCLoRA, Arrow, aLoRA, Megatron, and the
    initialisations PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA and EVA. The model refuses `ensure_weight_tying` if it
    would tie an adapter.

    Args:
        granularity (`str`):
            The unit of one gate: `"layer"` (default), a decoder layer, or `"module"`, a target module (the paper's
            unit).
        gate_init (`float`):
            The initial score s of every unit; the gate is γ = σ(s). 4.0 is an assumed default (σ(4) = 0.982).
        gate_mode (`str`):
            How the gates act and what trains. `"joint"` (default): γ = σ(s), the LoRA weights and the scores train.
            `"open"`: γ = 1, plain LoRA, the scores are frozen. `"soft"`: γ = σ(s), only the scores train. `"hard"`:
            γ = 1 for the units in `gate_mask` and 0 for the rest, only the kept LoRA weights train.
        gate_mask (`list[str]`, *optional*):
            The units that mode `"hard"` keeps, usually set by [`ILAModel.apply_mask`].
        gated_parameters (`dict[str, str]`, *optional*):
            Set by [`ILAModel`] for LoRA layers that adapt a parameter: the layer's name in a saved adapter, and the
            parameter's name.
    """

    granularity: Granularity = field(
        default="layer", metadata={"help": "The unit of one gate: 'layer' (a decoder layer) or 'module'."}
    )
    gate_init: float = field(default=4.0, metadata={"help": "The initial score s of every unit; the gate is σ(s)."})
    gate_mode: GateMode = field(
        default="joint", metadata={"help": "How the gates act and what trains: 'joint', 'open', 'soft' or 'hard'."}
    )
    gate_mask: list[str] | None = field(default=None, metadata={"help": "The units that mode 'hard' keeps."})
    gated_parameters: dict[str, str] | None = field(
        default=None, metadata={"help": "Set by `ILAModel`: LoRA layers that adapt a parameter, with its name."}
    )

    @classmethod
    def from_lora(cls, config: LoraConfig, **gate_options: Any) -> "ILAConfig":
        """
        Make the configuration that gates an existing LoRA adapter.

        For example, load a saved LoRA adapter with gates that start at `gate_init`:

        ```py
        >>> config = ILAConfig.from_lora(LoraConfig.from_pretrained(path), gate_mode="open")
        >>> model = PeftModel.from_pretrained(base_model, path, config=config, is_trainable=True)
        ```

        Args:
            config ([`~peft.LoraConfig`]): The configuration of the adapter.
            **gate_options: `granularity`, `gate_init`, `gate_mode`, `gate_mask`.

        Raises:
            TypeError: `config` is not a plain `LoraConfig`; a subclass is refused too.
            ValueError: An option of the adapter would bypass the gate.
        """
        if type(config) is not LoraConfig:
            raise TypeError(f"`config` must be a plain LoraConfig, got {type(config).__name__}.")
        return cls(**lora_options(config), **gate_options)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("ILA")
        self.check_gates()
        for name, reason in _UNSUPPORTED.items():
            if getattr(self, name, None):
                raise ValueError(f"ILA does not support `{name}`: {reason}. Leave it out or use `LoraConfig`.")
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights.lower().startswith(_UNSUPPORTED_INITS):
            raise ValueError(
                f"ILA does not support `init_lora_weights={self.init_lora_weights!r}`: it changes weights or layers "
                "outside the gate. Use True, False, 'gaussian' or 'orthogonal'."
            )

    def check_gates(self) -> None:
        """Check the options of the gates, also after [`ILAModel`] has changed them."""
        for name, allowed in (("granularity", get_args(Granularity)), ("gate_mode", get_args(GateMode))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        if not isinstance(self.gate_init, (int, float)) or not abs(self.gate_init) < 3e38:  # float32
            raise ValueError(f"`gate_init` must be a finite number, got {self.gate_init!r}.")
        if isinstance(self.gate_mask, str):
            raise TypeError(f"`gate_mask` must be a list of unit names, got the string {self.gate_mask!r}.")
        if self.gate_mode == "hard" and not self.gate_mask:
            raise ValueError(
                '`gate_mode="hard"` needs at least one unit in `gate_mask`; use `apply_mask` to set both on a model.'
            )
