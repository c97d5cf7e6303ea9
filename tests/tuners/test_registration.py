import copy
import importlib
import pickle
import warnings

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import ssmtune.tuners
from ssmtune.tuners import InitialStateConfig, InitialStateModel, StateOffsetConfig, StateOffsetModel
from ssmtune.tuners.registration import add_peft_type, register

METHODS = [
    ("STATE_OFFSET", "state_offset_", StateOffsetConfig, StateOffsetModel),
    ("INITIAL_STATE", "initial_state_", InitialStateConfig, InitialStateModel),
]


@pytest.mark.parametrize("name, prefix, config_cls, model_cls", METHODS)
def test_peft_knows_the_methods(name, prefix, config_cls, model_cls):
    member = PeftType[name]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[name] is config_cls
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is model_cls
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == prefix == model_cls.prefix
    assert prefix not in model_cls.child_name


@pytest.mark.parametrize("name", ["STATE_OFFSET", "INITIAL_STATE"])
def test_added_member_is_an_ordinary_one(name):
    member = PeftType[name]
    assert PeftType(name) is member and getattr(PeftType, name) is member
    assert isinstance(member, PeftType) and member == name and hash(member) == hash(name)
    assert (member.name, member.value) == (name, name)
    assert list(PeftType).count(member) == 1 and name in PeftType.__members__
    assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member
    assert add_peft_type(name) is member
    with pytest.raises(AttributeError):
        setattr(PeftType, name, "other")


def test_register_twice_changes_nothing():
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register("state_offset", StateOffsetConfig, StateOffsetModel)
        importlib.reload(ssmtune.tuners)
    assert (dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)) == before


def test_register_leaves_a_method_of_peft_alone():
    class Other:
        prefix = "lora_"

    with pytest.warns(UserWarning, match="already has a method LORA"):
        register("lora", Other, Other)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is peft.LoraModel
