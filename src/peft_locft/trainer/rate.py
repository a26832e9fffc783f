"""The learning rate where the user gives none: by the model, the place and the edits."""

from __future__ import annotations

import torch
from datasets import Dataset
from peft import PeftModel

from ..preservation import focused, trained_deltas
from ..tuner import LocFTConfig, LocFTLayer, num_layers
from ..tuner.recommendation import published_rate
from ..tuner.temporary import evaluating
from ..tuner.weights import base_of
from .batches import EditCollator
from .config import EditConfig
from .exactness import Shortcuts
from .loss import edit_losses


# Llama-3-8B's rate and the width of its down projection (LocFT-BF, appendix on hyperparameters).
_PAPER_RATE, _PAPER_WIDTH = 5e-4, 14336
_OTHER_RATE = 2e-3
# By how many nats a weight, on the average, may lower the mean loss in the first step, to first order; and behind projectors.
# SmolLM2-135M, where the rates were found, has up to 2.9 and 1.95; Gemma 3 270M had 27 and 3 by the width alone, and lost ten
# times its perplexity in the paper's procedure (docs/log.md).
_MOST_GAIN, _MOST_GAIN_PROJECTED = 3.0, 2.0
_TRIED = 25


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
    if (rate := _published(model)) is not None:
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


def _published(model: PeftModel) -> float | None:
    config = model.active_peft_config
    if not isinstance(config, LocFTConfig):
        return None
    return published_rate(base_of(model).config, config.layers, config.target_modules)


def limited_learning_rate(
    model: PeftModel,
    tokenized: Dataset,
    args: EditConfig,
    factor: float,
    pad_token_id: int,
    keeps_logits: bool,
    shortcuts: Shortcuts,
) -> float:
    """Return the automatic rate of a LocFT adapter, or less where a first step by it would be too much for the model.

    Adam's first step moves each number of ΔW by the rate, which lowers the loss by the rate times the gradient's L1 norm, to
    first order. Models differ in that by more than their widths tell. It is measured on some edits before training.

    Args:
        model ([`~peft.PeftModel`]):
            The model to be trained, with all terms in force.
        tokenized ([`~datasets.Dataset`]):
            The rows of [`tokenize_edits`], of which the first 25 are asked; where there are fewer, the root of 25 / edits times
            as much is allowed.
        args ([`EditConfig`]):
            The training arguments, with the automatic rate.
        factor (`float`):
            The recipe's [`rate_factor`].
        pad_token_id (`int`):
            What stands in the padding.
        keeps_logits (`bool`):
            Whether the model takes `logits_to_keep`.
        shortcuts ([`Shortcuts`]):
            Those with which its losses are exact.

    Returns:
        `float`: The rate. One that is lowered has two digits, because hardware rounds differently.
    """
    if not isinstance(model.active_peft_config, LocFTConfig) or _published(model) is not None:
        return args.learning_rate
    collator = EditCollator(pad_token_id, shortcuts.packed, shortcuts.cache)
    count = min(len(tokenized), _TRIED)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums: list[torch.Tensor | float] = [0.0] * len(trained)
    with evaluating(model), torch.enable_grad():
        for begin in range(0, count, args.per_device_train_batch_size):
            rows = [tokenized[row] for row in range(begin, min(begin + args.per_device_train_batch_size, count))]
            batch = {name: value.to(model.device) for name, value in collator(rows).items()}
            with shortcuts.taken(batch):
                loss = edit_losses(model, batch, keeps_logits).per_edit.sum() / count
            found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
            sums = [some + more for some, more in zip(sums, found)]
    gain = sum(gradient.abs().sum(dtype=torch.float32).item() for gradient in sums) / len(sums)
    # Edits that ask for unlike things have gradients that average out as the root of their number: fewer have a larger mean.
    most = (_MOST_GAIN_PROJECTED if args.projector else _MOST_GAIN) * (_TRIED / count) ** 0.5
    if gain * args.learning_rate <= factor * most:
        return args.learning_rate
    return float(f"{factor * most / gain:.2g}")
