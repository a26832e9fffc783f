"""Layers whose delta adds to the base layer's output, and batches in which each row has its own adapter."""

from __future__ import annotations

from typing import Any

import torch

from .layer import LocFTLayer


BASE = "__base__"  # PEFT's name for a row without an adapter


class AdditiveLayer(LocFTLayer):
    """A layer that computes `base(x)` and the contributions of the active adapters."""

    def contribution(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Return what an adapter adds to the output.

        Args:
            adapter (`str`):
                The name of the adapter.
            x (`torch.Tensor`):
                The layer's input.

        Returns:
            `torch.Tensor`: Of the shape of the output, in the delta's dtype.
        """
        raise NotImplementedError

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if adapter_names is not None and self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)  # (batch, ..., features)
        if self.disable_adapters or self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is not None:
            return self._add_by_row(x, result, adapter_names)
        dtype = result.dtype
        for adapter in self.active_adapters:
            if self.edited(adapter):
                result = result + self.contribution(adapter, x)
        # The delta keeps its own, finer dtype, and so does the sum: only the result is rounded to the model's.
        return result.to(dtype)

    def _add_by_row(self, x: torch.Tensor, result: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        times, rest = divmod(len(x), len(adapter_names))
        if rest:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        # One after the other, beam search repeats the rows of a batch, and models that flatten them put its tokens.
        names = [name for name in adapter_names for _ in range(times)]
        result = result.clone()
        for adapter in dict.fromkeys(adapter_names):
            if adapter != BASE and self.edited(adapter):
                rows = [row for row, name in enumerate(names) if name == adapter]
                result[rows] = (result[rows] + self.contribution(adapter, x[rows])).to(result.dtype)
        return result
