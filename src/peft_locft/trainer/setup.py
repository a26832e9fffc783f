"""What a run is made of when the user does not say: model, tokenizer, batch size; and what cannot be edited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..edits import EditSet, load_edits
from ..tuner.weights import context_length
from .config import EditConfig
from .offload import load_with_prefix_offloaded


_PAPER_BATCH = 100  # LocFT-BF, appendix on hyperparameters
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
    context = context_length(model.config)
    # A tokenizer that knows no limit states one of 1e30.
    limits = [limit for limit in (args.max_length, context, tokenizer.model_max_length) if limit and limit < 10**9]
    return min(limits) if limits else None
