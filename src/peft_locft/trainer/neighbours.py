"""The edits' own sentences about others than their subjects, which are to go on as they did."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from ..edits import EditSet
from .augmentation import is_question, subject_place, without_edits


# Names of two words and more, within a sentence: what stands at its beginning may be no name.
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+(?: (?:of |of the )?[A-Z][a-z]+)+")


def neighbours(edits: EditSet, texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Put names that texts mention in the place of the edits' subjects, where an edit's prompt is the beginning of a sentence:
    neighbourhood prompts (CounterFact, [arXiv 2202.05262](https://arxiv.org/abs/2202.05262), section 3.3), but about
    anything. What such a sentence goes on with is changed by an edit of one subject, and with it the kind of word that
    comes next.

    Args:
        edits ([`EditSet`]):
            The edits. Those whose prompt is a question, or does not hold their subject, are left out.
        texts (`Sequence[str]`):
            Where the names are from.
        count (`int`):
            How many to return at most.
        seed (`int`):
            The seed of the choices.

    Returns:
        `list[str]`: Prompts, none of which is of the edits or asked when these are scored.
    """
    subjects = {edit.subject for edit in edits}  # what is said of these may be another edit in other words
    mentioned = dict.fromkeys(name for text in texts for name in _NAME.findall(text))
    names = [name for name in mentioned if name not in subjects]
    choice = random.Random(seed)
    begun = [(edit.prompt, place) for edit in edits if not is_question(edit.prompt) and (place := subject_place(edit))]
    found: dict[str, None] = {}
    if not names or not begun:
        return []
    choice.shuffle(begun)
    for number in range(count):
        prompt, place = begun[number % len(begun)]
        found[prompt[: place.start] + choice.choice(names) + prompt[place.stop :]] = None
    return without_edits(found, edits)
