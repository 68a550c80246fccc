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
        ({"gate_init": 10**400}, "`gate_init` must be a finite number, got 10000"),
        ({"gate_init": 1e300}, "`gate_init` must be a finite number, got 1e"),
        ({"gate_init": "4"}, "`gate_init` must be a finite number, got '4'"),
        ({"gate_mode": "hard"}, "needs at least one unit in `gate_mask`"),
        ({"gate_mode": "hard", "gate_mask": []}, "needs at least one unit in `gate_mask`"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ILAConfig(**options)


def test_mask_as_a_string_is_refused():
    with pytest.raises(TypeError, match=r"got the string 'model\.layers\.0'"):
        ILAConfig(gate_mask="model.layers.0")
