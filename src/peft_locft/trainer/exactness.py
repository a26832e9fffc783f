"""The shortcuts that training takes: those with which a model's losses are the plain ones, tried on some edits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from torch import nn

from .batches import EditCollator
from .last_layer import computed_only_at
from .loss import edit_losses


if TYPE_CHECKING:
    from .prefix_cache import PrefixCache

_TRIED = 8


@dataclass(frozen=True)
class Shortcuts:
    """What need not be computed.

    Args:
        packed (`bool`):
            Whether edits share rows, which saves padding.
        cache ([`PrefixCache`], *optional*):
            What the layers below the lowest trained one said.
        last_mlp (`torch.nn.Module`, *optional*):
            The last layer's MLP, where it is computed only at the positions that have logits.
    """

    packed: bool = False
    cache: PrefixCache | None = None
    last_mlp: nn.Module | None = None

    @contextmanager
    def taken(self, batch: dict[str, torch.Tensor]) -> Iterator[None]:
        """Within this context, the model takes the shortcuts on a batch of [`EditCollator`]."""
        with ExitStack() as stack:
            if self.cache is not None:
                stack.enter_context(self.cache.entering(batch["states"]))
            if self.last_mlp is not None:
                stack.enter_context(computed_only_at(self.last_mlp, batch["predicts"]))
            yield


@torch.no_grad()
def exact_shortcuts(
    model: nn.Module,
    dataset: Dataset,
    pad_token_id: int,
    keeps_logits: bool,
    possible: Shortcuts,
) -> Shortcuts:
    """Choose the shortcuts with which a model's losses are the plain ones: of the whole model, one edit to a row.

    Args:
        model (`torch.nn.Module`):
            The model, in evaluation mode.
        dataset ([`~datasets.Dataset`]):
            The tokenised edits.
        pad_token_id (`int`):
            What stands in the padding.
        keeps_logits (`bool`):
            Whether the model takes `logits_to_keep`.
        possible ([`Shortcuts`]):
            Those to try.

    Returns:
        [`Shortcuts`]: The most of them that are exact.
    """
    edits = [dataset[row] for row in range(0, len(dataset), max(len(dataset) // _TRIED, 1))][:_TRIED]
    edits *= 2 if len(edits) == 1 else 1

    def losses(shortcuts: Shortcuts) -> torch.Tensor:
        collator = EditCollator(pad_token_id, shortcuts.packed, shortcuts.cache)
        # Edits too long to share a row may have shorter forms that do, so that two of the longest have to fit.
        collator.row_width = max(collator.row_width, 2 * max(len(edit["input_ids"]) for edit in edits))
        batch = collator(edits)
        batch = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
        with shortcuts.taken(batch):
            return edit_losses(model, batch, keeps_logits).per_edit

    plain = losses(Shortcuts())
    packed, cache, last_mlp = possible.packed, possible.cache, possible.last_mlp
    for shortcuts in dict.fromkeys(
        [
            possible,
            Shortcuts(packed, cache),
            Shortcuts(False, cache, last_mlp),
            Shortcuts(False, cache),
            Shortcuts(packed, None),
        ]
    ):
        # In 16 bits, rows of another length round in other ways.
        rounds = next(model.parameters()).dtype.itemsize < 4
        rounds |= shortcuts.cache is not None and shortcuts.cache.store.dtype.itemsize < 4
        tolerance = 5e-2 if rounds else 1e-4
        try:
            if torch.allclose(plain, losses(shortcuts), rtol=tolerance, atol=tolerance):
                break
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError):
            continue  # a model that takes no positions, or whose layers cannot be cut
    else:
        shortcuts = Shortcuts()
    if cache is not None and shortcuts.cache is None:
        warn_off("with it, this model's losses are others, so its layers say more to each other than hidden states")
    return shortcuts


def warn_off(reason: str) -> None:
    """Say that there is no prefix cache, and why."""
    warnings.warn(f"the prefix cache is off, and training slower: {reason}", stacklevel=2)
