"""What the fields of a `LocFTConfig` can be: a config from the Hub is untrusted."""

from __future__ import annotations

import re
from typing import Any

from .messages import cut


_MOST_LAYERS = 10_000  # more than any model has: a longer list is a faulty or hostile config
_MOST_PATTERNS = 100
_MOST_NAMES = 50_000  # every expert of a large mixture by its own name
_NAME = re.compile(r"[\w.-]{1,500}")


def check_names(names: Any, field_name: str) -> None:
    """Refuse what is not a list of modules' names.

    Args:
        names (`Any`):
            What was given.
        field_name (`str`):
            The field, for the message.

    Raises:
        `ValueError`: If it is something else, or too long.
    """
    # Whole names, and what PEFT would take for a regular expression: in `modules_to_save` it does not say so.
    faulty = not isinstance(names, (list, tuple, set)) or any(
        not isinstance(name, str) or not _NAME.fullmatch(name) for name in names
    )
    if faulty:
        raise ValueError(
            f"`{field_name}` is {cut(names)}, expected a list of the names of modules, such as "
            "['mlp.down_proj']: a name is made of letters, digits, `_`, `-` and dots"
        )
    if len(names) > _MOST_NAMES:
        raise ValueError(f"`{field_name}` has {len(names)} entries, expected at most {_MOST_NAMES}")


def check_patterns(patterns: Any) -> None:
    """Refuse a `layers_pattern` that is neither a name nor a list of names.

    Args:
        patterns (`Any`):
            What was given.

    Raises:
        `ValueError`: If it is something else, or too long.
    """
    names = [patterns] if isinstance(patterns, str) else patterns or []
    if isinstance(names, (list, tuple, set)) and len(names) <= _MOST_PATTERNS:
        if all(isinstance(name, str) and len(name) <= 500 for name in names):
            return
    raise ValueError(
        f"`layers_pattern` is {cut(patterns)}, expected the name of the list of layers, such as 'layers', or a list of "
        f"at most {_MOST_PATTERNS} names"
    )


def check_ranks(ranks: Any) -> None:
    """Refuse a `rank_pattern` that is not a positive rank by the name of each module.

    Args:
        ranks (`Any`):
            What was given.

    Raises:
        `ValueError`: If it is something else, or too long.
    """
    too_many = isinstance(ranks, dict) and len(ranks) > _MOST_NAMES
    if not isinstance(ranks, dict) or too_many or any(type(rank) is not int or rank < 1 for rank in ranks.values()):
        raise ValueError(f"`rank_pattern` is {cut(ranks)}, expected a positive rank by the name of each module")


def as_layers(value: Any, name: str) -> list[int] | None:
    """Return layers as a list.

    Args:
        value (`Any`):
            What was given: an integer, integers, or `None`.
        name (`str`):
            The field, for the message.

    Returns:
        `list[int]`, *optional*: The layers.

    Raises:
        `ValueError`: If it is something else, or too long.
    """
    if value is None:
        return None
    layers = (
        [value] if isinstance(value, int) else list(value) if isinstance(value, (list, tuple, set, range)) else value
    )
    if not isinstance(layers, list) or not layers or any(type(layer) is not int for layer in layers):
        raise ValueError(f"`{name}` is {cut(value)}, expected an integer or a list of integers, such as [22] or [-3]")
    if len(layers) > _MOST_LAYERS:
        raise ValueError(f"`{name}` has {len(layers)} entries, expected at most {_MOST_LAYERS}")
    return layers
