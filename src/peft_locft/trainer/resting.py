"""Edits that are learned leave the epochs, and come back to be checked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ..edits import write_atomically
from .config import EditConfig
from .loss import EditLosses


_NAME = "resting_edits.json"


class Resting:
    """Which edits rest, because their loss was small when they were last visited.

    Args:
        num_edits (`int`):
            How many edits there are.
        args ([`EditConfig`]):
            The training arguments.

    Attributes:
        losses (`torch.Tensor` of shape `(edits,)`):
            Each edit's loss when it was last visited, in float32.
        now (`torch.Tensor` of shape `(edits,)`):
            Whether each edit rests in this epoch.
        epochs (`int`):
            How many epochs ago all edits were visited.
    """

    def __init__(self, num_edits: int, args: EditConfig):
        self.args = args
        self.losses = torch.full((num_edits,), torch.inf)
        self.now = torch.zeros(num_edits, dtype=torch.bool)
        self.epochs = 0

    def complete(self, index: torch.Tensor, losses: EditLosses) -> EditLosses:
        """Remember the losses of a batch, and put in those of its edits that rest.

        Args:
            index (`torch.Tensor`):
                The edits of the batch, of shape (edits,).
            losses ([`EditLosses`]):
                The losses, in which an edit that rests has 0.

        Returns:
            [`EditLosses`]: The losses with those that were last known for edits that rest.
        """
        index = index.cpu()
        rests = self.now[index]
        self.losses[index] = torch.where(rests, self.losses[index], losses.per_edit.detach().float().cpu())
        known = self.losses[index].to(losses.per_edit)
        return losses._replace(per_edit=known, learned=losses.learned | rests.to(losses.learned.device))

    def end_epoch(self, loss: float) -> bool:
        """Choose who rests in the next epoch.

        Args:
            loss (`float`):
                The epoch's mean loss, with the last known one for edits that rested.

        Returns:
            `bool`: Whether all edits were visited in this epoch, so that its loss can be relied on.
        """
        complete = not bool(self.now.any())
        self.epochs = 0 if complete else self.epochs + 1
        # In place: the collator looks at it.
        if not self.args.recheck_epochs or self.epochs >= self.args.recheck_epochs or loss < self.args.stop_loss:
            self.now[:] = False
        else:
            self.now[:] = self.losses < self.args.skip_loss
        return complete

    def save(self, checkpoint: str | os.PathLike) -> None:
        """Write the state into a checkpoint, if edits may rest at all."""
        if self.args.recheck_epochs:
            state = {
                "losses": self.losses.tolist(),
                "now": self.now.nonzero().flatten().tolist(),
                "epochs": self.epochs,
            }
            write_atomically(Path(checkpoint) / _NAME, json.dumps(state))

    def load(self, checkpoint: str | os.PathLike) -> None:
        """Read the state from a checkpoint, if it has one."""
        path = Path(checkpoint) / _NAME
        if self.args.recheck_epochs and path.is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
            self.losses[:] = torch.tensor(state["losses"])
            self.now[state["now"]] = True
            self.epochs = state["epochs"]
