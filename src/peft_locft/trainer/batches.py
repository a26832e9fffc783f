"""From tokens to batches, several edits to a row."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from .data import IGNORED


if TYPE_CHECKING:
    from .pool import TrainingPool
    from .prefix_cache import PrefixCache


class EditCollator:
    """Lay edits out as rows of tokens. Nothing is said at the padding, so no pad token has to be added.

    Args:
        pad_token_id (`int`):
            What stands in the padding; any token will do.
        packed (`bool`, *optional*, defaults to `False`):
            Whether several edits share a row, one behind the other, each with positions of its own. Else each has a row.
        cache ([`PrefixCache`], *optional*):
            Where the states that enter the lowest trained layer are taken from.
        pool ([`TrainingPool`], *optional*):
            Where the form of an edit that is trained, and what is to be preserved beside it, are taken from. Without one,
            edits are trained as they come.

    Attributes:
        row_width (`int`):
            How wide a row of several edits may be, in tokens.
        resting (`torch.Tensor` of shape `(edits,)`, *optional*):
            Which edits are left out of the rows. Their losses count as they last were.
        focus (`float`):
            By which part the share of tokens beside an edit's subject is lessened, where its place is known.
    """

    def __init__(
        self,
        pad_token_id: int,
        packed: bool = False,
        cache: PrefixCache | None = None,
        pool: TrainingPool | None = None,
    ):
        self.pad_token_id, self.packed, self.cache, self.pool = pad_token_id, packed, cache, pool
        self.row_width = _ROW_WIDTH
        self.resting: torch.Tensor | None = None
        self.focus = 0.0

    def __call__(self, edits: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Return a batch.

        Args:
            edits (`Sequence[dict]`):
                Rows of [`tokenize_edits`], or others of a pool with their place among its rows as `row`.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids` and `predicts` (whether the token after is one of a target), each of
            shape (rows, width), with `position_ids` if edits share rows, else with `attention_mask`; `targets` and
            `owners`, of shape (target tokens,): the tokens to predict, and the edit each belongs to; `index`, of shape
            (edits,): the edits' places, those that rest at the end; with a cache, `states` of shape (rows, width, hidden);
            with something to preserve, `anchor_tokens` and `anchor_log_probs` of shape (positions, kept), for the last of
            the predicted positions, whose owners come after the edits; with a focus on subjects that are there, `shares` of
            shape (rows, width): how much of each token's gradient the weights learn from.
        """
        if self.resting is not None:
            edits = sorted(edits, key=lambda edit: bool(self.resting[edit["index"]]))  # stable, so the order stays
        index = torch.tensor([edit["index"] for edit in edits])  # (edits,)
        awake = len(edits) - (int(self.resting[index].sum()) if self.resting is not None else 0)
        sequences, anchors = list(edits[:awake]), []
        if self.pool is not None and awake:
            sequences = [self.pool.drawn(edit) for edit in sequences]
            anchors = self.pool.drawn_anchors(edits)
            sequences += [self.pool.anchor_row(anchor) for anchor in anchors]
        ids = [torch.as_tensor(sequence["input_ids"], dtype=torch.long) for sequence in sequences]
        lengths = [len(sequence) for sequence in ids]
        # What is preserved has rows of its own, behind those of the edits, so that its positions come last.
        rows = pack(lengths[:awake], self.row_width) if self.packed else [[number] for number in range(awake)]
        kept = pack(lengths[awake:], self.row_width) if self.packed else [[number] for number in range(len(anchors))]
        rows += [[awake + number for number in row] for row in kept]
        width = max((sum(lengths[number] for number in row) for row in rows), default=1)
        if self.packed:
            width = -(-width // _MULTIPLE) * _MULTIPLE
        input_ids = torch.full((len(rows), width), self.pad_token_id)  # this and the next, (rows, width)
        labels = torch.full((len(rows), width), IGNORED)
        shares = torch.ones(len(rows), width)
        owners, positions, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
        for row, members in enumerate(rows):
            end = 0
            for number in members:
                place = (row, slice(end, end := end + lengths[number]))
                input_ids[place] = ids[number]
                labels[place] = torch.as_tensor(sequences[number]["labels"], dtype=torch.long)
                owners[place] = number
                positions[place] = torch.arange(lengths[number])
                mask[place] = 1
                if subject := sequences[number].get("subject"):
                    shares[place] = 1 - self.focus
                    shares[row, end - lengths[number] + torch.as_tensor(subject)] = 1
        # The logits at one position predict the token at the next.
        predicts = F.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)
        batch = {
            "input_ids": input_ids,
            "predicts": predicts,
            "targets": labels.roll(-1, dims=1)[predicts],
            "owners": owners[predicts],
            "index": index,
        }
        batch |= {"position_ids": positions} if self.packed else {"attention_mask": mask}
        if self.focus and any(sequence.get("subject") for sequence in sequences):
            batch["shares"] = shares
        if self.cache is not None:
            stored = torch.tensor([sequence.get("row", sequence["index"]) for sequence in sequences], dtype=torch.long)
            batch["states"] = self.cache.states_at(stored[owners], positions)
        if anchors:
            ordered = [anchors[number] for row in kept for number in row]
            for name in ("tokens", "log_probs"):
                batch[f"anchor_{name}"] = torch.cat([getattr(self.pool.anchors[anchor], name) for anchor in ordered])
        return batch


# Wide enough for several edits, narrow enough that attention across a row, which is masked out, costs next to nothing.
_ROW_WIDTH = 128
# Kernels like such widths, and some libraries prepare, and keep, one for each shape that they meet.
_MULTIPLE = 16


def pack(lengths: Sequence[int], width: int = _ROW_WIDTH) -> list[list[int]]:
    """Share edits out among rows of nearly the same length: the longest left goes to the emptiest row.

    Args:
        lengths (`Sequence[int]`):
            The edits' lengths, in tokens.
        width (`int`, *optional*, defaults to `128`):
            How wide a row may be, in tokens, if no edit is longer.

    Returns:
        `list[list[int]]`: For each row, the places of its edits in `lengths`.
    """
    if not lengths:
        return []
    rows = [(0, row, []) for row in range(-(-sum(lengths) // max(width, *lengths)))]
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        filled, row, members = heapq.heappop(rows)
        heapq.heappush(rows, (filled + lengths[number], row, [*members, number]))
    return [members for _, _, members in sorted(rows, key=lambda entry: entry[1])]
