"""Make PEFT know LOCFT, so that `get_peft_model`, `PeftModel.from_pretrained` and the rest work unchanged.

PEFT keeps its methods in the `PeftType` enumeration and has no way to add a member from outside, so this file adds it
the way the `enum` module itself builds one. A plain string would not do: PEFT and transformers call `.value` on it.
"""

from __future__ import annotations

from typing import Any

import peft
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType


METHOD = "LOCFT"
MIN_PEFT_VERSION = "0.21.2"


def check_peft_version() -> None:
    """Refuse a PEFT that is too old.

    Raises:
        `ImportError`: If the installed PEFT is older than 0.21.2.
    """
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        raise ImportError(
            f"peft {peft.__version__} is installed, expected {MIN_PEFT_VERSION} or later: run `pip install -U peft`"
        )


def register_locft(config_cls: type, model_cls: type) -> None:
    """Register LOCFT with PEFT. Calling it again changes nothing.

    Args:
        config_cls (`type`):
            The configuration class, [`LocFTConfig`].
        model_cls (`type`):
            The tuner class, [`LocFTModel`].

    Raises:
        `ImportError`: If the installed PEFT is older than 0.21.2, or has another method of this name.
    """
    check_peft_version()
    member = _peft_type()
    registered = PEFT_TYPE_TO_TUNER_MAPPING.get(member)
    if registered is None:
        register_peft_method(name=METHOD.lower(), config_cls=config_cls, model_cls=model_cls)
    elif registered is not model_cls:
        raise ImportError(f"PEFT already has a method called {METHOD}: {registered.__module__}.{registered.__name__}")


def _peft_type() -> Any:
    if METHOD in PeftType.__members__:
        return PeftType[METHOD]
    member = str.__new__(PeftType, METHOD)
    member._name_ = METHOD
    member._value_ = METHOD
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    # An enumeration refuses new members through its own __setattr__, so the one of `type` is used.
    type.__setattr__(PeftType, METHOD, member)
    PeftType._member_map_[METHOD] = member
    PeftType._member_names_.append(METHOD)
    PeftType._value2member_map_[METHOD] = member
    return member
