"""No other layer reads what the last one says, so its MLP is computed only where logits are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from ..tuner import layers_name
from ..tuner.temporary import replaced_forwards


def find_last_mlp(model: PeftModel) -> nn.Module | None:
    """Find the MLP of the last of the layers that are trained on.

    Args:
        model ([`~peft.PeftModel`]):
            The model.

    Returns:
        `torch.nn.Module` or `None`: `None` where the layer has no module called `mlp`, as most architectures do.
    """
    base = model.get_base_model()
    stacks = {layers_name(name) for name, parameter in base.named_parameters() if parameter.requires_grad} - {None}
    return getattr(base.get_submodule(stacks.pop())[-1], "mlp", None) if len(stacks) == 1 else None


@contextmanager
def computed_only_at(mlp: nn.Module, wanted: torch.Tensor) -> Iterator[None]:
    """Within this context, an MLP computes some positions only, and says zero at all others.

    Args:
        mlp (`torch.nn.Module`):
            The MLP. Each position's output has to depend on that position alone.
        wanted (`torch.Tensor`):
            Which positions are computed, a boolean of shape (rows, width).
    """
    own = mlp.forward

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        computed = own(hidden_states[wanted][None])[0]  # (wanted, hidden)
        return hidden_states.new_zeros(hidden_states.shape, dtype=computed.dtype).index_put((wanted,), computed)

    with replaced_forwards({mlp: forward}):
        yield
