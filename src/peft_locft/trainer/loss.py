"""The loss of LocFT-BF: the mean over an edit's target tokens, then the mean over the edits."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..preservation import divergence


class EditLosses(NamedTuple):
    """The losses of a batch of edits.

    Args:
        per_edit (`torch.Tensor` of shape `(batch,)`):
            Each edit's mean cross-entropy over its target tokens and EOS, in float32, with the margin in it.
        learned (`torch.Tensor` of shape `(batch,)`):
            Whether each of these tokens is the most probable one, so that greedy generation gives the target.
        divergence (`torch.Tensor`, *optional*):
            How far the model has moved from what is to be preserved beside the batch, in nats a token.
    """

    per_edit: torch.Tensor
    learned: torch.Tensor
    divergence: torch.Tensor | None = None

    @classmethod
    def zeros(cls, edits: int, device: torch.device) -> EditLosses:
        """Return the losses of edits that were not computed: 0, and learned."""
        return cls(torch.zeros(edits, device=device), torch.ones(edits, dtype=torch.bool, device=device))


def edit_losses(
    model: nn.Module, batch: dict[str, torch.Tensor], keeps_logits: bool, margin: float = 0.0
) -> EditLosses:
    """Compute the losses of a batch, with logits at target positions only where the model can do that.

    Args:
        model (`torch.nn.Module`):
            The model.
        batch (`dict[str, torch.Tensor]`):
            What [`EditCollator`] made. An edit without tokens in it has no loss: 0.
        keeps_logits (`bool`):
            Whether the model takes `logits_to_keep` (see [`takes_logits_to_keep`]).
        margin (`float`, *optional*, defaults to `0.0`):
            By how much the logit of each target's first token is lowered in the loss, so that it has to lead by as much
            more (additive margin softmax, [arXiv 1801.05599](https://arxiv.org/abs/1801.05599), section 3.1).

    Returns:
        [`EditLosses`]: The losses.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    targets, owners, edits = batch["targets"], batch["owners"], len(batch["index"])
    # Without a cache of keys and values, which would have no use here and keeps packed edits from being told apart.
    if keeps_logits:
        # A boolean mask keeps the model's own scaling and soft-capping, and computes no other row of the vocabulary.
        logits = model(**inputs, use_cache=False, logits_to_keep=batch["predicts"]).logits
        logits = logits.reshape(len(targets), -1)
    else:
        logits = model(**inputs, use_cache=False).logits[batch["predicts"]]
    logits = logits.float()  # (tokens, vocab)
    moved = None
    if "anchor_tokens" in batch:  # for the last positions
        preserved = len(batch["anchor_tokens"])
        moved = divergence(logits[-preserved:], batch["anchor_tokens"], batch["anchor_log_probs"], owners[-preserved:])
        logits, targets, owners = (values[:-preserved] for values in (logits, targets, owners))
    wrong = logits.detach().argmax(dim=-1) != targets
    if margin:
        # The tokens of an edit stand together.
        first = owners.diff(prepend=owners.new_full((1,), -1)) != 0
        logits = logits.scatter_add(1, targets[:, None], -margin * first[:, None].to(logits))
    token_losses = F.cross_entropy(logits, targets, reduction="none")  # (tokens,)

    def per_edit(values: torch.Tensor) -> torch.Tensor:  # (tokens,) -> (edits,), sums
        return values.new_zeros(edits).index_add(0, owners, values)

    counts = per_edit(torch.ones_like(token_losses)).clamp(min=1)
    return EditLosses(per_edit(token_losses) / counts, per_edit(wrong.float()) == 0, moved)


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Return whether a model's forward takes `logits_to_keep`.

    Args:
        model (`torch.nn.Module`):
            The base model, not a PEFT model around it.

    Returns:
        `bool`: Whether it does.
    """
    return "logits_to_keep" in inspect.signature(model.forward).parameters
