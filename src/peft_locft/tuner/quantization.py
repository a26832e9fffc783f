"""Quantised base layers, through PEFT's generic route."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import nn


def backend_of(layer: nn.Module, get_apply_tensor_subclass: Callable | None = None) -> QuantizationBackend | None:
    """Return how a layer's weights are quantised.

    Args:
        layer (`torch.nn.Module`):
            The layer.
        get_apply_tensor_subclass (`Callable`, *optional*):
            How torchao is to quantise a weight again after a merge; transformers keeps it with a quantised model.

    Returns:
        [`~peft.utils.quantization_utils.QuantizationBackend`] or `None`: `None` for floating-point weights.
    """
    if _is_plain(layer):
        return None  # without importing every quantisation library that is installed, as PEFT does to find out
    return resolve_quantization_backend(
        layer, get_apply_tensor_subclass=get_apply_tensor_subclass or _cannot_quantize_again
    )


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is one of torch's or of a model's own, with parameters that are no tensor subclasses."""
    own = type(layer).__module__.startswith(("torch.nn.", "transformers.models.", "transformers.pytorch_utils"))
    return own and all(type(parameter.data) is torch.Tensor for parameter in layer.parameters(recurse=False))


def _cannot_quantize_again() -> None:
    raise TypeError(
        "the base model was quantised with torchao by hand, so how to quantise a merged weight again is not known: load "
        "it with `AutoModelForCausalLM.from_pretrained(..., quantization_config=TorchAoConfig(...))`, or leave the "
        "adapter unmerged"
    )
