"""The work of causal tracing on one model: the noise, and the effects of one fact after the other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable

import torch
from torch import nn

from ..tuner.weights import base_of, context_length
from .facts import ROLES, Fact, roles_of
from .restoring import Runs, cells_of
from .sites import KINDS, find_sites


# ROME (arXiv 2202.05262), section 2.1: the noise has three times the standard deviation of the subjects' embeddings.
_NOISE_DEVIATIONS = 3
# What a model raises whose layers cannot be cut, or which takes no keys and values.
_CUT_ERRORS = (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError)


class Tracer:
    """Traces facts in one model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        copies (`int`):
            The number of corrupted runs of a fact.
        window (`int`):
            How many layers of MLPs or attentions are restored together.
        batch_size (`int`):
            How many rows to compute at once, each a corrupted run with something restored.
        seed (`int`):
            What the noise depends on.
        kinds (`Collection[str]`, *optional*):
            What is restored, of `KINDS`. Defaults to all of them.
        roles (`Collection[str]`, *optional*):
            The roles, of `ROLES`, of the tokens at which it is restored. Defaults to all of them.

    Raises:
        `ValueError`: If a number is less than 1, or the model's layers are not found.
    """

    def __init__(
        self,
        model: nn.Module,
        copies: int,
        window: int,
        batch_size: int,
        seed: int,
        kinds: Collection[str] = KINDS,
        roles: Collection[str] = ROLES,
    ):
        for name, value in (("copies", copies), ("window", window), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}, expected at least 1")
        self.base = base_of(model)
        self.sites = find_sites(self.base)
        self.kinds = [kind for kind in self.sites if kind in kinds]
        self.cells = [cell for cell in cells_of(self.sites, window) if cell.kind in self.kinds]
        self.roles = roles
        self.copies = copies
        self.batch_size = batch_size
        self.seed = seed
        self.shortcut: bool | None = None  # not known before the first fact

    @property
    def num_layers(self) -> int:
        """The number of the decoder's layers (`int`)."""
        return len(self.sites["states"])

    @property
    def context(self) -> float:
        """How many tokens the model takes (`int`; infinite where its config does not tell)."""
        return context_length(self.base.config) or math.inf

    def noise_scale(self, facts: Iterable[Fact]) -> float:
        """Return the standard deviation of the noise, which is that of the subjects' embeddings, three times.

        Args:
            facts (`Iterable[Fact]`):
                The facts.

        Returns:
            `float`: The standard deviation.
        """
        subjects = dict.fromkeys(tuple(fact.tokens[fact.begin : fact.end]) for fact in facts)
        embedded = self._embed([token for subject in subjects for token in subject])  # (tokens, embedding)
        return _NOISE_DEVIATIONS * embedded.float().std().item()

    def run(self, fact: Fact, scale: float) -> Runs:
        """Make the clean run and the corrupted ones of a fact. The noise is the same at every call.

        Args:
            fact ([`Fact`]):
                The fact.
            scale (`float`):
                The standard deviation of the noise.

        Returns:
            [`Runs`]: What they said.
        """
        # Of a generator on the CPU, so that it does not depend on the device.
        generator = torch.Generator().manual_seed(self.seed)
        width = self._embed(fact.tokens[:1]).shape[-1]
        noise = scale * torch.randn(self.copies, fact.end - fact.begin, width, generator=generator)
        runs = Runs(self.base, self.sites, fact, noise)
        if self.shortcut is None:
            self.shortcut = self._is_exact(runs)
        if not runs.clean:
            runs.record(self.shortcut)
        return runs

    def effects(self, runs: Runs, answer: int) -> dict[str, torch.Tensor]:
        """Return the indirect effects of a fact: the answer's probability where something is restored, less that of
        the corrupted runs.

        Args:
            runs ([`Runs`]):
                Of [`Tracer.run`].
            answer (`int`):
                The answer's first token.

        Returns:
            `dict[str, torch.Tensor]`: By kind, of shape (tokens, layers); zero at tokens of other roles.
        """
        _, corrupted = runs.probabilities(answer)
        length = len(runs.fact.tokens)
        effects = {kind: torch.zeros(length, self.num_layers) for kind in self.kinds}
        size = max(self.batch_size // self.copies, 1)
        for token, role in enumerate(roles_of(length, runs.fact.begin, runs.fact.end)):
            # Before the subject, where there is no role, the corrupted runs are the clean one: nothing is restored there.
            if role not in self.roles:
                continue
            for start in range(0, len(self.cells), size):
                cells = self.cells[start : start + size]
                restored = runs.restored_probabilities(token, cells, answer, self.shortcut)
                for cell, probability in zip(cells, restored.tolist()):
                    effects[cell.kind][token, cell.layer] = probability - corrupted
        return effects

    def _embed(self, tokens: list[int]) -> torch.Tensor:
        embeddings = self.base.get_input_embeddings()
        return embeddings(torch.tensor([tokens], device=embeddings.weight.device))[0]

    def _is_exact(self, runs: Runs) -> bool:
        """Try the shortcut on some states of a fact, against passes of the whole model over the whole prompt."""
        length, count = len(runs.fact.tokens), self.num_layers
        token = min(max(runs.fact.end - 1, 1), length - 1)  # one with a token before it
        cells = [cell for cell in self.cells if cell.layer in (count // 2, count - 1)]
        # Passes of other shapes round in other ways: 8e-6 was seen in float32.
        tolerance = 1e-4 if next(self.base.parameters()).dtype.itemsize >= 4 else 5e-2
        try:
            runs.record(shortcut=True)
            answer = int(runs.logits[0].argmax())
            short, full = (runs.restored_probabilities(token, cells, answer, way) for way in (True, False))
            difference = (short - full).abs().max().item()
            if difference <= tolerance:
                return True
            reason = f"with them, probabilities differ by {difference:.1g}"
        except _CUT_ERRORS as error:
            reason = f"this model's layers cannot be cut ({type(error).__name__}: {error})"
        warnings.warn(f"the shortcuts of causal tracing are off, and it takes longer: {reason}", stacklevel=2)
        runs.clean.clear()  # so that the runs are made anew
        return False
