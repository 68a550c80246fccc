import pytest
from peft import LoraConfig

from peft_ila import ILAConfig


def test_defaults_are_those_of_the_contract():
    config = ILAConfig()
    assert (config.granularity, config.gate_init, config.gate_mode, config.gate_mask) == ("layer", 4.0, "joint", None)
    assert isinstance(config, LoraConfig) and config.peft_type == "ILA"


def test_saved_and_loaded(tmp_path):
    config = ILAConfig(r=4, target_modules=["q_proj"], gate_init=1.0, gate_mode="hard", gate_mask=["x.0", "x.2"])
    config.save_pretrained(tmp_path)
    loaded = ILAConfig.from_pretrained(tmp_path)
    assert loaded == config


@pytest.mark.parametrize(
    "options, message",
    [
        ({"granularity": "block"}, "`granularity` must be one of .* got 'block'"),
        ({"gate_mode": "closed"}, "`gate_mode` must be one of .* got 'closed'"),
        ({"gate_init": float("nan")}, "`gate_init` must be a finite number, got nan"),
        ({"gate_init": "4"}, "`gate_init` must be a finite number, got '4'"),
        ({"gate_mode": "hard"}, "needs at least one unit in `gate_mask`"),
        ({"gate_mode": "hard", "gate_mask": []}, "needs at least one unit in `gate_mask`"),
        ({"use_dora": True}, "does not support `use_dora`"),
        ({"target_parameters": ["experts.w"]}, "does not support `target_parameters`"),
        ({"layer_replication": [(0, 2)]}, "does not support `layer_replication`"),
        ({"lora_bias": True}, "does not support `lora_bias`"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "does not support `alora_invocation_tokens`"),
        ({"ensure_weight_tying": True}, "does not support `ensure_weight_tying`"),
        ({"use_qalora": True}, "does not support `use_qalora`"),
        ({"megatron_config": {"a": 1}}, "does not support `megatron_config`"),
        ({"kasa_config": {}}, None),
        *(
            ({"init_lora_weights": init}, f"does not support `init_lora_weights='{init}'`")
            for init in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "lora_ga", "mica", "eva")
        ),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ILAConfig(**options)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_accepted_initialisations(init):
    assert ILAConfig(init_lora_weights=init).init_lora_weights == init


def test_mask_as_a_string_is_refused():
    with pytest.raises(TypeError, match=r"got the string 'model\.layers\.0'"):
        ILAConfig(gate_mask="model.layers.0")
