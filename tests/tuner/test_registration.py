import copy
import importlib
import pickle
import subprocess
import sys

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_ila
from peft_ila import ILAConfig, ILAModel
from peft_ila.tuner.registration import add_peft_type, register


def test_type_is_found_in_every_way():
    assert PeftType("ILA") is PeftType.ILA is PeftType["ILA"]
    assert PeftType.ILA in list(PeftType) and "ILA" in list(PeftType)
    assert PeftType.ILA == "ILA" and PeftType.ILA.name == PeftType.ILA.value == "ILA"
    assert len(list(PeftType)) == len(set(PeftType))
    assert copy.deepcopy(PeftType.ILA) is PeftType.ILA
    assert pickle.loads(pickle.dumps(PeftType.ILA)) is PeftType.ILA
    with pytest.raises(AttributeError):
        PeftType.ILA = "something else"


def test_tables_hold_the_classes():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["ILA"] is ILAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["ILA"] is ILAModel
    assert peft.get_peft_config({"peft_type": "ILA", "r": 4}).r == 4


def test_registering_again_is_harmless():
    before = list(PeftType)
    add_peft_type()
    register(ILAConfig, ILAModel)
    importlib.reload(peft_ila)
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING["ILA"] is ILAConfig


def test_a_method_of_the_same_name_in_peft_is_not_replaced():
    class ForeignConfig:
        pass

    try:
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ILA] = ForeignConfig
        with pytest.raises(ImportError, match="already has a method named ILA"):
            register(ILAConfig, ILAModel)
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ILA] is ForeignConfig
    finally:
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ILA] = ILAConfig


def test_config_survives_copy_and_pickle():
    config = ILAConfig(r=4, granularity="module", gate_mode="hard", gate_mask=["a.0"], target_modules=["q_proj"])
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_in_a_new_process(tmp_path):
    """One, since importing PEFT takes seconds."""
    ILAConfig(r=4).save_pretrained(tmp_path)
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(ILAConfig(r=4)))
    script = f"""
import builtins, importlib, pickle, sys, peft
sys.dont_write_bytecode = True

try:  # without the import, PEFT raises its own error
    peft.PeftConfig.from_pretrained({str(tmp_path)!r})
except KeyError as error:
    assert error.args == ("ILA",)
else:
    raise AssertionError

real = builtins.open
def guarded(file, mode="r", *args, **kwargs):
    assert not ("w" in mode and "site-packages" in str(file)), file
    return real(file, mode, *args, **kwargs)
builtins.open = guarded
config = pickle.load(open({str(tmp_path / "config.pkl")!r}, "rb"))  # imports peft_ila
assert config.peft_type == "ILA"
assert peft.PeftConfig.from_pretrained({str(tmp_path)!r}).peft_type == "ILA"

import peft_ila, peft_ila.tuner.config
importlib.reload(peft_ila.tuner.config); importlib.reload(peft_ila)
config = type(peft.get_peft_config({{"peft_type": "ILA"}}))
assert config is peft_ila.ILAConfig is peft_ila.tuner.config.ILAConfig
"""
    subprocess.run([sys.executable, "-c", script], check=True)
