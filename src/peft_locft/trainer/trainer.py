"""`EditTrainer`: LocFT-BF in the shape of a TRL trainer."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from ..edits import EditSet, load_edits
from ..evaluation import METRICS, Answer, EditResults, evaluate_edits
from ..location import default_location
from ..tuner import LocFTConfig, check_tokenizer
from .checks import check_breadth_first, check_output_dir, check_same_edits, find_checkpoint, read_state
from .config import EditConfig
from .data import EditCollator, tokenize_edits
from .loss import edit_losses, takes_logits_to_keep
from .prefix_cache import PrefixCache, build_prefix_cache
from .progress import EditProgressBar, EpochEndCallback, EpochProgress
from .publishing import PublishingTrainer
from .setup import (
    automatic_batch_size,
    automatic_learning_rate,
    check_decoder,
    load_eval_edits,
    load_model,
    load_tokenizer,
    max_length,
)


class EditTrainer(PublishingTrainer):
    """
    Trainer that teaches a language model edits, breadth-first: in epochs of shuffled mini-batches over all edits
    (LocFT-BF, [arXiv 2509.22072](https://arxiv.org/abs/2509.22072)).

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model to edit: its name on the Hub or its folder, a loaded model, or a PEFT model whose active adapter
            is trained on. Only the adapter is trained, so the base model's weights stay as they are.
        args ([`EditConfig`], *optional*):
            The training arguments. Defaults to the published procedure, with `output_dir="trainer_output"`.
        train_dataset ([`EditSet`], [`~datasets.Dataset`], `str` or `os.PathLike`):
            The edits, or whatever else [`load_edits`] makes edits of.
        eval_dataset ([`EditSet`], [`~datasets.Dataset`], `str`, `os.PathLike` or `dict`, *optional*):
            The edits to evaluate on, or several such sets by name. Defaults to the edits that are trained.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. Defaults to the model's own.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Where and how to train: a [`LocFTConfig`] or the config of any other PEFT method that changes modules, such
            as LoRA. Defaults to the down projection of a late layer.
        callbacks (`list[TrainerCallback]`, *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*):
            An optimizer and a scheduler to use instead of Adam at a constant rate.

    Raises:
        `ValueError`: If the arguments defeat breadth-first training, or an edit does not fit the model.

    Examples:

    ```python
    >>> trainer = EditTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     args=EditConfig(output_dir="capitals"),
    ...     train_dataset=load_edits("edits.jsonl"),
    ...     peft_config=LocFTConfig(layers=[22]),
    ... )
    >>> trainer.train()
    >>> trainer.evaluate()
    >>> trainer.save_model()
    ```
    """

    _tag_names = ["peft-locft"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: EditConfig | None = None,
        train_dataset: EditSet | Dataset | str | os.PathLike | None = None,
        eval_dataset: EditSet | Dataset | str | os.PathLike | Mapping[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        args = copy.copy(args) if args is not None else EditConfig()  # the caller's stays as it is
        # Cheap checks come before the model is loaded.
        if train_dataset is None:
            raise ValueError("`train_dataset` is missing: give the edits, as from `load_edits('edits.jsonl')`")
        self.edits = load_edits(train_dataset)
        self.eval_edits = load_eval_edits(eval_dataset)
        if args.per_device_train_batch_size is None:
            parallel = args.gradient_accumulation_steps * args.world_size * max(args.n_gpu, 1)
            args.per_device_train_batch_size = automatic_batch_size(len(self.edits), parallel)
        check_breadth_first(args, len(self.edits))
        if not torch.accelerator.is_available():
            args.dataloader_pin_memory = False  # or else torch warns that there is nothing to pin for
        if isinstance(model, PeftModel) and peft_config is not None:
            raise ValueError(
                "`model` is a PeftModel already and `peft_config` was given too: give the base model with "
                "`peft_config`, or the PeftModel alone"
            )

        set_seed(args.seed)  # so that an adapter with a random start, such as LoRA, is repeatable too
        if isinstance(model, str):
            model, processing_class = load_model(model, args, processing_class)
        elif processing_class is None:
            processing_class = load_tokenizer(model)
        base_model = model.get_base_model() if isinstance(model, PeftModel) else model
        check_decoder(base_model)
        tokenized = tokenize_edits(self.edits, processing_class, max_length(args, base_model, processing_class))
        if not isinstance(model, PeftModel):
            peft_config = copy.deepcopy(peft_config) if peft_config is not None else default_location(model)
            peft_config.task_type = peft_config.task_type or "CAUSAL_LM"
            model = get_peft_model(model, peft_config)
        elif not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "the PeftModel has no trainable parameters: load it with `PeftModel.from_pretrained(..., "
                "is_trainable=True)` or make an adapter active with `set_adapter`"
            )
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"{type(model.active_peft_config).__name__} learns a prompt, expected a PEFT config that changes modules, "
                "such as LocFTConfig or LoraConfig: an edit is a change of the model's weights"
            )
        if isinstance(model.active_peft_config, LocFTConfig):
            check_tokenizer(model.active_peft_config, processing_class, remember=True)
        if args.learning_rate is None:
            args.learning_rate = automatic_learning_rate(model)

        pad_token_id = processing_class.pad_token_id
        super().__init__(
            model=model,
            args=args,
            data_collator=EditCollator(processing_class.eos_token_id if pad_token_id is None else pad_token_id),
            train_dataset=tokenized,
            eval_dataset=self.eval_edits,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model.add_model_tags(self._tag_names)
        # `compute_loss` divides by the edits of the whole accumulated batch, so the Trainer must not scale again.
        self.loss_is_scaled_for_ga = True
        self.progress = EpochProgress()
        self.results: EditResults | None = None
        self._report: EditResults | None = None
        self._keeps_logits = takes_logits_to_keep(base_model)
        self._cache: PrefixCache | None = None
        self._batch_loss = 0.0
        self._before: dict[EditSet, list[Answer]] = {}
        self._times: dict[str, float] = {}
        self.add_callback(EpochEndCallback(self))
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(EditProgressBar)

    # ---- Training ----

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
            `ValueError`: If a checkpoint was made with other edits.
        """
        start = time.perf_counter()
        max_epochs = self.args.num_train_epochs
        self.progress = EpochProgress()
        if resume_from_checkpoint:
            resume_from_checkpoint = self._prepare_resume(resume_from_checkpoint)
        elif not self.state.global_step:
            check_output_dir(self.args.output_dir)
            set_seed(self.args.seed)
        self._cache = self._build_cache()
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            self.args.num_train_epochs = max_epochs
            self._cache = None
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
        self.progress = EpochProgress.load(checkpoint)
        losses = [entry["epoch_loss"] for entry in state["log_history"] if "epoch_loss" in entry]
        if self.progress.edits == len(self.edits):  # saved at the last step of an epoch, before the epoch was closed
            losses.append(self.progress.loss / self.progress.edits)
        if losses and losses[-1] < self.args.stop_loss and self.progress.edits in (0, len(self.edits)):
            # The run was killed after its last epoch: nothing is left to train, only to load.
            self.args.num_train_epochs = len(losses)
        return str(checkpoint)

    def _build_cache(self) -> PrefixCache | None:
        """Compute the layers below the lowest trained one, if that is asked for and exact."""
        if not self.args.prefix_cache:
            return None
        with self.compute_loss_context_manager():
            return build_prefix_cache(
                self.model, self.train_dataset, self.data_collator, self.args, self._keeps_logits
            )

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["index", "input_ids", "labels"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self._cache.entering(inputs) if self._cache is not None else nullcontext():
            losses = edit_losses(model, inputs, self._keeps_logits)
        count = num_items_in_batch if num_items_in_batch is not None else len(losses.per_edit)
        # Averaging gradients over processes divides by their number, which the count of items has in it already.
        scale = self.accelerator.num_processes if num_items_in_batch is not None else 1
        loss = losses.per_edit.sum() * (scale / count)
        return (loss, losses) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._train_mode(model)
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss, losses = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        # Summed over processes, so that all of them agree on whether to step.
        count = losses.per_edit.new_tensor(len(losses.per_edit))
        sums = torch.stack([losses.per_edit.detach().sum(), losses.learned.sum().float(), count])
        loss_sum, learned, edits = self.accelerator.reduce(sums, "sum").tolist()
        self.progress.add(loss_sum, int(learned), int(edits))
        self._batch_loss += loss_sum / (num_items_in_batch or edits)
        step_is_due = self.accelerator.sync_gradients
        if step_is_due and self._batch_loss < self.args.skip_loss:
            # Gradients of None leave weights and moments as they are; gradients of zero would still move them.
            model.zero_grad(set_to_none=True)
            self.progress.skipped += 1
        else:
            self.accelerator.backward(loss)
        if step_is_due:
            self._batch_loss = 0.0
        return loss.detach()

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
        count = torch.tensor(sum(len(batch["labels"]) for batch in batch_samples), device=device)
        return int(self.accelerator.reduce(count, "sum"))

    # ---- Evaluation ----

    def evaluate(
        self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Score the edits by free, greedy generation, against the unedited model. What was answered stands in
        `trainer.results`; of several sets, it holds the last. The results on the trainer's own edits are those that
        are saved and published with the adapter.

        Args:
            eval_dataset ([`EditSet`], [`~datasets.Dataset`], `str` or `dict`, *optional*):
                The edits to evaluate on, or several such sets by name. Defaults to the trainer's `eval_dataset`, and
                without one to the edits that are trained.
            ignore_keys (`list[str]`, *optional*):
                Not used.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                What the names of the metrics begin with.

        Returns:
            `dict[str, float]`: `eval_reliability`, and `eval_generalization`, `eval_locality` and `eval_portability`
            where the edits have such probes, as fractions; the same as `eval_before_...` for the unedited model; and
            `eval_runtime` in seconds.
        """
        edits = self.eval_edits or self.edits if eval_dataset is None else load_eval_edits(eval_dataset)
        if isinstance(edits, Mapping):
            metrics = {}
            for name, some in edits.items():
                metrics.update(self.evaluate(some, metric_key_prefix=f"{metric_key_prefix}_{name}"))
            return metrics
        start = time.perf_counter()
        model = self.accelerator.unwrap_model(self.model)
        results = evaluate_edits(
            model,
            self.processing_class,
            edits,
            batch_size=self.args.per_device_eval_batch_size,
            before=self._before.get(edits),
            show_progress=not self.args.disable_tqdm,
        )
        self._before[edits] = results.before_answers
        self._times.update(results.times)
        results.times = dict(self._times)
        results.settings = self._settings()
        results.epoch_losses = [entry["epoch_loss"] for entry in self.state.log_history if "epoch_loss" in entry]
        self.results = results
        if eval_dataset is None or edits == self.edits:
            self._report = results
            self._attach_files()
        metrics = {f"{metric_key_prefix}_{name}": results.after[name] for name in METRICS}
        metrics |= {f"{metric_key_prefix}_before_{name}": results.before[name] for name in METRICS}
        metrics = {name: value for name, value in metrics.items() if value is not None}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - start, 4)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _settings(self) -> dict[str, Any]:
        config = self.model.active_peft_config
        targets = config.target_modules
        return {
            "model": config.base_model_name_or_path,
            "peft_type": getattr(config.peft_type, "value", config.peft_type),
            "layers": getattr(config, "layers_to_transform", None),
            "target_modules": sorted(targets) if isinstance(targets, (set, list)) else targets,
            "learning_rate": self.args.learning_rate,
            "batch_size": self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            "max_epochs": self.args.num_train_epochs,
            "epochs": round(self.state.epoch or 0),
            "skip_loss": self.args.skip_loss,
            "stop_loss": self.args.stop_loss,
            "seed": self.args.seed,
        }
