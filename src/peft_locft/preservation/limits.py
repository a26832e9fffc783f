"""Limits on the change itself: how large it may be in all, and in any one number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import TrainerCallback

from .deltas import Delta


def squared_norm(deltas: Sequence[Delta]) -> torch.Tensor:
    """Return the mean over weights of ‖ΔW‖² / ‖W‖², an L2 term that has the same meaning in every model.

    Args:
        deltas (`Sequence[Delta]`):
            What is trained.

    Returns:
        `torch.Tensor`: A scalar, through which gradients flow.
    """
    return torch.stack([delta.weight().float().square().sum() / delta.base_norm**2 for delta in deltas]).mean()


def check_norms(deltas: Sequence[Delta]) -> None:
    """Refuse weights that a change has no size relative to.

    Args:
        deltas (`Sequence[Delta]`):
            What is trained.

    Raises:
        `ValueError`: If a weight is all zero.
    """
    for delta in deltas:
        if not delta.base_norm:
            raise ValueError(
                f"the weight of {delta.name} is all zero, expected one that a change can be measured against: turn `l2_weight` and "
                "`max_growth` off, or leave that module out"
            )


class LimitCallback(TrainerCallback):
    """Put deltas back within their limits after every step.

    Args:
        deltas (`Sequence[Delta]`):
            What is trained.
        largest (`float`):
            The largest absolute value that a number of ΔW may have, as in ROME's constrained fine-tuning, FT+L (arXiv
            2202.05262, section 3.4); 0 for any. A dense delta is clamped; one that is a product is scaled down.
        growth (`float`):
            The largest ‖ΔW‖ / ‖W‖ (Frobenius), the growth that ENCORE (arXiv 2502.01636) found to break sequential
            editing; 0 for any.
    """

    def __init__(self, deltas: Sequence[Delta], largest: float, growth: float):
        self.deltas, self.largest, self.growth = deltas, largest, growth

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for delta in self.deltas:
            factor = delta.factor()
            is_free = delta.projector is None and delta.output_projector is None
            if self.largest and factor is delta.entrance() and is_free:
                factor.weight.clamp_(-self.largest, self.largest)
            elif self.largest:
                highest = delta.weight().abs().max()
                factor.weight.mul_((self.largest / highest.clamp(min=1e-30)).clamp(max=1))
            if self.growth:
                norm = delta.weight().float().norm() / delta.base_norm
                factor.weight.mul_((self.growth / norm.clamp(min=1e-30)).clamp(max=1))
