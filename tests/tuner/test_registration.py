"""LOCFT in PEFT's enumeration and tables: as good as PEFT's own methods, once only, and only with a PEFT that has them."""

import copy
import importlib
import json
import pickle
import sys

import peft
import pytest
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils.peft_types import PeftType

import peft_locft.tuner
from peft_locft import LocFTConfig, LocFTModel
from peft_locft.tuner import register_locft


# What is asked of LOCFT is asked of LORA too: a member that `enum` itself made is the truth.
@pytest.mark.parametrize("name", ["LORA", "LOCFT"])
def test_member_is_an_ordinary_one(name):
    member = getattr(PeftType, name)
    assert type(member) is PeftType
    assert (member.name, member.value, member) == (name, name, name)
    assert PeftType(name) is PeftType[name] is member
    assert [other for other in PeftType if other is member] == [member]
    assert member in list(PeftType) and name in list(PeftType) and member in PeftType
    assert PeftType.__members__[name] is member
    assert (repr(member), hash(member)) == (f"<PeftType.{name}: '{name}'>", hash(name))
    assert {member: 1}[name] == 1
    assert list(PeftType).index(member) == list(PeftType.__members__).index(name)
    assert member.__objclass__ is PeftType and member._sort_order_ == list(PeftType).index(member)
    if sys.version_info >= (3, 11):  # before, `enum` looked members up only when the attribute was missing
        assert vars(PeftType)[name] is member
    with pytest.raises(AttributeError):
        setattr(PeftType, name, "other")


@pytest.mark.parametrize("name", ["LORA", "LOCFT"])
def test_copies_of_the_member_are_the_member(name):
    member = PeftType[name]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert copy.copy(member) is copy.deepcopy(member) is member
    assert json.dumps({"peft_type": member}) == f'{{"peft_type": "{name}"}}'


def test_method_is_in_the_tables_of_peft():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LOCFT"] is LocFTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["LOCFT"] is LocFTModel
    # transformers' delete_adapter builds the prefix from the name in this way.
    assert PEFT_TYPE_TO_PREFIX_MAPPING["LOCFT"] == LocFTModel.prefix == "locft_"


def test_registering_again_changes_nothing():
    tables = [PeftType.__members__, PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING]
    before = [list(table.items()) for table in tables]
    register_locft(LocFTConfig, LocFTModel)
    importlib.reload(peft_locft.tuner)
    assert [list(table.items()) for table in tables] == before
    assert [member.name for member in PeftType].count("LOCFT") == 1


def test_a_method_of_this_name_from_elsewhere_is_not_overwritten():
    class Other(LocFTModel):
        pass

    with pytest.raises(ImportError) as raised:
        register_locft(LocFTConfig, Other)
    assert str(raised.value) == "PEFT already has a method called LOCFT: peft_locft.tuner.model.LocFTModel"
    assert PEFT_TYPE_TO_TUNER_MAPPING["LOCFT"] is LocFTModel


@pytest.mark.parametrize("version", ["0.9.0", "0.20.9", "0.21.1", "0.21.2.dev0"])
def test_too_old_peft_is_refused(version, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ImportError) as raised:
        register_locft(LocFTConfig, LocFTModel)
    assert str(raised.value) == (f"peft {version} is installed, expected 0.21.2 or later: run `pip install -U peft`")


@pytest.mark.parametrize("version", ["0.21.2", "0.22.0", "0.100.0", "1.0.0"])
def test_new_enough_peft_is_accepted(version, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    register_locft(LocFTConfig, LocFTModel)


def test_too_old_peft_is_named_before_the_names_it_does_not_have(python):
    # PEFT 0.18 has no `resolve_quantization_backend`: without care, the import fails on that name, which helps nobody.
    said = python(
        "import peft\n"
        "peft.__version__ = '0.18.0'\n"
        "del peft.utils.resolve_quantization_backend\n"
        "try:\n"
        "    import peft_locft\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert said == "peft 0.18.0 is installed, expected 0.21.2 or later: run `pip install -U peft`"


def test_importing_in_a_fresh_process_registers_once(python):
    said = python(
        "import importlib\n"
        "from peft.utils.peft_types import PeftType\n"
        "before = list(PeftType)\n"
        "import peft_locft\n"
        "import peft_locft.tuner\n"
        "importlib.reload(peft_locft.tuner)\n"
        "importlib.reload(peft_locft)\n"
        "print('LOCFT' in before, [member.value for member in PeftType if member not in before])\n"
    )
    assert said == "False ['LOCFT']"


def test_without_the_package_peft_does_not_know_the_method(python, tmp_path):
    LocFTConfig(layers=[1]).save_pretrained(tmp_path)
    code = (
        "import sys\n"
        "from peft import PeftConfig\n"
        "try:\n"
        "    print(type(PeftConfig.from_pretrained(sys.argv[1])).__name__)\n"
        "except Exception as error:\n"
        "    print(repr(error), 'peft_locft' in sys.modules)\n"
    )
    assert python(code, tmp_path) == "KeyError('LOCFT') False"
    assert python(f"import peft_locft\n{code}", tmp_path) == "LocFTConfig"
