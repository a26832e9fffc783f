"""What messages say: values cut short; and of a layer or a module that matches nothing, what there is near it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from .weights import Weight, in_layer, other_tower


_LONGEST = 500  # characters


def shown(items: Iterable, most: int = 12) -> str:
    """Return a list for a message, cut where it is long.

    Args:
        items (`Iterable`):
            The items.
        most (`int`, *optional*, defaults to `12`):
            How many to show.

    Returns:
        `str`: The list's text.
    """
    items = list(items)
    text = f"{items[:most]}"
    # What comes from a config on the Hub may be of any length.
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return text + (f" and {len(items) - most} more" if len(items) > most else "")


def raise_unmatched(
    targets: list[str],
    weights: list[Weight],
    language: str | None,
    is_expression: bool = False,
    what: str = "Target modules",
) -> None:
    """Raise for names that match nothing, with the nearest ones that there are.

    Args:
        targets (`list[str]`):
            The names.
        weights (`list[Weight]`):
            What could have been named.
        language (`str`, *optional*):
            The text model's name in a model of several towers.
        is_expression (`bool`, *optional*, defaults to `False`):
            Whether the name is a regular expression.
        what (`str`, *optional*, defaults to `"Target modules"`):
            What the names were given as.

    Raises:
        `ValueError`: Always.
    """
    elsewhere = sorted(
        {
            tower
            for weight in weights
            if (tower := other_tower(weight.name, language))
            and any(f".{target}." in f".{weight.name}." for target in targets)
        }
    )
    if elsewhere:
        last = elsewhere[0].rpartition(".")[2]
        raise ValueError(
            f"{what} {shown(targets)} are only in {shown(elsewhere)}, and the language tower {language} is edited unless "
            f"another is named: write '{last}.{targets[0][:200]}' for that one"
        )
    endings = list(dict.fromkeys(in_layer(weight.name) for weight in weights))
    near: dict[str, None] = {}
    for target in targets[:12]:  # as many as are shown
        near.update(dict.fromkeys(difflib.get_close_matches(target, endings, n=3, cutoff=0.4)))
    linear = dict.fromkeys(in_layer(weight.name) for weight in weights if weight.kind != "embedding")
    raise ValueError(
        f"{what} {shown(targets)} not found in the base model"
        + (" (a string is a regular expression over whole names)" if is_expression else "")
        + f": the nearest names are {shown(near or linear)}"
    )


def raise_layers_out_of_range(missing: list[int], count: int) -> None:
    """Raise for layers that the model does not have.

    Args:
        missing (`list[int]`):
            The layers.
        count (`int`):
            How many layers the model has.

    Raises:
        `ValueError`: Always.
    """
    raise ValueError(
        f"layers {shown(missing)} are not in the model, which has the {count} layers 0 to {count - 1} (or -{count} to "
        f"-1 from the last): the nearest are {sorted({0 if layer < 0 else count - 1 for layer in missing})}"
    )


def raise_missing_layers(target: str, missing: list[int], having: list[int], names: list[str]) -> None:
    """Raise for layers that lack a module.

    Args:
        target (`str`):
            The module.
        missing (`list[int]`):
            The layers that lack it.
        having (`list[int]`):
            The layers that have it.
        names (`list[str]`):
            The full names of what the lacking layers have.

    Raises:
        `ValueError`: Always.
    """
    raise ValueError(
        f"layers {missing} have no module {target!r}, which is "
        + (f"in the layers {shown(having)}" if having else "outside of the layers: leave `layers` out")
        + f"; their modules are {shown(dict.fromkeys(map(in_layer, names)))}"
    )


def cut(value: Any) -> str:
    """Return a value as it is shown in a message: one from a file or from the Hub may be of any length.

    Args:
        value (`Any`):
            The value.

    Returns:
        `str`: At most its first 200 characters.
    """
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
