"""The PEFT method: importing this package registers LOCFT with PEFT."""

from .registration import check_peft_version, register_locft


check_peft_version()  # first, because the other files import names that an older PEFT does not have

from .config import COMPANION_FILES, LocFTConfig  # noqa: E402
from .fingerprint import BaseMismatchWarning, check_tokenizer  # noqa: E402
from .layer import LocFTLayer  # noqa: E402
from .linear import LocFTLinear  # noqa: E402
from .model import LocFTModel  # noqa: E402
from .publishing import keep_card_on_push  # noqa: E402
from .rounding import MergeCost, merge_report  # noqa: E402
from .targets import default_module  # noqa: E402
from .weights import layer_index, layers_name, num_layers  # noqa: E402


__all__ = [
    "COMPANION_FILES",
    "BaseMismatchWarning",
    "LocFTConfig",
    "LocFTLayer",
    "LocFTLinear",
    "LocFTModel",
    "MergeCost",
    "check_tokenizer",
    "default_module",
    "layer_index",
    "layers_name",
    "merge_report",
    "num_layers",
]

register_locft(LocFTConfig, LocFTModel)
keep_card_on_push()
