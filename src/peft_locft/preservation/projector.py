"""The soft null-space projector: directions in which ordinary text lives are hardly touched.

With C the second moment of a module's inputs on ordinary text, the change sees `P x`, P ∝ (C / t + I)⁻¹. A direction of
the inputs whose variance is well above t is left out, one well below t passes. AlphaEdit (arXiv 2410.02355, section 3.1)
projects onto the null space of C with a hard threshold; this is the soft form, the ridge of MEMIT's closed solution
(arXiv 2210.07229, equation 14), of which nothing has to be cut off.

t is a multiple of the mean square of a usual input, the median of C's diagonal. The mean eigenvalue is the same in most
layers, but thousands of times as much where some tokens have massive activations (arXiv 2402.17762): a t of that size would
protect nothing there.

A change D of one size is to disturb the output of every module equally on ordinary text, so that each P is divided by the root
of E‖P x‖² = tr(P C P). Then all are multiplied by the modules' usual output, the root mean square of W x, so that one learning
rate suits models whose weights are of other sizes: in Gemma 3 270M, one of 0.014 is usual, and in SmolLM2-135M, one of 0.18
(docs/log.md). Massive activations count no more than ten times as much as a usual input in it.

The same on the other side: with G the second moment of the gradients at a module's outputs, Q ∝ (G / s + I)⁻¹ leaves out what
most changes what the model says. C and G are the two factors of K-FAC's Fisher information (arXiv 1503.05671, section 3.1), by
which a change of one size is dear or cheap: G ⊗ C, to second order. Between P and Q, what an edit needs is learned where that is
least.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ..tuner.temporary import replaced_forwards
from .deltas import Delta
from .focus import Focus
from .statistics import InputStatistics, OutputStatistics


_STATE_NAME = "unprojected.safetensors"
# How large the disturbance by a D of ones and minus ones at random is, relative to the usual output. It is what it was on
# SmolLM2-135M with projectors whose eigenvalues had a mean square of 1, where rates were found (docs/log.md).
_DISTURBANCE = 3.3
_MOST_OF_AN_INPUT = 10


class Projection:
    """Training of deltas between projectors: `ΔW = Q D P`, where D is what is trained. What a delta is already, it stays.

    Args:
        deltas (`Sequence[Delta]`):
            What is trained.
        statistics ([`InputStatistics`], *optional*):
            The second moments of the inputs of their modules, for P.
        threshold (`float`):
            t, as a multiple of the median of C's diagonal; 0 for no P.
        focus ([`Focus`], *optional*):
            What lets deltas learn from subjects.
        outputs ([`OutputStatistics`], *optional*):
            The second moments of the gradients at the outputs of their modules, for Q.
        output_threshold (`float`, *optional*, defaults to `0.0`):
            The same for Q and the median of G's diagonal; 0 for no Q.

    Raises:
        `ValueError`: If there are no statistics of a module, they have another width, or all of them are zero.
    """

    @torch.no_grad()
    def __init__(
        self,
        deltas: Sequence[Delta],
        statistics: InputStatistics | None,
        threshold: float,
        focus: Focus | None = None,
        outputs: OutputStatistics | None = None,
        output_threshold: float = 0.0,
    ):
        self._parts: list[_Part] = []
        digest = hashlib.sha256(repr((threshold, _DISTURBANCE, output_threshold)).encode())
        rights: list[tuple[torch.Tensor, torch.Tensor]] = []
        lefts: list[tuple[torch.Tensor, torch.Tensor]] = []
        said: list[float] = []  # the mean squares of the modules' outputs
        for delta in deltas:
            height, width = len(delta.factor().weight), delta.entrance().weight.shape[1]
            if threshold:
                moment = _checked(statistics, delta.name, width)
                digest.update(moment.contiguous().numpy().tobytes())
                rights.append(soft_projector(moment, threshold))
                said.append(_usual_output(delta.base_weight(), moment))
            if output_threshold:
                moment = _checked(outputs, delta.name, height)
                digest.update(moment.contiguous().numpy().tobytes())
                projector, inverse = soft_projector(moment, output_threshold)
                length = moment.trace().sqrt()  # so that a D at random moves what is said as much as without Q
                lefts.append((projector * length, inverse / length))
        gain = _DISTURBANCE * fmean(said) ** 0.5 or 1.0 if said else 1.0  # weights that are all zero say nothing
        for place, delta in enumerate(deltas):
            entrance, factor = delta.entrance(), delta.factor()
            linear = focus.linear_of(delta) if focus is not None else F.linear
            was_there = delta.weight().any()  # a new LoRA has a random A, but no change to be kept
            if threshold:
                projector, inverse = (side.to(entrance.weight) for side in rights[place])
                delta.projector = projector * gain
                if was_there:
                    entrance.weight.copy_(entrance.weight @ (inverse / gain))
            if output_threshold:
                delta.output_projector, inverse = (side.to(factor.weight) for side in lefts[place])
                if was_there:
                    factor.weight.copy_(inverse @ factor.weight)
            if entrance is factor:
                self._parts.append(_Part(entrance, delta.output_projector, delta.projector, linear))
            else:
                if threshold:
                    self._parts.append(_Part(entrance, None, delta.projector, linear))
                if output_threshold:
                    self._parts.append(_Part(factor, delta.output_projector, None, linear))
        self._key = digest.hexdigest()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context, the adapter's modules compute `Q D P x`. Behind it, their weights are `Q D P`."""
        try:
            with replaced_forwards({part.module: part.forward for part in self._parts}):
                yield
        finally:
            self._fold()

    @property
    def modules(self) -> set[nn.Module]:
        """The adapter's modules that compute so (`set[torch.nn.Module]`)."""
        return {part.module for part in self._parts}

    @torch.no_grad()
    def _fold(self) -> None:
        for part in self._parts:
            part.module.weight.copy_(part.folded(part.module.weight))

    @contextmanager
    def folded(self, checkpoint: str | os.PathLike) -> Iterator[None]:
        """Within this context, the weights are `Q D P`, as they are to be saved. D itself is saved beside them.

        Args:
            checkpoint (`str` or `os.PathLike`):
                The folder.
        """
        trained = [part.module.weight.detach().clone() for part in self._parts]
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        state = {str(number): weight for number, weight in enumerate(trained)}
        save_file(state, Path(checkpoint) / _STATE_NAME, metadata={"projectors": self._key})
        self._fold()
        try:
            yield
        finally:
            with torch.no_grad():
                for part, weight in zip(self._parts, trained):
                    part.module.weight.copy_(weight)

    @torch.no_grad()
    def load(self, checkpoint: str | os.PathLike) -> None:
        """Put back D, bit for bit, after a checkpoint's adapter was loaded.

        Args:
            checkpoint (`str` or `os.PathLike`):
                The folder.
        """
        with safe_open(Path(checkpoint) / _STATE_NAME, "pt") as state:
            for number, part in enumerate(self._parts):
                part.module.weight.copy_(state.get_tensor(str(number)))

    def check(self, checkpoint: str | os.PathLike) -> None:
        """Refuse a checkpoint that was trained behind other projectors, or none.

        Args:
            checkpoint (`str` or `os.PathLike`):
                The folder.

        Raises:
            `ValueError`: If it was.
        """
        path = Path(checkpoint) / _STATE_NAME
        if path.is_file():
            with safe_open(path, "pt") as state:
                if (state.metadata() or {}).get("projectors") == self._key:
                    return
        raise ValueError(
            f"{checkpoint} was trained behind {'other projectors' if path.is_file() else 'no projector'}: resume with the "
            "`projector`, `output_projector`, `statistics` and preservation texts that the run was started with"
        )


def is_projected(checkpoint: str | os.PathLike) -> bool:
    """Return whether a checkpoint was trained behind projectors.

    Args:
        checkpoint (`str` or `os.PathLike`):
            The folder.

    Returns:
        `bool`: Whether it was.
    """
    return (Path(checkpoint) / _STATE_NAME).is_file()


@dataclass
class _Part:
    """A module of an adapter, whose weight W stands for `left W right`."""

    module: nn.Linear
    left: torch.Tensor | None
    right: torch.Tensor | None
    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def folded(self, weight: torch.Tensor) -> torch.Tensor:
        weight = weight if self.right is None else weight @ self.right
        return weight if self.left is None else self.left @ weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, left = self.module.weight, self.left
        # In the weight's own precision: rounded, Q D P would not be the adapter that is saved.
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(weight.dtype)
            rows = x.numel() // x.shape[-1]
            # What has fewer rows is multiplied, P and Q being symmetric.
            if self.right is not None and rows < len(weight):
                x = x @ self.right
            elif self.right is not None:
                weight = weight @ self.right
            if left is not None and rows >= weight.shape[1]:
                weight, left = left @ weight, None
            y = self.linear(x, weight)
            return y if left is None else y @ left


def _checked(statistics: InputStatistics | OutputStatistics | None, name: str, width: int) -> torch.Tensor:
    """Return a module's second moment, if it is one."""
    moment = statistics.get(name) if statistics is not None else None
    fault = None
    if moment is None:
        fault = "none"
    elif not moment.any():
        fault = f"one of shape {tuple(moment.shape)}, all of it zero,"
    elif tuple(moment.shape) != (width, width):
        fault = f"one of shape {tuple(moment.shape)}"
    if fault is not None:
        raise ValueError(
            f"the statistics have {fault} for {name}, expected a second moment of shape ({width}, {width}): "
            "compute them on this model and these modules"
        )
    return moment


def _usual_output(weight: torch.Tensor, moment: torch.Tensor) -> float:
    """Return the mean square of an output of W x, where no input has a mean square that is many times the usual one."""
    most = _MOST_OF_AN_INPUT * _usual_square(moment)
    weight = weight.to(moment) * (most / moment.diagonal().clamp(min=most)).sqrt()
    return ((weight @ moment) * weight).sum().item() / len(weight)


def _usual_square(moment: torch.Tensor) -> torch.Tensor:
    """Return the median of C's diagonal, or its mean if most inputs are always zero."""
    squares = moment.diagonal()
    return squares.median() or squares.mean()


def soft_projector(moment: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the projector, behind which inputs of second moment C have a mean square length of 1, and its inverse.

    Args:
        moment (`torch.Tensor`):
            C, of shape (in_features, in_features), not zero.
        threshold (`float`):
            t, as a multiple of the median of C's diagonal, or of its mean if most inputs are always zero.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: P = (C / t + I)⁻¹ / √tr(P C P) and P⁻¹, in float32.
    """
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    moment = moment.double()
    inverse = moment / (threshold * _usual_square(moment)) + identity
    projector = torch.cholesky_inverse(torch.linalg.cholesky(inverse))
    length = (projector @ moment * projector).sum().sqrt()  # P is symmetric
    return (projector / length).float(), (inverse * length).float()
