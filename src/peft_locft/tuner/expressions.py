"""Regular expressions from a config, which may come from the Hub: an expression that would hang is an error."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable

import regex


_LONGEST = 10_000  # characters; the longest honest expressions list some hundred modules
_SECONDS = 5.0
_MOST_REPETITIONS = 1_000_000  # all counts multiplied: nested ones are written out when an expression is compiled
_RECURSION = re.compile(r"\(\?(?:R|&|P>|[+-]?\d)")  # it takes gigabytes before any time is up
_COUNTS = re.compile(r"\{([^{}]*)\}")


def match_names(expression: str, names: Iterable[str], field: str) -> list[str]:
    """Return the names that an expression matches as a whole, within a bounded time.

    Args:
        expression (`str`):
            The regular expression.
        names (`Iterable[str]`):
            The names.
        field (`str`):
            The config's field that it stands in, for the error.

    Returns:
        `list[str]`: The matching names.

    Raises:
        `ValueError`: If it is no expression, is longer than 10,000 characters, is nested or repeats too much, or takes
            longer than 5 seconds.
    """
    shown = f"`{field}` is the regular expression {expression[:200]!r}{'...' if len(expression) > 200 else ''}"
    if len(expression) > _LONGEST:
        raise ValueError(f"{shown} of {len(expression)} characters, expected at most {_LONGEST}: give a list of names")
    counts = [max(map(_number, re.findall(r"\d+", count)), default=1) for count in _COUNTS.findall(expression)]
    if math.prod(max(count, 1) for count in counts) > _MOST_REPETITIONS:
        raise ValueError(
            f"{shown}, whose repetitions in braces are more than {_MOST_REPETITIONS}, multiplied: use smaller ones, or "
            "give a list of names"
        )
    if _RECURSION.search(expression):
        raise ValueError(f"{shown}, which refers to itself: write it without, or give a list of names")
    try:
        pattern = regex.compile(expression)
    except RecursionError as error:
        raise ValueError(f"{shown}, which is nested too deeply: mend it, or give a list of names") from error
    except regex.error as error:
        raise ValueError(f"{shown}, which is not valid ({error}): mend it, or give a list of names") from error
    end = time.monotonic() + _SECONDS
    matching = []
    for name in names:
        try:
            # A timeout of zero would be none at all.
            if pattern.fullmatch(name, timeout=max(end - time.monotonic(), 1e-3)):
                matching.append(name)
        except TimeoutError as error:
            raise ValueError(
                f"{shown}, which takes longer than {_SECONDS:.0f} s on the model's names, as expressions with nested "
                "repetitions do: write it without them, or give a list of names"
            ) from error
    return matching


def _number(digits: str) -> int:
    return int(digits[:9])  # cut, because more digits are too many in any case, and slow to read
