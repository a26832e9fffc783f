"""What enters the layers of the unedited model while it reads the texts of a search: an edit changes nothing below its own
layer, so edited models read on from there."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft import PeftModel
from torch import nn

from ..trainer.prefix_cache import Prefix, entering, find_prefix, layers_of
from ..tuner.temporary import unedited


class TextStates:
    """The states, kept from the first edited model on.

    Args:
        layers (`Collection[int]`):
            The lowest layers that are going to be edited, counted from 0.
        most_bytes (`float`):
            How much memory they may take. If they need more, none are kept.
    """

    def __init__(self, layers: Collection[int], most_bytes: float):
        self._numbers = {number for number in layers if number > 0}  # below the first one, there is nothing to share
        self._most = most_bytes
        # By layer, one a forward pass, each (rows, width, hidden).
        self._states: dict[int, list[torch.Tensor]] | None = None
        self._outputs = 0

    def read(self, model: PeftModel, measure: Callable[[], float]) -> float:
        """Measure an edited model, without computing its lower layers anew where they are known.

        Args:
            model ([`~peft.PeftModel`]):
                The edited model.
            measure (`Callable[[], float]`):
                Measures it, by the same forward passes every time.

        Returns:
            `float`: What `measure` returns for the whole model.
        """
        if self._states is None:
            self._keep(model, measure)
        prefix = find_prefix(model)
        if prefix is None or len(prefix.below) not in self._states:
            return measure()
        with self._entering(prefix):
            return measure()

    def _keep(self, model: PeftModel, measure: Callable[[], float]) -> None:
        """Keep the states of all layers, if a model that gets them measures the same as a whole one."""
        layers, _ = layers_of(model)
        numbers = sorted(self._numbers & set(range(len(layers))))
        self._states = {number: [] for number in numbers}
        if not numbers:
            return
        deepest = Prefix(layers[: numbers[-1]], layers[numbers[-1]])
        with unedited(model):
            try:
                with self._keeping(layers):
                    whole = measure()
                if self._states:
                    with self._entering(deepest):
                        if math.isclose(measure(), whole, rel_tol=1e-4):
                            return
            except (RuntimeError, TypeError, KeyError, AttributeError, IndexError):
                pass  # the trainer warns of a model whose layers cannot be cut
        self._states = {}

    @contextmanager
    def _keeping(self, layers: list[nn.Module]) -> Iterator[None]:
        def keep(number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
            if number in self._states:
                self._states[number].append((args[0] if args else kwargs["hidden_states"]).to("cpu", copy=True))
                if sum(states.nbytes for some in self._states.values() for states in some) > self._most:
                    self._states.clear()

        def count(module: nn.Module, args: tuple, output: object) -> None:
            self._outputs = len(output) if isinstance(output, tuple) else 0

        handles = [layers[0].register_forward_hook(count)]
        handles += [
            layers[number].register_forward_pre_hook(partial(keep, number), with_kwargs=True)
            for number in self._states
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _entering(self, prefix: Prefix) -> Iterator[None]:
        states = iter(self._states[len(prefix.below)])
        with entering(prefix, lambda: next(states).clone(), self._outputs):  # a layer may change it in place
            yield
