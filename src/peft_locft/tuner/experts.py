"""Deltas on the fused weights of a mixture of experts: 3-D parameters that stack one matrix for each expert."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .config import LocFTConfig
from .layer import LocFTLayer


class ExpertsDelta(nn.Module):
    """The deltas of some of the experts of one parameter.

    Args:
        shape (`tuple[int, int, int]`):
            The number of experts that are edited, and the shape of one expert's matrix.
        zero (`bool`):
            Whether to start at zero.
    """

    def __init__(self, shape: tuple[int, int, int], zero: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape) if zero else torch.randn(shape) / shape[-1] ** 0.5)


class LocFTExperts(LocFTLayer):
    """LocFT on a module of fused experts: each forward pass computes with `W + ΔW` in the place of `W`.

    How an architecture uses its experts is its own affair, so there is no sum of outputs as in a linear layer: in a
    model of a lower precision the sum of the weights is rounded to it, as a merge would.

    Args:
        base_layer (`torch.nn.Module`):
            The module that holds the fused parameters.
        adapter_name (`str`):
            The name of the first adapter.
        config ([`LocFTConfig`]):
            Its configuration.
        experts (`dict[str, tuple[int, ...]]`):
            The experts to edit, by parameter.
    """

    adapter_layer_names = ()  # `locft_` and the parameter's name, for each one that is edited
    other_param_names = ("locft_experts",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LocFTConfig, experts: dict[str, tuple[int, ...]]
    ) -> None:
        super().__init__(base_layer)
        del self.locft_delta
        self.locft_experts: dict[str, dict[str, tuple[int, ...]]] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, inference_mode=config.inference_mode, experts=experts)

    def _add_delta(self, adapter_name: str, zero: bool, experts: dict[str, tuple[int, ...]]) -> None:
        for parameter, chosen in experts.items():
            name = f"locft_{parameter}"
            if not hasattr(self, name):
                setattr(self, name, nn.ModuleDict({}))
                self.adapter_layer_names = (*self.adapter_layer_names, name)
            weight = getattr(self.get_base_layer(), parameter)
            getattr(self, name)[adapter_name] = ExpertsDelta((len(chosen), *weight.shape[1:]), zero)
            if weight.dtype in (torch.bfloat16, torch.float16):
                warnings.warn(
                    f"the fused experts {parameter} compute with one tensor in {weight.dtype}, to which the sum of base "
                    "weight and delta is rounded, as by a merge: load the base model in float32 to avoid it",
                    stacklevel=2,
                )
        self.locft_experts[adapter_name] = dict(experts)

    def edited(self, adapter_name: str) -> tuple[str, ...]:
        return tuple(self.locft_experts.get(adapter_name, ()))

    def get_delta_weight(self, adapter: str, parameter: str = "weight") -> torch.Tensor:
        weight = getattr(self.get_base_layer(), parameter)
        delta = torch.zeros_like(weight, dtype=torch.float32)  # (experts, ...)
        if parameter in self.edited(adapter):
            chosen = torch.tensor(self.locft_experts[adapter][parameter], device=weight.device)
            delta[chosen] = getattr(self, f"locft_{parameter}")[adapter].weight.to(delta)
        return delta

    def expert_delta(self, adapter: str, parameter: str, expert: int) -> torch.Tensor | None:
        """Return the delta of a single expert.

        Args:
            adapter (`str`):
                The name of the adapter.
            parameter (`str`):
                The base layer's parameter.
            expert (`int`):
                The expert's index.

        Returns:
            `torch.Tensor` or `None`: A view, in the orientation of the base layer's own weight; `None` where the
            adapter does not edit the expert.
        """
        chosen = self.locft_experts.get(adapter, {}).get(parameter, ())
        if expert not in chosen:
            return None
        return getattr(self, f"locft_{parameter}")[adapter].weight.data[chosen.index(expert)]

    def base_weight_of(self, adapter_name: str, parameter: str) -> torch.Tensor | None:
        weight = super().base_weight_of(adapter_name, parameter)
        return None if weight is None else weight[list(self.locft_experts[adapter_name][parameter])]

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is not None:
            if not any(self.edited(name) for name in adapter_names):
                return self.base_layer(*args, **kwargs)
            raise ValueError(
                "`adapter_names` was given, and an adapter edits fused experts, which cannot serve several adapters in "
                "one batch: run one batch for each adapter"
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if self.edited(name)]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)
        weights = {
            parameter: self._with_deltas(parameter, active)
            for parameter in dict.fromkeys(p for name in active for p in self.edited(name))
        }
        return functional_call(self.base_layer, weights, args, kwargs)

    def _with_deltas(self, parameter: str, adapters: list[str]) -> torch.Tensor:
        weight = getattr(self.get_base_layer(), parameter)  # (experts, ...)
        for adapter in adapters:
            if parameter in self.edited(adapter):
                delta = getattr(self, f"locft_{parameter}")[adapter].weight  # (edited experts, ...)
                chosen = torch.tensor(self.locft_experts[adapter][parameter], device=weight.device)
                weight = weight.index_copy(0, chosen, (weight[chosen] + delta).to(weight.dtype))
        return weight
