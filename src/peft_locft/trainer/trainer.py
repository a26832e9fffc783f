"""`EditTrainer`: LocFT-BF in the shape of a TRL trainer."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)

from ..edits import EditSet, load_edits
from ..edits.contexts import check_contexts
from ..edits.tokens import load_tokenizer
from ..evaluation import METRICS, Answer, EditResults, evaluate_edits
from ..tuner import LocFTConfig, check_tokenizer
from ..tuner.quantization import keep_in_order
from ..tuner.weights import base_of
from .batches import EditCollator
from .breadth_first import BreadthFirstTrainer
from .checks import check_breadth_first, check_start, describe_taught, step_size
from .config import EditConfig
from .data import tokenize_edits
from .exactness import Shortcuts
from .loss import takes_logits_to_keep
from .offload import offload_prefix
from .preserving import Preservation
from .progress import EditProgressBar, EpochEndCallback, EpochProgress
from .rate import automatic_learning_rate, focus_share
from .recipes import MOST_EDITS, TERMS, few_factor, kl_factor, rate_factor, recipe_config, recipe_epochs
from .resting import Resting
from .setup import (
    automatic_batch_size,
    check_decoder,
    load_eval_edits,
    load_model,
    max_length,
)


class EditTrainer(BreadthFirstTrainer):
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
            as LoRA. Defaults to that of `args.recipe`: [`LocFTConfig.recommended`] for the paper's.
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
        gpus = args.n_gpu
        args._n_gpu = min(gpus, 1)  # copies of a model in threads would know nothing of its adapter's state
        # Cheap checks come before the model is loaded.
        if train_dataset is None:
            raise ValueError("`train_dataset` is missing: give the edits, as from `load_edits('edits.jsonl')`")
        self.edits = load_edits(train_dataset)
        self.eval_edits = load_eval_edits(eval_dataset)
        if args.recheck_epochs and any(edit.train_rephrases for edit in self.edits):
            raise ValueError(
                f"`recheck_epochs` is {args.recheck_epochs} and edits have `train_rephrases`, expected one of them: an edit that "
                "is learned in one form would not be visited in the others"
            )
        if args.dataloader_persistent_workers and any(edit.train_rephrases for edit in self.edits):
            raise ValueError(
                "edits have `train_rephrases` and `dataloader_persistent_workers` is True, expected False: workers that stay do not "
                "know which epoch it is, and so which form is to be trained"
            )
        if taught := describe_taught(self.edits):
            warnings.warn(taught, stacklevel=2)
        if args.per_device_train_batch_size is None:
            parallel = args.gradient_accumulation_steps * args.world_size
            most = MOST_EDITS.get(args.recipe)
            args.per_device_train_batch_size = automatic_batch_size(len(self.edits), parallel, most)
        check_breadth_first(args, len(self.edits))
        if not torch.accelerator.is_available():
            args.dataloader_pin_memory = False  # or else torch warns that there is nothing to pin for
        if isinstance(model, PeftModel) and peft_config is not None:
            raise ValueError(
                "`model` is a PeftModel already and `peft_config` was given too: give the base model with "
                "`peft_config`, or the PeftModel alone"
            )

        check_start(model.active_peft_config if isinstance(model, PeftModel) else peft_config)
        set_seed(args.seed)  # so that an adapter with a random start, such as LoRA, is repeatable too
        if isinstance(model, str):
            model, processing_class = load_model(model, args, processing_class, peft_config)
        elif processing_class is None:
            processing_class = load_tokenizer(model, "processing_class")
        base_model = base_of(model)
        check_decoder(base_model)
        keep_in_order(base_model)
        if gpus > 1 and not hasattr(base_model, "hf_device_map"):
            warnings.warn(
                f"one process has {gpus} GPUs, of which only the first is used: start one process for each, with "
                "`accelerate launch`, or spread the model over them, with `device_map='auto'`",
                stacklevel=2,
            )
        check_contexts(args.eval_contexts, processing_class)  # not only when all is trained
        self._max_length = max_length(args, base_model, processing_class)
        tokenized = tokenize_edits(self.edits, processing_class, self._max_length, bool(args.subject_focus))
        if not isinstance(model, PeftModel):
            if peft_config is None:
                if args.recipe == "locaedit" and not _is_placed(model):
                    model.to(args.device)  # which the Trainer does only later, and tracing takes its time
                needs_linear = bool(args.projector or args.output_projector or args.subject_focus)
                peft_config = recipe_config(
                    args.recipe, model, processing_class, self.edits, needs_linear, not args.disable_tqdm
                )
            peft_config = copy.deepcopy(peft_config)
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
        if args.offload_prefix and not hasattr(base_model, "hf_device_map"):
            offload_prefix(model, args)
        focus = focus_share(model, tokenized, args) if args.subject_focus else 0.0
        # What depends on how many edits there are, unless somebody has set it.
        if args.num_train_epochs == args._by_recipe.get("num_train_epochs"):
            args.num_train_epochs = recipe_epochs(args.recipe, len(self.edits), step_size(args), focus)
        if args.kl_weight == args._by_recipe.get("kl_weight"):
            args.kl_weight *= kl_factor(args.recipe, len(self.edits))
        self._rate_factor: float | None = None  # of a rate that may be too high
        if args.learning_rate is None:
            self._rate_factor = rate_factor(args.recipe, len(self.edits), focus)
            by_number = few_factor(args.recipe, len(self.edits))
            args.learning_rate = automatic_learning_rate(model, self._rate_factor * by_number)

        pad_token_id = processing_class.pad_token_id
        super().__init__(
            model=model,
            args=args,
            data_collator=EditCollator(processing_class.eos_token_id if pad_token_id is None else pad_token_id),
            train_dataset=tokenized,
            eval_dataset=self.eval_edits or (self.edits if args.eval_strategy != "no" else None),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model.add_model_tags(self._tag_names)
        # `compute_loss` divides by the edits of the whole accumulated batch, so the Trainer must not scale again.
        self.loss_is_scaled_for_ga = True
        self.progress = EpochProgress()
        self.resting = Resting(len(self.edits), args)
        self._shortcuts = Shortcuts()
        self._preservation: Preservation | None = None
        self.results: EditResults | None = None
        self._report: EditResults | None = None
        self._keeps_logits = takes_logits_to_keep(base_model)
        self._batch_loss = 0.0
        self._before: dict[tuple[EditSet, tuple[str, ...]], Sequence[Answer]] = {}
        self._times: dict[str, float] = {}
        self.add_callback(EpochEndCallback(self))
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(EditProgressBar)

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
            where the edits have such probes, as fractions; the same as `eval_before_...` for the unedited model; those in
            each of several `eval_contexts` as `eval_chat_...` and so on; and `eval_runtime` in seconds.
        """
        edits = self.eval_edits or self.edits if eval_dataset is None else load_eval_edits(eval_dataset)
        if isinstance(edits, Mapping):
            metrics = {}
            for name, some in edits.items():
                metrics.update(self.evaluate(some, metric_key_prefix=f"{metric_key_prefix}_{name}"))
            return metrics
        start = time.perf_counter()
        model = self.accelerator.unwrap_model(self.model)
        contexts = tuple(self.args.eval_contexts)
        results = evaluate_edits(
            model,
            self.processing_class,
            edits,
            contexts=contexts,
            batch_size=self.args.per_device_eval_batch_size,
            before=self._before.get((edits, contexts)),
            show_progress=not self.args.disable_tqdm,
        )
        self._before[edits, contexts] = results.before_answers
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
        if len(contexts) > 1:
            for context, scores in results.by_context().items():
                metrics |= {f"{metric_key_prefix}_{context}_{name}": scores["after"][name] for name in METRICS}
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
            "reason": getattr(config, "reason", None),
            "recipe": self.args.recipe,
            "learning_rate": self.args.learning_rate,
            "batch_size": step_size(self.args),
            "max_epochs": self.args.num_train_epochs,
            "epochs": round(self.state.epoch or 0),
            "skip_loss": self.args.skip_loss,
            "stop_loss": self.args.stop_loss,
            "seed": self.args.seed,
        } | {name: getattr(self.args, name) for name in (*TERMS, "weight_decay") if getattr(self.args, name)}


def _is_placed(model: PreTrainedModel) -> bool:
    """Return whether a model stays where it was loaded."""
    return hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False)
