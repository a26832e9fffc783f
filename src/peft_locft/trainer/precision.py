"""Frozen weights in 16 bits while an adapter is trained in 32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from .config import EditConfig


def frozen_dtype(args: EditConfig, model: nn.Module) -> torch.dtype | None:
    """Return what the frozen weights are to be held in during training.

    Args:
        args ([`EditConfig`]):
            The training arguments.
        model (`torch.nn.Module`):
            The model.

    Returns:
        `torch.dtype` or `None`: `None` if they stay as they are.
    """
    if args.frozen_dtype == "auto":
        return torch.bfloat16 if multiplies_bfloat16(args.device) else None
    return getattr(torch, args.frozen_dtype) if args.frozen_dtype is not None else None


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether products of bfloat16 matrices are faster than those of float32.

    Args:
        device (`torch.device`):
            The device.
    """
    if device.type == "cpu":
        # Other processors compute in 16 bits too, but convert to 32 and back, which is slower than 32 bits.
        return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def frozen_weights_in(
    dtype: torch.dtype, model: nn.Module, unused: Sequence[nn.Module] = ()
) -> AbstractContextManager[None]:
    """Within this context, frozen float32 weights are rounded to a dtype. Afterwards they are what they were.

    Args:
        dtype (`torch.dtype`):
            The dtype.
        model (`torch.nn.Module`):
            The model.
        unused (`Sequence[torch.nn.Module]`, *optional*):
            Parts of it that will not be run, which stay as they are.
    """
    skipped = {id(parameter) for module in unused for parameter in module.parameters()}
    frozen = [
        parameter
        for parameter in model.parameters()
        if parameter.dtype == torch.float32 and not parameter.requires_grad and id(parameter) not in skipped
    ]
    return rounded(frozen, dtype)


@contextmanager
def rounded(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """Within this context, parameters are rounded to a dtype. Afterwards they are what they were.

    Args:
        parameters (`Sequence[torch.nn.Parameter]`):
            The parameters.
        dtype (`torch.dtype`):
            The dtype.
    """
    originals = {parameter: parameter.data for parameter in parameters}
    try:
        for parameter, data in originals.items():
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in originals.items():
            parameter.data = data
