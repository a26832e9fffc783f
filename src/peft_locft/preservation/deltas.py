"""What an adapter adds to the weights of the base model, whichever PEFT method holds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..tuner import LocFTLinear


@dataclass
class Delta:
    """The change of one weight.

    Args:
        name (`str`):
            The name of the module in the base model.
        layer ([`~peft.tuners.tuners_utils.BaseTunerLayer`]):
            The layer that holds the change.
        adapter (`str`):
            The adapter.
        projector (`torch.Tensor`, *optional*):
            What the module's inputs are multiplied by first, of shape (in_features, in_features).
        output_projector (`torch.Tensor`, *optional*):
            What is multiplied by what comes out, last, of shape (out_features, out_features).
    """

    name: str
    layer: BaseTunerLayer
    adapter: str
    projector: torch.Tensor | None = None
    output_projector: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """Return ΔW, through which gradients flow to the adapter (`torch.Tensor` of shape (out_features, in_features))."""
        if isinstance(self.layer, LoraLinear):
            down = self.layer.lora_A[self.adapter].weight
            weight = self.layer.scaling[self.adapter] * (self.layer.lora_B[self.adapter].weight @ down)
        else:
            weight = self._dense().weight
        if self.projector is not None:
            weight = weight @ self.projector
        return weight if self.output_projector is None else self.output_projector @ weight

    @cached_property
    def base_norm(self) -> torch.Tensor:
        """‖W‖, the Frobenius norm of the base model's weight, dequantised if it is (`torch.Tensor`, a scalar)."""
        return self.base_weight().norm()

    def base_weight(self) -> torch.Tensor:
        """Return W, the base model's weight, dequantised if it is (`torch.Tensor` of shape (out_features, in_features))."""
        layer = self.layer
        base = layer.get_base_layer()
        weight = layer.get_base_weight() if layer.quantization_backend is not None else base.weight
        return (weight.T if isinstance(base, Conv1D) else weight).detach().float()

    def factor(self) -> nn.Linear:
        """Return the part that ΔW is linear in and that is multiplied last (`torch.nn.Linear`)."""
        return self.layer.lora_B[self.adapter] if isinstance(self.layer, LoraLinear) else self._dense()

    def entrance(self) -> nn.Linear:
        """Return the part that the module's inputs enter first (`torch.nn.Linear`)."""
        return self.layer.lora_A[self.adapter] if isinstance(self.layer, LoraLinear) else self._dense()

    def _dense(self) -> nn.Linear:
        return self.layer.locft_delta[self.adapter]


def trained_deltas(model: PeftModel, term: str) -> list[Delta]:
    """Return the changes that are trained.

    Args:
        model ([`~peft.PeftModel`]):
            The model.
        term (`str`):
            The field of [`EditConfig`] that asks for them, for the message.

    Returns:
        `list[Delta]`: One for each weight.

    Raises:
        `ValueError`: If something is trained that is neither LocFT nor LoRA on a linear layer.
    """
    deltas = list(_find(model))
    covered = {id(part) for delta in deltas for part in (delta.entrance().weight, delta.factor().weight)}
    base = model.get_base_model()
    others = [name for name, value in base.named_parameters() if value.requires_grad and id(value) not in covered]
    if others:
        raise ValueError(
            f"`{term}` is on and {others[0]} is trained, expected only linear layers with LocFT or plain LoRA, whose "
            f"change of the weight is known: turn `{term}` off or leave that module out"
        )
    return deltas


def _find(model: PeftModel) -> Iterator[Delta]:
    for name, layer in model.get_base_model().named_modules():
        for adapter in layer.active_adapters if isinstance(layer, BaseTunerLayer) else ():
            if isinstance(layer, LocFTLinear):
                is_known = adapter in layer.locft_delta
            else:
                is_known = (
                    isinstance(layer, LoraLinear) and adapter in layer.lora_A and adapter not in layer.lora_variant
                )
            if is_known and (delta := Delta(name, layer, adapter)).factor().weight.requires_grad:
                yield delta
