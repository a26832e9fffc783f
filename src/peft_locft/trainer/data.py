"""From edits to tokens, with labels on the target only."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import islice

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..edits import Edit, EditDataError, EditSet
from ..edits.rows import CHUNK, write_rows
from ..edits.tokens import encode_answers, subject_places
from .augmentation import is_question


IGNORED = -100
FEATURES = Features(
    {
        "index": Value("int64"),
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "subject": List(Value("int32")),
    }
)


def tokenize_edits(
    edits: EditSet, tokenizer: PreTrainedTokenizerBase, max_length: int | None, with_subjects: bool = False
) -> Dataset:
    """Encode each edit as prompt, space, target and EOS, with labels on target and EOS.

    Args:
        edits ([`EditSet`]):
            The edits.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer; it needs an EOS token.
        max_length (`int`, *optional*):
            The longest sequence that the model takes, in tokens.
        with_subjects (`bool`, *optional*, defaults to `False`):
            Whether to find the subjects of the edits that are beginnings of sentences, for a focus on them.

    Returns:
        [`~datasets.Dataset`]: With the columns `index`, `input_ids`, `labels` and `subject` (the places of the subject's
        tokens, empty where they were not looked for or not found), one row an edit, in order; memory-mapped.

    Raises:
        [`EditDataError`]: Naming every edit that is too long or whose target has no tokens.
        `ValueError`: If the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no EOS token, which every target has to end with, or else "
            "the edited model would not know where its answer ends: set `tokenizer.eos_token` and pass the tokenizer "
            "as `processing_class`"
        )
    if with_subjects and not tokenizer.is_fast:
        warnings.warn(
            f"`subject_focus` is off: {type(tokenizer).__name__} is not a fast tokenizer, which tells the characters of each token. "
            "Load one with `AutoTokenizer.from_pretrained`",
            stacklevel=2,
        )
    faults: list[str] = []

    def rows() -> Iterator[dict]:
        prompts = ((number, edit.prompt, edit) for number, edit in enumerate(edits))
        for index, prompt, edit, prompt_ids, target_ids in _encoded(prompts, tokenizer):
            fault = _fault(len(prompt_ids), len(target_ids), edit, max_length)
            if fault is None:
                places = _subject(edit, prompt, tokenizer) if with_subjects else []
                yield _row(index, prompt_ids, target_ids, tokenizer, places)
            else:
                faults.append(f"edit {index + 1} ({edit.id}): {fault}")

    data = write_rows(rows(), FEATURES)
    if faults:
        raise EditDataError("the edits as this model's tokenizer encodes them", faults)
    return data


def tokenize_forms(
    forms: Iterable[tuple[int, str, Edit]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    with_subjects: bool = False,
) -> Iterator[dict]:
    """Encode further forms of edits in the same way. A form that is too long for the model is left out.

    Args:
        forms (`Iterable[tuple[int, str, Edit]]`):
            The place of the edit, the prompt in this form, and the edit.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        max_length (`int`, *optional*):
            The longest sequence that the model takes, in tokens.
        with_subjects (`bool`, *optional*, defaults to `False`):
            As there.

    Returns:
        `Iterator[dict]`: Rows as [`tokenize_edits`] makes them, in order.
    """
    for index, prompt, edit, prompt_ids, target_ids in _encoded(forms, tokenizer):
        if max_length is None or len(prompt_ids) + len(target_ids) + 1 <= max_length:
            places = _subject(edit, prompt, tokenizer) if with_subjects else []
            yield _row(index, prompt_ids, target_ids, tokenizer, places)


def _subject(edit: Edit, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the places of the subject's tokens in one of the edit's forms, unless it is a question."""
    if is_question(edit.prompt) or not tokenizer.is_fast:
        return []
    # Not in what stands before the edit's own words, such as a chat's first turn.
    return subject_places(tokenizer, prompt, edit.subject, max(prompt.rfind(edit.prompt), 0))


def _fault(prompt: int, target: int, edit: Edit, max_length: int | None) -> str | None:
    """Say why an edit cannot be trained, by its numbers of tokens."""
    length = prompt + target + 1  # and EOS
    if not target:
        return f"the tokenizer turns its target {edit.target!r} into no tokens: nothing to learn"
    if max_length is not None and prompt >= max_length:
        return (
            f"its prompt alone has {prompt} tokens, which leaves nothing of the target to learn within the {max_length} "
            "tokens that `max_length`, the tokenizer and the model's context allow: shorten the prompt"
        )
    if max_length is not None and length > max_length:
        return (
            f"it has {length} tokens with EOS, expected at most the {max_length} that `max_length`, the tokenizer and "
            "the model's context allow: shorten it"
        )
    return None


def _row(
    index: int, prompt_ids: list[int], target_ids: list[int], tokenizer: PreTrainedTokenizerBase, subject: list[int]
) -> dict:
    answer = [*target_ids, tokenizer.eos_token_id]
    labels = [IGNORED] * len(prompt_ids) + answer
    return {"index": index, "input_ids": prompt_ids + answer, "labels": labels, "subject": subject}


def _encoded(
    forms: Iterable[tuple[int, str, Edit]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, str, Edit, list[int], list[int]]]:
    """Yield each form with the tokens of its prompt and of the edit's target, encoded by the chunk."""
    remaining = iter(forms)
    while chunk := list(islice(remaining, CHUNK)):
        pairs = encode_answers(tokenizer, [prompt for _, prompt, _ in chunk], [edit.target for _, _, edit in chunk])
        yield from ((*form, *pair) for form, pair in zip(chunk, pairs))
