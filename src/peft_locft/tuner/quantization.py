"""Quantised base layers, through PEFT's generic route."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

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


def readable_weight(backend: QuantizationBackend, layer: nn.Module) -> torch.Tensor:
    """Return the weight of a quantised layer as floating-point numbers.

    Args:
        backend ([`~peft.utils.quantization_utils.QuantizationBackend`]):
            How the layer is quantised.
        layer (`torch.nn.Module`):
            The layer.

    Returns:
        `torch.Tensor`: Of shape (out_features, in_features).
    """
    if not _is_reordered(layer):
        return backend.get_base_weight(layer)
    # On a CPU with AVX512-BF16, the first forward pass of bitsandbytes puts the numbers into another order, which its
    # dequantisation, and so PEFT, would read as other numbers.
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*_in_order(layer))


def keep_in_order(model: nn.Module) -> None:
    """Let gradients pass the layers that bitsandbytes has quantised to 4 bits. In the other order of [`readable_weight`], into
    which they come where they are not in training mode, it computes outputs and no gradients.

    Args:
        model (`torch.nn.Module`):
            The model, changed in place.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            if _is_reordered(layer):
                layer.weight.data, layer.weight.quant_state = _in_order(layer)


def _in_order(layer: nn.Module) -> tuple[torch.Tensor, Any]:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(layer.weight.quant_state)
    state.original_nested = False  # the scales are not quantised any more
    state.absmax = state.absmax.T.reshape(-1).to(torch.float32)  # which its own way back leaves where they are
    return _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)


def check_quantizes_again(backend: QuantizationBackend) -> None:
    """Make sure that a layer can be quantised again after a merge, before anything of it is changed.

    Args:
        backend ([`~peft.utils.quantization_utils.QuantizationBackend`]):
            How the layer is quantised.

    Raises:
        `TypeError`: If it was quantised with torchao by hand.
    """
    if getattr(backend, "get_apply_tensor_subclass", None) is _cannot_quantize_again:
        _cannot_quantize_again()


def stored_as(backend: QuantizationBackend, layer: nn.Module) -> str:
    """Return a name for how a quantised layer is stored: of the same name, the same weights are the same numbers.

    Args:
        backend ([`~peft.utils.quantization_utils.QuantizationBackend`]):
            How the layer is quantised.
        layer (`torch.nn.Module`):
            The layer.

    Returns:
        `str`: For example `"bnb 4bit"`.
    """
    # With the order, bitsandbytes also rounds the scales to bfloat16.
    return f"{backend.backend_name} in CPU order" if _is_reordered(layer) else backend.backend_name


def _is_reordered(layer: nn.Module) -> bool:
    return getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False)


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
