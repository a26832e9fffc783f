"""The further forms of all edits: what they are trained on beside their bare prompts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..edits import Edit, EditSet
from ..edits.rows import write_rows
from .augmentation import contexts_of, scored_prompts
from .data import FEATURES, tokenize_forms


def make_forms(
    edits: EditSet,
    contexts: int,
    prefixes: Sequence[str],
    chat: str | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    seed: int,
    with_subjects: bool = False,
) -> Dataset | None:
    """Encode the further forms of all edits: their `train_rephrases`, and each in several contexts.

    Args:
        edits ([`EditSet`]):
            The edits.
        contexts (`int`):
            How many contexts an edit gets.
        prefixes (`Sequence[str]`):
            Texts whose beginnings stand before prompts.
        chat (`str`, *optional*):
            A turn of a chat, of [`chat_form`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        max_length (`int`, *optional*):
            The longest sequence that the model takes, in tokens.
        seed (`int`):
            The run's seed.
        with_subjects (`bool`, *optional*, defaults to `False`):
            Whether to find the subjects, as in [`tokenize_edits`].

    Returns:
        [`~datasets.Dataset`] or `None`: Rows of [`tokenize_forms`]; `None` if there are none.
    """
    asked = 0
    # A prompt from which words are left out may be another edit's, or one that is scored.
    taught: dict[str, str] = {}
    scored: set[str] = set()
    for edit in edits if contexts else ():
        taught |= dict.fromkeys((edit.prompt, *edit.train_rephrases), edit.target)
        scored.update(scored_prompts(edit))

    def is_free(form: str, target: str) -> bool:
        return form not in scored and taught.setdefault(form, target) == target

    def forms() -> Iterator[tuple[int, str, Edit]]:
        nonlocal asked
        for index, edit in enumerate(edits):
            further = contexts_of(edit, contexts, prefixes, chat, seed, is_free) if contexts else []
            for prompt in chain(edit.train_rephrases, further):
                asked += 1
                yield index, prompt, edit

    if not contexts and not any(edit.train_rephrases for edit in edits):
        return None
    rows = write_rows(tokenize_forms(forms(), tokenizer, max_length, with_subjects), FEATURES)
    if len(rows) < asked:
        warnings.warn(
            f"{asked - len(rows)} of {asked} further forms of edits are not trained on: with their targets, they are longer than "
            f"the {max_length} tokens that `max_length`, the tokenizer and the model's context allow",
            stacklevel=2,
        )
    return rows
