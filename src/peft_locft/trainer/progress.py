"""How far an epoch has come, and what happens at its end."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import ProgressCallback, TrainerCallback


if TYPE_CHECKING:
    from .trainer import EditTrainer

_PROGRESS_NAME = "epoch_progress.json"


@dataclass
class EpochProgress:
    """The sums of an epoch so far.

    Args:
        loss (`float`):
            The sum of the losses of the edits visited.
        learned (`int`):
            How many of them had every target token as the most probable one.
        edits (`int`):
            How many edits were visited.
        skipped (`int`):
            How many batches made no step, because their loss was small.
        divergence (`float`):
            The sum of the batches' divergences from what is preserved, each times its edits.
    """

    loss: float = 0.0
    learned: int = 0
    edits: int = 0
    skipped: int = 0
    divergence: float = 0.0

    def add(self, loss: float, learned: int, edits: int, divergence: float) -> None:
        """Add the sums of a batch."""
        self.loss += loss
        self.learned += learned
        self.edits += edits
        self.divergence += divergence

    def save(self, checkpoint: str | os.PathLike) -> None:
        """Write the sums into a checkpoint, so that one in the middle of an epoch resumes to the same mean."""
        (Path(checkpoint) / _PROGRESS_NAME).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: str | os.PathLike) -> EpochProgress:
        """Read the sums from a checkpoint."""
        return cls(**json.loads((Path(checkpoint) / _PROGRESS_NAME).read_text(encoding="utf-8")))


class EpochEndCallback(TrainerCallback):
    """Log each epoch's mean loss, and stop training once it is small.

    Args:
        trainer ([`EditTrainer`]):
            The trainer.
    """

    def __init__(self, trainer: EditTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.progress.edits == len(self.trainer.edits):
            # Resumed from a checkpoint of an epoch's last step, which was made before the epoch was closed.
            self.on_epoch_end(args, state, control, **kwargs)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Before the first batch is made: its edits' forms depend on the epoch.
        self.trainer.data_collator.pool.epoch = int((state.epoch or 0) + 1e-6)  # a fraction, if resumed within one

    def on_epoch_end(self, args, state, control, **kwargs):
        progress, self.trainer.progress = self.trainer.progress, EpochProgress()
        if not progress.edits:
            return
        loss = progress.loss / progress.edits
        should_log = control.should_log
        logs = {
            "epoch_loss": loss,
            "edits_learned": progress.learned,
            "edits_visited": progress.edits,
            "batches_skipped": progress.skipped,
        }
        if args.kl_weight:
            logs["divergence"] = progress.divergence / progress.edits
        if args.recheck_epochs:
            logs["edits_resting"] = int(self.trainer.resting.now.sum())
        self.trainer.log(logs)
        control.should_log = should_log  # logging clears it, and the Trainer's own record of the epoch is still due
        all_visited = self.trainer.resting.end_epoch(loss)
        if loss < args.stop_loss and all_visited:
            control.should_training_stop = True
            # Without this, a run that stops between two checkpoints would leave none of its last state.
            control.should_save = args.save_strategy != "no"


class EditProgressBar(ProgressCallback):
    """A progress bar that shows the last epoch's loss and how many edits are learned, instead of lines of numbers."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "epoch_loss" in logs:
            self.training_bar.set_postfix_str(
                f"epoch {state.epoch:.0f}, loss {logs['epoch_loss']:.4f}, "
                f"learned {logs['edits_learned']}/{logs['edits_visited']}"
            )
