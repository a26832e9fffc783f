"""The delta on an embedding."""

from __future__ import annotations

import torch
from torch import nn

from .additive import AdditiveLayer
from .config import LocFTConfig


class LocFTEmbedding(AdditiveLayer):
    """LocFT on a `torch.nn.Embedding`: the row of each token gets a delta, scaled as the model scales its embeddings.

    Where the embedding is tied to the head, the adapter edits the embedding alone, and merging unties the two.

    Args:
        base_layer (`torch.nn.Embedding`):
            The embedding to edit.
        adapter_name (`str`):
            The name of the first adapter.
        config ([`LocFTConfig`]):
            Its configuration.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LocFTConfig) -> None:
        super().__init__(base_layer)
        base = self.get_base_layer()
        self.in_features, self.out_features = base.num_embeddings, base.embedding_dim
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, inference_mode=config.inference_mode)

    def _add_delta(self, adapter_name: str, zero: bool) -> None:
        base = self.get_base_layer()
        delta = nn.Embedding(base.num_embeddings, base.embedding_dim, padding_idx=base.padding_idx)
        if zero:
            nn.init.zeros_(delta.weight)
        self.locft_delta[adapter_name] = delta

    def get_delta_weight(self, adapter: str, parameter: str = "weight") -> torch.Tensor:
        if adapter in self.locft_delta:
            return self.locft_delta[adapter].weight  # (num_embeddings, embedding_dim)
        return torch.zeros_like(self.weight, dtype=torch.float32)

    def contribution(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of the delta, scaled.

        Args:
            adapter (`str`):
                The name of the adapter.
            x (`torch.Tensor`):
                The tokens, of shape (...).

        Returns:
            `torch.Tensor`: Of shape (..., embedding_dim), in the delta's dtype.
        """
        rows = self.locft_delta[adapter](x)
        scale = self._get_embed_scale()  # Gemma multiplies its embeddings by the root of their width
        # Rounded to the base weight's dtype as in the model itself, so that merging changes nothing.
        return rows if scale is None else rows * scale.to(self.weight.dtype).to(rows.dtype)
