"""Saving and publishing a run: the adapter, and card, ledger and results beside it."""

from __future__ import annotations

import os
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from ..edits import LEDGER_NAME, EditSet, write_atomically
from ..hub import repository_files
from ..tuner import LocFTConfig


class PublishingTrainer(Trainer):
    """The part of [`EditTrainer`] that writes: to the output folder, to checkpoints, and to the Hub."""

    def _attach_files(self, name: str | None = None, tags: list[str] | None = None) -> dict[str, str | EditSet]:
        """Make card, ledger and results of the current state, and let a LocFT adapter carry them wherever it goes."""
        model = self.accelerator.unwrap_model(self.model)
        name = name or self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).name
        tags = [*(getattr(model, "model_tags", None) or []), *(tags or [])]
        files = repository_files(name, self.edits, model.active_peft_config, self._report, tags)
        if isinstance(model.active_peft_config, LocFTConfig):
            model.active_peft_config.set_companions(files)
        return files

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The adapter and what belongs to it, not the Trainer's copies of the unchanged tokenizer and pickled arguments.
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        model = self.accelerator.unwrap_model(self.model)
        files = self._attach_files()
        projection = self._preservation.projection if self._preservation is not None else None
        with projection.folded(output_dir) if projection is not None else nullcontext():
            model.save_pretrained(output_dir, state_dict=state_dict if projection is None else None)
        config, adapter = model.active_peft_config, model.active_adapter
        if not isinstance(config, LocFTConfig) or adapter != "default":  # else it has written them beside the weights
            for name, content in files.items():
                write_atomically(Path(output_dir) / name, content)
        if self.is_in_train:
            self.progress.save(output_dir)
            self.resting.save(output_dir)
        elif self._report is not None:
            self._report.save(output_dir)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs,
    ) -> None:
        """
        Write the model card, ledger and results into the output folder.

        Args:
            model_name (`str`, *optional*):
                The adapter's title or repository.
            dataset_name (`str`, *optional*):
                Not used: the ledger holds the data.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
            kwargs (`dict`, *optional*):
                Not used; what [`~transformers.Trainer.create_model_card`] takes beside these.
        """
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else tags
            for name, content in self._attach_files(model_name, tags).items():
                write_atomically(Path(self.args.output_dir) / name, content)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        commit_message: str = "Upload edits",
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        tags: list[str] | None = None,
        **kwargs,
    ) -> CommitInfo | None:
        """
        Publish adapter, ledger, results and card. Evaluates first if that was not done since training.

        Args:
            repo_id (`str`, *optional*):
                The repository, such as `"me/capitals"`. Defaults to `args.hub_model_id`, or the output folder's name.
            commit_message (`str`, *optional*, defaults to `"Upload edits"`):
                The commit's message.
            private (`bool`, *optional*):
                Whether to make a new repository private.
            token (`str`, *optional*):
                A token with write permission. Defaults to `args.hub_token`, or the one that you logged in with.
            revision (`str`, *optional*):
                The branch to commit to.
            tags (`list[str]`, *optional*):
                Further tags for the card.
            kwargs (`dict`, *optional*):
                Not used; what [`~transformers.Trainer.push_to_hub`] takes beside these.

        Returns:
            [`~huggingface_hub.CommitInfo`]: The commit, on the main process.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        base = self.accelerator.unwrap_model(self.model).active_peft_config.base_model_name_or_path
        if base and os.path.isdir(base):
            warnings.warn(
                f"the base model is the local folder {base}, which nobody else can load the adapter on by its name: set "
                "`trainer.model.active_peft_config.base_model_name_or_path` to its name on the Hub before publishing",
                stacklevel=2,
            )
        if self._report is None:
            self.evaluate(self.edits)
        api = HfApi(token=token or self.args.hub_token)
        private = private if private is not None else self.args.hub_private_repo
        self._finish_current_push()  # one that began during training reads the files that are written now
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        name = repo_id or self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).name
        self.hub_model_id = api.create_repo(name, private=private, exist_ok=True).repo_id
        self.create_model_card(model_name=self.hub_model_id, tags=tags)
        return api.create_commit(
            self.hub_model_id,
            [CommitOperationAdd(path.name, path) for path in self._published_files(self.args.output_dir)],
            commit_message=commit_message,
            revision=revision or self.args.hub_revision,
        )

    def _published_files(self, folder: str | os.PathLike) -> list[Path]:
        """Of a folder that was saved to, the active adapter and what belongs to it: no checkpoints, no other adapters."""
        adapter = self.accelerator.unwrap_model(self.model).active_adapter
        # PEFT saves an adapter of another name into a folder of that name.
        weights = Path(folder) if adapter == "default" else Path(folder, adapter)
        files = [weights / name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
        files += [Path(folder, name) for name in (LEDGER_NAME, "README.md")]
        return [path for path in [*files, *sorted(Path(folder).glob("edit_results.*"))] if path.is_file()]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Instead of the Trainer's own, which adds the tokenizer and pickled arguments, and leaves out card and ledger.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self._finish_current_push()  # it reads the files that are written now
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # Copied, because the checkpoint may be rotated away before the upload ends.
        operations = []
        for path in self._published_files(checkpoint_folder):
            copied = Path(self.args.output_dir, path.relative_to(checkpoint_folder))
            copied.parent.mkdir(exist_ok=True)
            operations.append(CommitOperationAdd(path.name, shutil.copy(path, copied)))
        api = HfApi(token=self.args.hub_token)
        target = {"repo_id": self.hub_model_id, "revision": self.args.hub_revision, "run_as_future": True}
        message = f"Training in progress, epoch {self.state.epoch:g}"
        jobs = [api.create_commit(operations=operations, commit_message=message, **target)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            place = {"path_in_repo": "last-checkpoint" if last else Path(checkpoint_folder).name}
            message += ", checkpoint"
            jobs.append(api.upload_folder(folder_path=checkpoint_folder, commit_message=message, **place, **target))
        self.push_in_progress = PushInProgress(jobs)
