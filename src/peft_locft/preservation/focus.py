"""A focus on subjects: what is said about one is learned at its own tokens, and not at those that others' prompts share.

In "The mother tongue of Danielle Darrieux is", all but the name stands in the prompts about everybody else. What a weight
learns from these other tokens, it says about everybody. ROME (arXiv 2202.05262, sections 2 and 3) finds the recall of a fact
at its subject's tokens, in the MLPs of early and middle layers, and writes it there: its key is the subject's. Here, the
change acts on all tokens as always, and only its gradient is taken from some.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from ..tuner import layer_index
from ..tuner.temporary import replaced_forwards
from .deltas import Delta


def focused(deltas: Sequence[Delta], num_layers: int | None) -> list[Delta]:
    """Return the changes that can learn from subjects alone: not those in the last layer or behind it, above which nothing
    carries what they say at a subject to where the answer is said.

    Args:
        deltas (`Sequence[Delta]`):
            What is trained.
        num_layers (`int`, *optional*):
            How many layers the model has, if that is known.

    Returns:
        `list[Delta]`: Some of them.
    """
    if num_layers is None:
        return list(deltas)
    indices = [(delta, layer_index(delta.name)) for delta in deltas]
    return [delta for delta, index in indices if index is not None and index < num_layers - 1]


class Focus:
    """How much of each token's gradient the deltas learn from.

    Args:
        deltas (`Sequence[Delta]`):
            What is trained so, of [`focused`].

    Attributes:
        shares (`torch.Tensor` of shape `(rows, width)`, *optional*):
            Those of the tokens of the batch that is trained; `None` for all of every gradient.
    """

    def __init__(self, deltas: Sequence[Delta]):
        self._modules = {part: None for delta in deltas for part in (delta.entrance(), delta.factor())}
        self.shares: torch.Tensor | None = None

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Compute `F.linear(x, weight)`, to the bit, through which each token's gradient flows to `x` in full and to the
        weight by the token's share.

        Args:
            x (`torch.Tensor`):
                Of shape (rows, width, in_features), or with both flattened.
            weight (`torch.Tensor`):
                Of shape (out_features, in_features).

        Returns:
            `torch.Tensor`: Of shape (..., out_features).

        Raises:
            `ValueError`: If the module sees other tokens than those of the batch.
        """
        if self.shares is None or not torch.is_grad_enabled():
            return F.linear(x, weight)
        if x.shape[:-1].numel() != self.shares.numel():
            raise ValueError(
                f"`subject_focus` is on, and a trained module sees {tuple(x.shape[:-1])} tokens of a batch of "
                f"{tuple(self.shares.shape)}, expected all of them: train another module, or give `subject_focus=0`"
            )
        shares = self.shares.reshape(*x.shape[:-1], 1).to(x)
        learned = F.linear(x.detach() * shares, weight)
        return F.linear(x, weight.detach()) + (learned - learned.detach())

    def linear_of(self, delta: Delta) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return what computes the output of a change from its inputs and its weight.

        Args:
            delta ([`Delta`]):
                The change, whether it is trained so or not.

        Returns:
            `Callable`: [`~Focus.linear`], or `F.linear`.
        """
        return self.linear if delta.entrance() in self._modules else F.linear

    @contextmanager
    def applied(self, others: Collection[nn.Module]) -> Iterator[None]:
        """Within this context, the adapter's modules compute so.

        Args:
            others (`Collection[torch.nn.Module]`):
                Those that do already, behind a projector.
        """
        modules = [module for module in self._modules if module not in others]
        try:
            with replaced_forwards({module: partial(self._forward, module) for module in modules}):
                yield
        finally:
            self.shares = None

    def _forward(self, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x, module.weight)
