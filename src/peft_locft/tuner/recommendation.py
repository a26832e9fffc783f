"""The place that is recommended for a model, from its config alone, and why."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from .targets import default_module
from .weights import num_layers


class Place(NamedTuple):
    """Where to edit.

    Args:
        layer (`int`):
            The decoder layer, counted from 0.
        module (`str`):
            An entry of `target_modules`.
        reason (`str`):
            Why, in words.
    """

    layer: int
    module: str
    reason: str


class _Published(NamedTuple):
    """A model for which the paper names the place, as its config tells it from others."""

    name: str
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int
    layer: int
    module: str
    words: str
    small_vocab_size: int | None = None  # of smaller members of the family, where it is another one
    rate: float | None = None  # where it is told


# LocFT-BF (arXiv 2509.22072), section 4 and the appendix on hyperparameters. The layers are counted from 0.
_PUBLISHED = (
    _Published("Llama-3-8B", "llama", 32, 4096, 128256, 22, "mlp.down_proj", "the MLP's down projection", None, 5e-4),
    _Published("Mistral-7B-v0.1", "mistral", 32, 4096, 32000, 23, "layer", "the entire layer", None, 5e-5),
    _Published("Qwen2.5-7B", "qwen2", 28, 3584, 152064, 6, "mlp.down_proj", "the MLP's down projection", 151936, 5e-4),
    _Published(
        "Qwen1.5-MoE-A2.7B",
        "qwen2_moe",
        24,
        2048,
        151936,
        20,
        "mlp.shared_expert.down_proj",
        "the shared expert's down projection",
    ),
)
# Fine-tuned models often add a few tokens of their own. Fewer than 128, by which Qwen2.5's two vocabularies differ.
_ADDED_TOKENS = 128
# Llama-3-8B's layer 22 is the 23rd of 32: late enough to leave the model's general capability as it was, which the
# paper's search found for the down projections of late layers (section 4.2).
_DEFAULT_DEPTH = 23 / 32
_RULE = (
    "the paper's search found that generalization peaks early (layers 3 to 8 of 32) and late (20 to 25 of 32), and that "
    "the down projections of late layers leave the general capability of a model as it was"
)


def recommended_place(model: nn.Module | PreTrainedConfig) -> Place:
    """Return the paper's place for a model that it names, the proportional layer for a larger member of its family, and
    for others the down projection of a late layer.

    What a model is, is told by its text model's type, layers, hidden size and vocabulary, and by no name.

    Args:
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or [`~transformers.PreTrainedConfig`]):
            The model to be edited, or its config.

    Returns:
        [`Place`]: Layer, module and reason.

    Raises:
        `TypeError`: If `model` is neither a model nor a config.
        `ValueError`: If the config does not tell the number of layers, is of a type that no class of transformers
            is known for, or no down projection is found.
    """
    if not isinstance(model, (nn.Module, PreTrainedConfig)):
        raise TypeError(
            f"`model` is a {type(model).__name__}, expected a model or its config, as "
            "`AutoConfig.from_pretrained(name)` loads it"
        )
    config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    count = num_layers(config)
    if not count:
        of = "" if isinstance(model, PreTrainedConfig) else "the config of "
        raise ValueError(
            f"{of}{type(model).__name__} has no `num_hidden_layers`, so no place is known for it: give "
            "`LocFTConfig(layers=[...], target_modules=[...])`"
        )
    text = config.get_text_config(decoder=True)
    what = f"{text.model_type}, {count} layers, hidden size {getattr(text, 'hidden_size', None)}"
    for published in _PUBLISHED:
        if text.model_type != published.model_type:
            continue
        size = count, text.hidden_size
        named = published.num_hidden_layers, published.hidden_size
        is_smaller = any(mine < its for mine, its in zip(size, named))
        if _has_vocabulary(text, published.vocab_size) and not is_smaller:
            layer = _at_depth((published.layer + 1) / published.num_hidden_layers, count)
            if size == named:
                why = (
                    f"the config has the shape of {published.name} ({what}), for which the paper found layer "
                    f"{published.layer}, {published.words}"
                )
            else:
                why = (
                    f"the config has the shape of a larger member of the family of {published.name} ({what}): the layer at "
                    f"the depth of the paper's layer {published.layer} of {published.num_hidden_layers}, {published.words}"
                )
            return Place(layer, published.module, why)
        if is_smaller and any(_has_vocabulary(text, v) for v in (published.vocab_size, published.small_vocab_size)):
            return _default_place(
                model,
                count,
                f"the config has the shape of a smaller member of the family of {published.name} ({what}), and the paper "
                "measured larger ones only",
            )
    return _default_place(model, count, f"the paper names no place for a model of this type and size ({what})")


def published_rate(
    config: PreTrainedConfig | None, layers: Sequence[int] | None, modules: Collection[str] | str | None
) -> float | None:
    """Return the paper's learning rate for a model and a place that it names.

    Args:
        config ([`~transformers.PreTrainedConfig`], *optional*):
            The model's config.
        layers (`Sequence[int]`, *optional*):
            The layers that are edited, counted from 0.
        modules (`Collection[str]` or `str`, *optional*):
            The modules, as `target_modules` names them.

    Returns:
        `float` or `None`: The rate; `None` for all other models and places.
    """
    count = num_layers(config)
    if not count or layers is None or modules is None:
        return None
    text = config.get_text_config(decoder=True)
    place = list(layers), {modules} if isinstance(modules, str) else set(modules)
    for published in _PUBLISHED:
        shape = published.model_type, published.num_hidden_layers, published.hidden_size
        if (text.model_type, count, getattr(text, "hidden_size", None)) == shape:
            if _has_vocabulary(text, published.vocab_size) and place == ([published.layer], {published.module}):
                return published.rate
    return None


def _default_place(model: nn.Module | PreTrainedConfig, count: int, why: str) -> Place:
    layer = _at_depth(_DEFAULT_DEPTH, count)
    module = default_module(_empty(model) if isinstance(model, PreTrainedConfig) else model, [layer])
    return Place(layer, module, f"{why}: the down projection of a late layer, because {_RULE}")


def _has_vocabulary(config: PreTrainedConfig, size: int | None) -> bool:
    return size is not None and 0 <= config.vocab_size - size < _ADDED_TOKENS


def _at_depth(depth: float, count: int) -> int:
    """Return the layer, counted from 0, that is the last one of a part of all layers."""
    return max(round(depth * count), 1) - 1


def _empty(config: PreTrainedConfig) -> nn.Module:
    """Build a model without weights, for the names of its modules."""
    for mapping, auto in (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    ):
        if type(config) in mapping:
            with torch.device("meta"):
                return auto.from_config(copy.deepcopy(config))  # which fills in fields of the config that it gets
    raise ValueError(
        f"the config is of the type {config.model_type!r}, for which transformers has no model that continues text: load "
        "the model and give it instead, or give `LocFTConfig(layers=[...], target_modules=[...])`"
    )
