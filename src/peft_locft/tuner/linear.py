"""The delta on a linear layer, dense or compressed."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D

from .additive import AdditiveLayer
from .config import LocFTConfig


class LocFTLinear(AdditiveLayer):
    """LocFT on a `torch.nn.Linear`, a transformers `Conv1D`, or a quantised one of these: `y = base(x) + ΔW x`.

    Args:
        base_layer (`torch.nn.Module`):
            The layer to edit.
        adapter_name (`str`):
            The name of the first adapter.
        config ([`LocFTConfig`]):
            Its configuration.
        rank (`int`, *optional*):
            The rank of a compressed delta, `ΔW = B A`.
    """

    adapter_layer_names = ("locft_delta", "locft_A", "locft_B")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LocFTConfig,
        rank: int | None = None,
        get_apply_tensor_subclass: Any = None,
    ) -> None:
        super().__init__(base_layer, get_apply_tensor_subclass)
        self.locft_A = nn.ModuleDict({})
        self.locft_B = nn.ModuleDict({})
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, inference_mode=config.inference_mode, rank=rank)

    def _add_delta(self, adapter_name: str, zero: bool, rank: int | None = None) -> None:
        if rank is None:
            last = self.locft_delta[adapter_name] = nn.Linear(self.in_features, self.out_features, bias=False)
        else:
            full = min(self.in_features, self.out_features)
            if rank > full:  # of a faulty or hostile config: the factors could take all of the memory
                raise ValueError(
                    f"`rank_pattern` has the rank {str(rank)[:50]} for a weight of {self.out_features} x "
                    f"{self.in_features}, expected at most {full}: mend the adapter's config"
                )
            self.locft_A[adapter_name] = nn.Linear(self.in_features, rank, bias=False)
            last = self.locft_B[adapter_name] = nn.Linear(rank, self.out_features, bias=False)
        if zero:
            nn.init.zeros_(last.weight)

    def edited(self, adapter_name: str) -> tuple[str, ...]:
        return ("weight",) if adapter_name in self.locft_delta or adapter_name in self.locft_A else ()

    def get_delta_weight(self, adapter: str, parameter: str = "weight") -> torch.Tensor:
        """Return the delta in the orientation of the base layer's own weight.

        Args:
            adapter (`str`):
                The name of the adapter.
            parameter (`str`, *optional*, defaults to `"weight"`):
                The base layer's parameter.

        Returns:
            `torch.Tensor`: Of shape (out_features, in_features), or (in_features, out_features) for a `Conv1D`. Zero
            where the layer does not have the adapter, so that PEFT can convert adapters on different layers.
        """
        if adapter in self.locft_delta:
            weight = self.locft_delta[adapter].weight
        elif adapter in self.locft_A:
            weight = self.locft_B[adapter].weight @ self.locft_A[adapter].weight
        else:
            weight = torch.zeros(self.out_features, self.in_features, device=self.weight.device)
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def set_delta_weight(self, adapter: str, delta: torch.Tensor, parameter: str = "weight") -> None:
        super().set_delta_weight(adapter, delta.T if isinstance(self.get_base_layer(), Conv1D) else delta)

    def contribution(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Return `ΔW x`.

        Args:
            adapter (`str`):
                The name of the adapter.
            x (`torch.Tensor`):
                Of shape (..., in_features).

        Returns:
            `torch.Tensor`: Of shape (..., out_features), in the delta's dtype.
        """
        if adapter in self.locft_delta:
            delta = self.locft_delta[adapter]
            return delta(self._cast_input_dtype(x, delta.weight.dtype))
        down = self.locft_A[adapter]
        return self.locft_B[adapter](down(self._cast_input_dtype(x, down.weight.dtype)))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True
