"""All sequences that a run may train on: each edit's bare prompt, its further forms, and what is to be preserved."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from datasets import Dataset, concatenate_datasets

from ..edits.rows import write_rows
from ..preservation import Anchor
from .augmentation import drawn_form
from .data import FEATURES, IGNORED


# 25 of them took two fifths of a step's time, and left no more of the model alone (docs/log.md).
_MOST_ANCHORS = 8


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
        most_forms (`int`):
            How many forms the edit with the most of them has, with its bare prompt.
    """

    def __init__(self, bare: Dataset, forms: Dataset | None = None, anchors: Sequence[Anchor] = (), seed: int = 0):
        self.anchors, self.seed, self.epoch = anchors, seed, 0
        self._edits = len(bare)
        counts = torch.zeros(self._edits, dtype=torch.long)
        if forms is not None:
            counts += torch.bincount(torch.as_tensor(forms["index"][:], dtype=torch.long), minlength=self._edits)
        self._forms = counts + 1  # (edits,), with the bare prompt
        self.most_forms = int(self._forms.max())
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
        """Return which anchors a batch is held to: as many as it has edits, up to 8, chosen by its edits and the epoch alone, so
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
    return {"index": -1, "input_ids": ids, "labels": [IGNORED] * first + ids[first:], "subject": []}
