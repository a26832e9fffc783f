"""What a base weight and a tokenizer look like, so that an adapter notices when it is loaded on another base."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

import torch
from torch import nn

from .config import LocFTConfig
from .layer import LocFTLayer
from .messages import shown


_SKETCH_SIZE = 8
# How far two sketches of one weight may be apart, relative to their length. Rounding to 16 bits moves a weight by less
# than 1%, 8 bits by about 1%, 4 bits by about 10%; unrelated weights are about 140% apart.
_TOLERANCE = {"rounded": 0.02, "quantized": 0.3}
# Each of these holds every bfloat16 number, so weights of one checkpoint agree once they are rounded to it.
_EXACT = {"bfloat16", "float32", "float64"}
_PROBES = (
    "The capital of France is Paris.",
    " 1234567890 + x_1 == 'naïve café';\n\tdef f(x):",
    "法国的首都是巴黎。 Столица Франции 🇫🇷",
)


class BaseMismatchWarning(UserWarning):
    """An adapter was put on another base model than it was trained on."""


def check_base(config: LocFTConfig, model: nn.Module, layers: dict[str, LocFTLayer], adapter_name: str) -> None:
    """Compare the base weights under an adapter with those it was trained on; remember them if it is new.

    Args:
        config ([`LocFTConfig`]):
            The adapter's config; its `base_fingerprint` is filled in if it has none.
        model (`torch.nn.Module`):
            The base model.
        layers (`dict[str, LocFTLayer]`):
            The layers that have the adapter, by name.
        adapter_name (`str`):
            The adapter's name.

    Raises:
        `ValueError`: If a weight differs and the config is `strict`.
    """
    now = {}
    for name, layer in layers.items():
        for parameter in layer.edited(adapter_name):
            weight = layer.base_weight_of(adapter_name, parameter)
            if weight is not None:
                now[f"{name}.{parameter}"] = _weight_fingerprint(weight, layer.stored_as(parameter))
    if config.base_fingerprint is None:
        if config.is_new:  # what an adapter that is loaded was trained on, nobody knows any more
            config.fill_fingerprint(now or None)
        return
    before = config.base_fingerprint if isinstance(config.base_fingerprint, dict) else {}
    differing = [name for name, print_ in now.items() if not _same(print_, before.get(name))]
    if not differing:
        return
    loaded = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    trained = str(config.base_model_name_or_path or "a model without a name")[:200]
    message = (
        f"the adapter {adapter_name!r} was trained on {trained}, and the base model loaded here, {loaded}, has other "
        f"weights in {shown(differing, 3)}: its answers are not to be relied on. Load the base model that it was trained on"
    )
    if config.strict:
        raise ValueError(f"{message}, or set `strict=False`")
    warnings.warn(message, BaseMismatchWarning, stacklevel=2)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of how a tokenizer reads text: its vocabulary, and its reading of some sentences.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    readings = [tokenizer(text)["input_ids"] for text in _PROBES]
    content = [sorted(tokenizer.get_vocab().items()), readings]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def check_tokenizer(config: LocFTConfig, tokenizer: Any, remember: bool = False) -> None:
    """Compare a tokenizer with the one that an adapter was trained with.

    Args:
        config ([`LocFTConfig`]):
            The adapter's config.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        remember (`bool`, *optional*, defaults to `False`):
            Whether to fill in the config's `tokenizer_fingerprint` if it has none.

    Raises:
        `ValueError`: If it reads text in another way and the config is `strict`.
    """
    now = tokenizer_fingerprint(tokenizer)
    if config.tokenizer_fingerprint is None and remember and config.is_new:
        config.tokenizer_fingerprint = now
    if config.tokenizer_fingerprint in (None, now):
        return
    message = (
        f"the adapter was trained with the tokenizer of {str(config.base_model_name_or_path)[:200]}, and the tokenizer loaded here, "
        f"{tokenizer.name_or_path}, reads text in another way: use the one that it was trained with"
    )
    if config.strict:
        raise ValueError(f"{message}, or set `strict=False`")
    warnings.warn(message, BaseMismatchWarning, stacklevel=2)


def _weight_fingerprint(weight: torch.Tensor, stored_as: str) -> dict[str, Any]:
    # (a hash for the same numbers, a sketch for the same numbers up to rounding or quantisation)
    flat = weight.detach().to("cpu").flatten()
    sketch = [flat[start::_SKETCH_SIZE].sum(dtype=torch.float32).item() for start in range(_SKETCH_SIZE)]
    numbers = flat if stored_as == "float16" else flat.to(torch.bfloat16)
    digest = hashlib.sha256(numbers.contiguous().view(torch.uint8).numpy()).hexdigest()[:32]
    return {
        "shape": list(weight.shape),
        "stored_as": stored_as,
        "sha256": digest,
        "sketch": [float(f"{value:.6g}") for value in sketch],
    }


def _same(now: dict[str, Any], before: Any) -> bool:
    try:
        if now["shape"] != before["shape"]:
            return False
        kinds = {now["stored_as"], before["stored_as"]}
        if kinds <= _EXACT or kinds == {"float16"}:
            return now["sha256"] == before["sha256"]
        mine, theirs = torch.tensor(now["sketch"]), torch.tensor(before["sketch"])
        if mine.shape != theirs.shape:
            return False
        tolerance = _TOLERANCE["rounded" if kinds <= {*_EXACT, "float16"} else "quantized"]
        return bool(torch.linalg.vector_norm(mine - theirs) <= tolerance * torch.linalg.vector_norm(theirs))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
        return False  # a fingerprint that cannot be read, as in a config that somebody wrote by hand
