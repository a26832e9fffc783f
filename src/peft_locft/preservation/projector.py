"""The soft null-space projector: directions in which ordinary text lives are hardly touched.

With C the second moment of a module's inputs on ordinary text, the change sees `P x`, P = (C / t + I)⁻¹. A direction of
the inputs whose variance is well above t is left out, one well below t passes. AlphaEdit (arXiv 2410.02355, section 3.1)
projects onto the null space of C with a hard threshold; this is the soft form, the ridge of MEMIT's closed solution
(arXiv 2210.07229, equation 14), of which nothing has to be cut off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from .deltas import Delta
from .statistics import InputStatistics


_STATE_NAME = "unprojected.safetensors"


class Projection:
    """Training of deltas behind projectors: `ΔW = D P`, where D is what is trained.

    Args:
        deltas (`Sequence[Delta]`):
            What is trained.
        statistics ([`InputStatistics`]):
            The second moments of the inputs of their modules.
        threshold (`float`):
            t, as a multiple of the mean eigenvalue of C.

    Raises:
        `ValueError`: If there are no statistics of a module, or they have another width.
    """

    def __init__(self, deltas: Sequence[Delta], statistics: InputStatistics, threshold: float):
        self._parts: list[tuple[nn.Linear, torch.Tensor, torch.Tensor]] = []
        for delta in deltas:
            entrance = delta.entrance()
            width = entrance.weight.shape[1]
            moment = statistics.get(delta.name)
            if moment is None or tuple(moment.shape) != (width, width):
                got = f"one of shape {tuple(moment.shape)}" if moment is not None else "none"
                raise ValueError(
                    f"the statistics have {got} for {delta.name}, expected a second moment of shape ({width}, {width}): "
                    "compute them on this model and these modules"
                )
            projector, inverse = soft_projector(moment, threshold)
            delta.projector = projector.to(entrance.weight)
            self._parts.append((entrance, delta.projector, inverse.to(entrance.weight)))

    @torch.no_grad()
    def start(self) -> None:
        """Make D of the weights, such that nothing is changed before training."""
        for entrance, _, inverse in self._parts:
            if entrance.weight.any():
                entrance.weight.copy_(entrance.weight @ inverse)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context, the adapter's modules compute `D P x`. Behind it, their weights are `D P`."""
        for entrance, projector, _ in self._parts:
            entrance.forward = _projected(entrance, projector)
        try:
            yield
        finally:
            for entrance, _, _ in self._parts:
                del entrance.forward
            self._fold()

    @torch.no_grad()
    def _fold(self) -> None:
        for entrance, projector, _ in self._parts:
            entrance.weight.copy_(entrance.weight @ projector)

    @contextmanager
    def folded(self, checkpoint: str | os.PathLike) -> Iterator[None]:
        """Within this context, the weights are `D P`, as they are to be saved. D itself is saved beside them.

        Args:
            checkpoint (`str` or `os.PathLike`):
                The folder.
        """
        trained = [entrance.weight.detach().clone() for entrance, _, _ in self._parts]
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        save_file({str(number): weight for number, weight in enumerate(trained)}, Path(checkpoint) / _STATE_NAME)
        self._fold()
        try:
            yield
        finally:
            with torch.no_grad():
                for (entrance, _, _), weight in zip(self._parts, trained):
                    entrance.weight.copy_(weight)

    @torch.no_grad()
    def load(self, checkpoint: str | os.PathLike) -> None:
        """Put back D, bit for bit, after a checkpoint's adapter was loaded.

        Args:
            checkpoint (`str` or `os.PathLike`):
                The folder.
        """
        state = load_file(Path(checkpoint) / _STATE_NAME)
        for number, (entrance, _, _) in enumerate(self._parts):
            entrance.weight.copy_(state[str(number)])


def _projected(entrance: nn.Linear, projector: torch.Tensor):
    def forward(x: torch.Tensor) -> torch.Tensor:
        # The weight is multiplied, not the inputs: it has fewer rows than a batch has tokens.
        return F.linear(x, entrance.weight @ projector)

    return forward


def soft_projector(moment: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the projector and its inverse.

    Args:
        moment (`torch.Tensor`):
            C, of shape (in_features, in_features).
        threshold (`float`):
            t, as a multiple of the mean eigenvalue of C.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: (C / t + I)⁻¹ and C / t + I, in float32.
    """
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    moment = moment.double()
    inverse = moment / (threshold * moment.trace() / len(moment)) + identity
    return torch.cholesky_inverse(torch.linalg.cholesky(inverse)).float(), inverse.float()
