"""All sequences that a run may train on: each edit's bare prompt, its further forms, and what is to be preserved."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ..edits import Edit, EditSet
from ..edits.rows import write_rows
from ..preservation import Anchor
from .augmentation import contexts_of, drawn_form
from .data import FEATURES, IGNORED, tokenize_forms


# With batches of a hundred edits, as many again would take most of a step's time. All settings of docs/log.md had 25.
_MOST_ANCHORS = 32


class TrainingPool:
    """The sequences, and which of them an epoch trains.

    Args:
        bare (`Dataset`):
            The edits' bare prompts, one row an edit, of [`tokenize_edits`].
        forms (`Dataset`, *optional*):
            Their further forms, in the order of the edits.
        anchors (`Sequence[Anchor]`, *optional*):
            What is to be preserved.
        seed (`int`, *optional*, defaults to `0`):
            The run's seed.

    Attributes:
        rows ([`~datasets.Dataset`]):
            All of these, in this order.
        epoch (`int`):
            The epoch that is trained, from 0.
    """

    def __init__(self, bare: Dataset, forms: Dataset | None = None, anchors: Sequence[Anchor] = (), seed: int = 0):
        self.anchors, self.seed, self.epoch = anchors, seed, 0
        self._edits = len(bare)
        counts = torch.zeros(self._edits, dtype=torch.long)
        if forms is not None:
            counts += torch.bincount(torch.as_tensor(forms["index"][:], dtype=torch.long), minlength=self._edits)
        self._forms = counts + 1  # (edits,), with the bare prompt
        self._further = self._edits + torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])  # (edits + 1,)
        parts = [bare, *([forms] if forms is not None else [])]
        if anchors:
            parts.append(write_rows(map(_anchor_row, anchors), FEATURES))
        self.rows = concatenate_datasets(parts) if len(parts) > 1 else bare

    def drawn(self, edit: dict) -> dict:
        """Return the form of an edit that this epoch trains.

        Args:
            edit (`dict`):
                The row of its bare prompt.

        Returns:
            `dict`: The row of the form, with its place among all rows as `row`.
        """
        index, forms = edit["index"], int(self._forms[edit["index"]])
        form = drawn_form(index, forms, self.epoch, self.seed) if forms > 1 else 0
        if form == 0:
            return {**edit, "row": index}
        row = int(self._further[index]) + form - 1
        return {**self.rows[row], "row": row}

    def drawn_anchors(self, edits: Sequence[dict]) -> list[int]:
        """Return which anchors a batch is held to: as many as it has edits, up to 32, chosen by its edits and the epoch alone, so
        that a run that is interrupted chooses the same again.

        Args:
            edits (`Sequence[dict]`):
                The rows of the batch.

        Returns:
            `list[int]`: Places in `anchors`.
        """
        if not self.anchors:
            return []
        choice = random.Random(f"{self.seed} {self.epoch} {edits[0]['index']}")
        return choice.sample(range(len(self.anchors)), min(len(edits), _MOST_ANCHORS, len(self.anchors)))

    def anchor_row(self, anchor: int) -> dict:
        """Return an anchor as a row.

        Args:
            anchor (`int`):
                Its place in `anchors`.

        Returns:
            `dict`: With its place among all rows as `row`.
        """
        row = len(self.rows) - len(self.anchors) + anchor
        return {**self.rows[row], "row": row}


def _anchor_row(anchor: Anchor) -> dict:
    # Labelled from behind the first position whose next token was said: which these are matters, not what they are.
    ids, first = anchor.input_ids, anchor.first + 1
    return {"index": -1, "input_ids": ids, "labels": [IGNORED] * first + ids[first:]}


def make_forms(
    edits: EditSet,
    contexts: int,
    prefixes: Sequence[str],
    chat: str | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    seed: int,
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

    Returns:
        [`~datasets.Dataset`] or `None`: Rows of [`tokenize_forms`]; `None` if there are none.
    """

    asked = 0

    def forms() -> Iterator[tuple[int, str, Edit]]:
        nonlocal asked
        for index, edit in enumerate(edits):
            further = contexts_of(edit, contexts, prefixes, chat, seed) if contexts else []
            for prompt in chain(edit.train_rephrases, further):
                asked += 1
                yield index, prompt, edit

    if not contexts and not any(edit.train_rephrases for edit in edits):
        return None
    rows = write_rows(tokenize_forms(forms(), tokenizer, max_length), FEATURES)
    if len(rows) < asked:
        warnings.warn(
            f"{asked - len(rows)} of {asked} further forms of edits are not trained on: with their targets, they are longer than "
            f"the {max_length} tokens that `max_length`, the tokenizer and the model's context allow",
            stacklevel=2,
        )
    return rows
