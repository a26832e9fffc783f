"""What merging costs: how much of a delta survives being rounded to the base weights' dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import nn

from .layer import LocFTLayer


@dataclass(frozen=True)
class MergeCost:
    """What rounding does to the delta of one base weight.

    Args:
        kept (`float`):
            The share of the delta's energy that survives, `1 - ‖ΔW' - ΔW‖² / ‖ΔW‖²`, where `ΔW'` is the difference that
            the merge makes: 1 without loss, and below 0 where rounding adds more than the delta itself.
        unchanged (`float`):
            The share of the delta's nonzero values that leave their weight as it was.
    """

    kept: float
    unchanged: float


@torch.no_grad()
def merge_report(
    model: nn.Module, adapter_names: list[str] | None = None, dtype: torch.dtype | None = None
) -> dict[str, MergeCost]:
    """Tell what merging adapters would cost. The model is left as it is.

    A base weight of 16 bits has a relative precision of 1/256 (bfloat16) or 1/2048 (float16); what a delta adds below
    that is lost in the rounding. In float32 nothing that matters is.

    Args:
        model ([`~peft.PeftModel`]):
            The model, with adapters that are not merged.
        adapter_names (`list[str]`, *optional*):
            The adapters. Defaults to the active ones.
        dtype (`torch.dtype`, *optional*):
            The dtype that the merged weights will be stored in, where it is another one than that of the base weights.
            To have it rounded only once, merge in float32: `model.float().merge_and_unload().to(dtype)`. Quantised
            weights are quantised again as they were.

    Returns:
        `dict[str, MergeCost]`: By the base weight's name.

    Raises:
        `ValueError`: If an adapter is merged already, or none is there to merge.
        `TypeError`: If a base layer is quantised in a form that cannot be merged into.
    """
    costs = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LocFTLayer):
            continue
        if layer.merged:
            raise ValueError(f"adapters {layer.merged_adapters} are merged already: call `unmerge_adapter` first")
        names = [adapter for adapter in adapter_names or layer.active_adapters if layer.edited(adapter)]
        for parameter in dict.fromkeys(p for adapter in names for p in layer.edited(adapter)):
            with onload_layer(layer):
                wanted = sum(layer.get_delta_weight(adapter, parameter).to(torch.float32) for adapter in names)
                difference = _difference(layer, names, parameter, dtype)
            costs[f"{name.removeprefix('base_model.model.')}.{parameter}"] = _cost(wanted, difference)
    if not costs:
        raise ValueError(
            "there is nothing to merge: no layer has "
            + (f"any of the adapters {adapter_names}" if adapter_names else "an active adapter")
        )
    return costs


def _difference(layer: LocFTLayer, names: list[str], parameter: str, dtype: torch.dtype | None) -> torch.Tensor:
    if layer.quantization_backend is None:
        original = getattr(layer.get_base_layer(), parameter).detach()
        dtype = dtype or original.dtype
        exact = layer.merged_weights(names)[parameter] if dtype == original.dtype else _sum(layer, names, parameter)
        return exact.to(dtype).to(torch.float32) - original.to(dtype).to(torch.float32)
    original = layer.get_base_weight().to(torch.float32).clone()
    layer.merge(adapter_names=names)
    try:
        return layer.get_base_weight().to(torch.float32) - original
    finally:
        layer.unmerge()


def _sum(layer: LocFTLayer, names: list[str], parameter: str) -> torch.Tensor:
    original = getattr(layer.get_base_layer(), parameter).detach()
    return original.to(torch.float32) + sum(
        layer.get_delta_weight(name, parameter).to(torch.float32) for name in names
    )


def _cost(wanted: torch.Tensor, got: torch.Tensor) -> MergeCost:
    total = wanted.square().sum().item()
    if total == 0:
        return MergeCost(kept=1.0, unchanged=0.0)
    lost = (got - wanted).square().sum().item()
    nonzero = wanted != 0
    return MergeCost(kept=1 - lost / total, unchanged=((got == 0) & nonzero).sum().item() / nonzero.sum().item())
