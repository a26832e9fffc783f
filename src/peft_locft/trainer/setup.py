"""What a run is made of when the user does not say: model, tokenizer, rate, batch size; and what cannot be edited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..edits import EditSet, load_edits
from ..preservation import focused, trained_deltas
from ..tuner import LocFTConfig, LocFTLayer, num_layers
from ..tuner.recommendation import published_rate
from ..tuner.weights import base_of
from .config import EditConfig
from .offload import load_with_prefix_offloaded


# Llama-3-8B's rate and the width of its down projection, and the batch (LocFT-BF, appendix on hyperparameters).
_PAPER_RATE, _PAPER_WIDTH, _PAPER_BATCH = 5e-4, 14336, 100
_OTHER_RATE = 2e-3
_LEAST_STEPS = 4


def automatic_batch_size(num_edits: int, parallel: int, most: int | None = None) -> int:
    """Return the batch size of a device: the paper's 100, or less, so that an epoch has at least 4 steps.

    Args:
        num_edits (`int`):
            How many edits there are.
        parallel (`int`):
            How many such batches make one step: devices times accumulation steps.
        most (`int`, *optional*):
            How many edits make a step, at most. Defaults to the paper's 100.

    Returns:
        `int`: The size, such that a step has at least 2 edits.
    """
    step = min(most or _PAPER_BATCH, max(-(-num_edits // _LEAST_STEPS), 2))
    return -(-step // parallel)


def automatic_learning_rate(model: PeftModel, factor: float) -> float:
    """Return the rate for a model's active adapter: the paper's where it names the model and the place, else that for
    Llama-3-8B's width, scaled to the edited module's.

    Args:
        model ([`~peft.PeftModel`]):
            The model to be trained.
        factor (`float`):
            The recipe's [`rate_factor`].

    Returns:
        `float`: The paper's, or 5e-4 · 14336 / (the widest input of an edited module), times the factor, for LocFT; else 2e-3.
    """
    config = model.active_peft_config
    if isinstance(config, LocFTConfig) and (
        rate := published_rate(base_of(model).config, config.layers, config.target_modules)
    ):
        return factor * rate
    widths = [
        # Fused experts, (experts, out_features, in_features), have no width of their own.
        getattr(module, "in_features", None) or max(p.shape[-1] for p in module.parameters() if p.requires_grad)
        for module in model.modules()
        if isinstance(module, LocFTLayer) and any(p.requires_grad for p in module.parameters())
    ]
    return factor * _PAPER_RATE * _PAPER_WIDTH / max(widths) if widths else _OTHER_RATE


def focus_share(model: PeftModel, tokenized: Dataset, args: EditConfig) -> float:
    """Return how far all edits are learned at their subjects alone.

    Args:
        model ([`~peft.PeftModel`]):
            The model to be trained.
        tokenized ([`~datasets.Dataset`]):
            The rows of [`tokenize_edits`].
        args ([`EditConfig`]):
            The training arguments.

    Returns:
        `float`: `subject_focus`, times the share of the edits whose subjects were found; 0 where no change can learn so.
    """
    if not focused(trained_deltas(model, "subject_focus"), num_layers(model.config)):
        return 0.0
    return args.subject_focus * sum(map(bool, tokenized["subject"])) / len(tokenized)


def load_eval_edits(source: Any) -> EditSet | dict[str, EditSet] | None:
    """Load one or several sets of edits to evaluate on."""
    if source is None:
        return None
    if isinstance(source, Mapping):
        return {name: load_edits(part) for name, part in source.items()}
    return load_edits(source)


def load_model(
    name: str, args: EditConfig, tokenizer: PreTrainedTokenizerBase | None, peft_config: PeftConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model by name, and its tokenizer unless one is given."""
    kwargs = dict(args.model_init_kwargs or {})
    shared = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(name, **shared)
    if args.offload_prefix:
        return load_with_prefix_offloaded(name, args, peft_config), tokenizer
    return AutoModelForCausalLM.from_pretrained(name, **kwargs), tokenizer


def check_decoder(model: nn.Module) -> None:
    """Refuse a model that does not continue text."""
    config = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or config.is_encoder_decoder:
        raise ValueError(
            f"the model is a {type(model).__name__}, expected a decoder that continues text, such as "
            "`AutoModelForCausalLM` loads: an edit is a prompt and how the model goes on"
        )


def max_length(args: EditConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the longest sequence in tokens: what the user allows, within what tokenizer and model take."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    # A tokenizer that knows no limit states one of 1e30.
    limits = [limit for limit in (args.max_length, context, tokenizer.model_max_length) if limit and limit < 10**9]
    return min(limits) if limits else None
