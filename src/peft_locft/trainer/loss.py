"""The loss of LocFT-BF: the mean over an edit's target tokens, then the mean over the edits."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .data import IGNORED


class EditLosses(NamedTuple):
    """The losses of a batch of edits.

    Args:
        per_edit (`torch.Tensor` of shape `(batch,)`):
            Each edit's mean cross-entropy over its target tokens and EOS, in float32.
        learned (`torch.Tensor` of shape `(batch,)`):
            Whether each of these tokens is the most probable one, so that greedy generation gives the target.
    """

    per_edit: torch.Tensor
    learned: torch.Tensor


def edit_losses(model: nn.Module, inputs: dict[str, torch.Tensor], keeps_logits: bool) -> EditLosses:
    """Compute the losses of a batch, with logits at target positions only where the model can do that.

    Args:
        model (`torch.nn.Module`):
            The model.
        inputs (`dict[str, torch.Tensor]`):
            `input_ids`, `attention_mask` and `labels`, each of shape (batch, sequence).
        keeps_logits (`bool`):
            Whether the model takes `logits_to_keep` (see [`takes_logits_to_keep`]).

    Returns:
        [`EditLosses`]: The losses.
    """
    inputs = {name: value for name, value in inputs.items() if name != "index"}
    labels = inputs.pop("labels")  # (batch, seq)
    # The logits at one position predict the token at the next.
    predicts = F.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)  # (batch, seq)
    if keeps_logits:
        # A boolean mask keeps the model's own scaling and soft-capping, and computes no other row of the vocabulary.
        logits = model(**inputs, logits_to_keep=predicts).logits.reshape(int(predicts.sum()), -1)
    else:
        logits = model(**inputs).logits[predicts]
    logits = logits.float()  # (tokens, vocab)
    targets = labels[:, 1:][predicts[:, :-1]]  # (tokens,)
    rows = predicts.nonzero()[:, 0]  # (tokens,), the edit that each token belongs to
    counts = predicts.sum(dim=1)  # (batch,)
    token_losses = F.cross_entropy(logits, targets, reduction="none")  # (tokens,)
    per_edit = token_losses.new_zeros(len(labels)).index_add(0, rows, token_losses) / counts
    wrong = (logits.argmax(dim=-1) != targets).float()
    return EditLosses(per_edit, wrong.new_zeros(len(labels)).index_add(0, rows, wrong) == 0)


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Return whether a model's forward takes `logits_to_keep`.

    Args:
        model (`torch.nn.Module`):
            The base model, not a PEFT model around it.

    Returns:
        `bool`: Whether it does.
    """
    return "logits_to_keep" in inspect.signature(model.forward).parameters
