"""The loop of LocFT-BF: epochs of shuffled mini-batches over all edits, until all are learned."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from ..preservation import is_projected
from ..tuner import LocFTConfig
from ..tuner.temporary import evaluating
from .batches import EditCollator
from .checks import check_output_dir, check_same_edits, check_same_place, find_checkpoint, read_state, step_size
from .exactness import Shortcuts, exact_shortcuts
from .last_layer import find_last_mlp
from .loss import EditLosses, edit_losses
from .precision import frozen_dtype, frozen_weights_in
from .prefix_cache import build_prefix_cache
from .preserving import preserving
from .progress import EpochProgress
from .publishing import PublishingTrainer
from .rate import limited_learning_rate
from .recipes import automatic_decay
from .resting import Resting


class BreadthFirstTrainer(PublishingTrainer):
    """The part of [`EditTrainer`] that trains."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Train on all edits until the epoch's mean loss is small or the epochs are used up.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint to go on from, or `True` for the newest complete one in `args.output_dir`. The result is
                the same as that of a run that was never interrupted.
            kwargs (`dict`, *optional*):
                Passed on to [`~transformers.Trainer.train`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: The number of steps, the mean loss and metrics.

        Raises:
            `FileExistsError`: If the output folder holds another run.
            `FileNotFoundError`: If there is no complete checkpoint to go on from.
            `ValueError`: If a checkpoint was made with other edits, or of an adapter at another place.
        """
        start = time.perf_counter()
        max_epochs = self.args.num_train_epochs
        self.progress = EpochProgress()
        self.resting = Resting(len(self.edits), self.args)
        if resume_from_checkpoint:
            resume_from_checkpoint = self._prepare_resume(resume_from_checkpoint)
        elif not self.state.global_step:
            check_output_dir(self.args.output_dir)
            set_seed(self.args.seed)
        with ExitStack() as stack:
            self._preservation = stack.enter_context(
                preserving(
                    self.model,
                    self.processing_class,
                    self.edits,
                    self.train_dataset,
                    self.args,
                    self._max_length,
                    bool(resume_from_checkpoint or self.state.global_step),
                    self.add_callback,
                    self.remove_callback,
                )
            )
            if resume_from_checkpoint:
                self._check_projection(resume_from_checkpoint)
            shortcuts = Shortcuts()
            try:
                self._prepare_batches(stack)
                self._set_decay(max_epochs)
                output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
            finally:
                self.args.num_train_epochs = max_epochs
                shortcuts, self._shortcuts = self._shortcuts, Shortcuts()
                self.data_collator = EditCollator(self.data_collator.pad_token_id)
                self._preservation = None
        if shortcuts.cache is not None:
            shortcuts.cache.store.delete()  # only a run that was interrupted needs its file again
        self._times["train"] = self._times.get("train", 0.0) + time.perf_counter() - start
        self.results = self._report = None  # what was evaluated before is not what was trained now
        self._attach_files()
        return output

    def _prepare_resume(self, resume_from_checkpoint: str | bool) -> str:
        checkpoint = (
            find_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else Path(resume_from_checkpoint)
        )
        state = read_state(checkpoint)
        if state is None:
            raise FileNotFoundError(
                f"{checkpoint} is no complete checkpoint: it has no readable trainer_state.json. Give another one, or "
                "`True` for the newest complete one in the output folder"
            )
        check_same_edits(checkpoint, self.edits)
        check_same_place(checkpoint, self.accelerator.unwrap_model(self.model))
        self.progress = EpochProgress.load(checkpoint)
        self.resting.load(checkpoint)
        losses = [entry["epoch_loss"] for entry in state["log_history"] if "epoch_loss" in entry]
        if self.progress.edits == len(self.edits):  # saved at the last step of an epoch, before the epoch was closed
            losses.append(self.progress.loss / self.progress.edits)
        was_last = losses and losses[-1] < self.args.stop_loss and self.progress.edits in (0, len(self.edits))
        all_visited = not self.resting.now.any() if self.progress.edits else not self.resting.epochs
        if was_last and all_visited:
            # The run was killed after its last epoch: nothing is left to train, only to load.
            self.args.num_train_epochs = len(losses)
        return str(checkpoint)

    def _limit_rate(self) -> None:
        """Lower a rate that the user did not give, where it is too high; once, before anything is trained."""
        if self._rate_factor is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return  # sharded weights have no gradients before training
        pad_token_id = self.data_collator.pad_token_id
        with self.compute_loss_context_manager():
            self.args.learning_rate = limited_learning_rate(
                self.model,
                self.train_dataset,
                self.args,
                self._rate_factor,
                pad_token_id,
                self._keeps_logits,
                self._shortcuts,
            )
        self._rate_factor = None

    def _set_decay(self, epochs: float) -> None:
        """Decay as the recipe says where the user does not say: by the rate, which is not known earlier."""
        args = self.args
        if args.weight_decay is not None:
            return
        args.weight_decay = 0.0
        if isinstance(self.model.active_peft_config, LocFTConfig):  # the factors of a LoRA are no change by themselves
            steps = args.max_steps if args.max_steps > 0 else epochs * -(-len(self.edits) // step_size(args))
            args.weight_decay = automatic_decay(args.recipe, len(self.edits), args.learning_rate, steps)

    def _check_projection(self, checkpoint: str) -> None:
        if self._preservation.projection is not None:
            self._preservation.projection.check(checkpoint)
        elif is_projected(checkpoint):
            raise ValueError(
                f"{checkpoint} was trained behind a projector: resume with the same `projector` and `output_projector`, not 0"
            )

    def _prepare_batches(self, stack: ExitStack) -> None:
        """Choose the fastest way to compute the losses that is exact for this model."""
        model, collator = self.model, self.data_collator
        dtype = frozen_dtype(self.args, model)
        with evaluating(model), self.compute_loss_context_manager():
            cache = None
            if self.args.prefix_cache:
                rows = self._preservation.pool.rows
                cache = build_prefix_cache(model, rows, self.args, collator.pad_token_id, dtype)
            # Checkpointing runs a layer again later, when nothing is left out of it any more. A focus has to see all tokens.
            leaves_out = not self.args.gradient_checkpointing and self._preservation.focus is None
            last_mlp = find_last_mlp(model) if leaves_out else None
            # NEFTune's noise depends on how long a row is.
            possible = Shortcuts(not self.args.neftune_noise_alpha, cache, last_mlp)
            shortcuts = exact_shortcuts(model, self.train_dataset, collator.pad_token_id, self._keeps_logits, possible)
        self._shortcuts, collator.packed, collator.cache = shortcuts, shortcuts.packed, shortcuts.cache
        collator.resting = self.resting.now if self.args.recheck_epochs else None
        collator.pool = self._preservation.pool
        collator.focus = self.args.subject_focus if self._preservation.focus is not None else 0.0
        self._limit_rate()
        if dtype is not None:
            below = shortcuts.cache.prefix.below if shortcuts.cache is not None else []
            stack.enter_context(frozen_weights_in(dtype, model, below))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        projection = self._preservation.projection if self._preservation is not None else None
        if projection is not None:
            projection.load(resume_from_checkpoint)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["index", "input_ids", "labels", "subject"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._preservation is not None and self._preservation.focus is not None:
            # Until the next batch: checkpointed layers are computed again in the backward pass.
            self._preservation.focus.shares = inputs.get("shares")
        with self._shortcuts.taken(inputs):
            losses = edit_losses(model, inputs, self._keeps_logits, self.args.margin)
        count = num_items_in_batch if num_items_in_batch is not None else len(losses.per_edit)
        # Averaging gradients over processes divides by their number, which the count of items has in it already.
        scale = self.accelerator.num_processes if num_items_in_batch is not None else 1
        loss = losses.per_edit.sum() * (scale / count)
        if self._preservation is not None:
            loss = loss + self._preservation.terms(losses.divergence) * (len(losses.per_edit) * scale / count)
        return (loss, losses) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._train_mode(model)
        inputs = self._prepare_inputs(inputs)
        if len(inputs["input_ids"]):
            with self.compute_loss_context_manager():
                loss, losses = self.compute_loss(
                    model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
                )
        else:  # all edits of this batch rest
            loss, losses = None, EditLosses.zeros(len(inputs["index"]), self.args.device)
        if self.args.recheck_epochs:
            losses = self.resting.complete(inputs["index"], losses)
        # Summed over processes, so that all of them agree on whether to step.
        count = losses.per_edit.new_tensor(len(losses.per_edit))
        moved = losses.divergence.detach() * count if losses.divergence is not None else torch.zeros_like(count)
        sums = torch.stack([losses.per_edit.detach().sum(), losses.learned.sum().float(), count, moved])
        # The one wait for the device in a step: whether there is a step depends on it.
        loss_sum, learned, edits, moved_sum = self.accelerator.reduce(sums, "sum").tolist()
        self.progress.add(loss_sum, int(learned), int(edits), moved_sum)
        self._batch_loss += loss_sum / (num_items_in_batch or edits)
        step_is_due = self.accelerator.sync_gradients
        if step_is_due and self._batch_loss < self.args.skip_loss:
            # Gradients of None leave weights and moments as they are; gradients of zero would still move them.
            model.zero_grad(set_to_none=True)
            self.progress.skipped += 1
        elif loss is not None:
            self.accelerator.backward(loss)
        if step_is_due:
            self._batch_loss = 0.0
        return loss.detach() if loss is not None else sums.new_zeros(())

    @staticmethod
    def _train_mode(model: nn.Module) -> None:
        """Train the adapter with the base model in evaluation mode: dropout in frozen weights would teach nothing."""
        model.eval()
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                for name in module.adapter_layer_names + module.other_param_names:
                    part = getattr(module, name, None)
                    if isinstance(part, nn.Module):
                        part.train()
            elif isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                # Itself only, not its children, because checkpointing asks this flag. Without checkpointing it must not
                # be set: OPT's layers ask it too, for their dropout.
                module.training = True

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int | None:
        # The items that are averaged over are edits, in all micro-batches and processes of one step.
        count = sum(len(batch["index"]) for batch in batch_samples)
        if self.args.world_size == 1:
            return count
        return int(self.accelerator.reduce(torch.tensor(count, device=device), "sum"))
