"""Whether a faster way to compute the losses is the same as the plain one, tried on some edits."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from torch import nn

from .batches import EditCollator
from .loss import edit_losses


if TYPE_CHECKING:
    from .prefix_cache import PrefixCache

_TRIED = 8


@torch.no_grad()
def choose_layout(
    model: nn.Module,
    dataset: Dataset,
    collator: EditCollator,
    cache: PrefixCache | None,
    keeps_logits: bool,
    may_pack: bool,
) -> None:
    """Let a collator lay edits out in the fastest way in which a model's losses are those of the plain one: the whole
    model, one edit to a row.

    Args:
        model (`torch.nn.Module`):
            The model, in evaluation mode.
        dataset ([`~datasets.Dataset`]):
            The tokenised edits.
        collator ([`EditCollator`]):
            Gets its `packed` and `cache`.
        cache ([`PrefixCache`], *optional*):
            The lower layers' states.
        keeps_logits (`bool`):
            Whether the model takes `logits_to_keep`.
        may_pack (`bool`):
            Whether edits may share rows at all.
    """
    edits = [dataset[row] for row in range(0, len(dataset), max(len(dataset) // _TRIED, 1))][:_TRIED]
    collator.packed, collator.cache, collator.resting = False, None, None
    plain = _losses(model, edits, collator, keeps_logits)
    layouts = [(True, cache), (False, cache), (True, None)] if cache is not None else [(True, None)]
    for packed, states in layouts:
        if packed and not may_pack:
            continue
        collator.packed, collator.cache = packed, states
        # In 16 bits, rows of another length round in other ways.
        rounds = next(model.parameters()).dtype.itemsize < 4 or (states is not None and states.store.dtype.itemsize < 4)
        tolerance = 5e-2 if rounds else 1e-4
        try:
            losses = _losses(model, edits, collator, keeps_logits)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError):
            continue  # a model that takes no positions, or whose layers cannot be cut
        if torch.allclose(plain, losses, rtol=tolerance, atol=tolerance):
            break
    else:
        collator.packed, collator.cache = False, None
    if cache is not None and collator.cache is None:
        warn_off("with it, this model's losses are others, so its layers say more to each other than hidden states")


def warn_off(reason: str) -> None:
    """Say that there is no prefix cache, and why."""
    warnings.warn(f"the prefix cache is off, and training slower: {reason}", stacklevel=2)


def _losses(model: nn.Module, edits: list[dict], collator: EditCollator, keeps_logits: bool) -> torch.Tensor:
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in collator(edits).items()}
    with collator.cache.entering(batch["states"]) if collator.cache is not None else nullcontext():
        return edit_losses(model, batch, keeps_logits).per_edit
