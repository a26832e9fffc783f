"""Runs of a corrupted model in which one state after the other is restored, many of them in one pass.

In a causal model, a restored token changes nothing before it, and a restored layer nothing below it. So the corrupted
runs are made once, and what they said is kept: for all states of one token, a pass goes over that token and those
behind it only, with the corrupted keys and values of the tokens before it; and a row joins the pass at the layer at
which it begins to differ, with the corrupted states that enter there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..tuner.temporary import replaced_forwards
from .facts import Fact
from .sites import Sites


class Cell(NamedTuple):
    """What is restored at a token.

    Args:
        kind (`str`):
            One of `"states"`, `"mlp"`, `"attention"`.
        layer (`int`):
            The layer, or the centre of the window of layers.
        restored (`range`):
            The layers that are restored.
    """

    kind: str
    layer: int
    restored: range

    @property
    def begin(self) -> int:
        """The lowest layer that has to be computed (`int`): a restored state is what enters the layer above."""
        return self.restored.start + (self.kind == "states")


def cells_of(sites: Sites, window: int) -> list[Cell]:
    """Return what is restored at each token: every layer's state, and a window of MLPs or attentions around each layer.

    ROME (arXiv 2202.05262), appendix B: a single MLP or attention does little alone. The window reaches from `window // 2` layers below
    the layer upwards, and is cut off at the model's ends.

    Args:
        sites (`dict[str, list[list[torch.nn.Module]]]`):
            Of [`find_sites`].
        window (`int`):
            The number of layers.

    Returns:
        `list[Cell]`: In the order in which they begin.
    """
    cells = []
    for kind, modules in sites.items():
        below, count = (0, 1) if kind == "states" else (window // 2, window)
        for layer in range(len(modules)):
            start = layer - below
            cells.append(Cell(kind, layer, range(max(start, 0), min(start + count, len(modules)))))
    return sorted(cells, key=lambda cell: cell.begin)


@dataclass
class Runs:
    """The clean run and the corrupted ones of a fact.

    Args:
        base (`torch.nn.Module`):
            The transformers model.
        sites (`dict[str, list[list[torch.nn.Module]]]`):
            Of [`find_sites`].
        fact ([`Fact`]):
            The fact.
        noise (`torch.Tensor`):
            What is added to the subject's embeddings, of shape (copies, subject's tokens, embedding).
    """

    base: nn.Module
    sites: Sites
    fact: Fact
    noise: torch.Tensor
    # What the clean run said, by module: (tokens, width).
    clean: dict[nn.Module, torch.Tensor] = field(default_factory=dict, init=False)
    # What enters each layer in the corrupted runs, and last the head: (copies, tokens, hidden).
    entering: list[torch.Tensor] = field(default_factory=list, init=False)
    # The corrupted runs' keys and values, by layer: (copies, heads, tokens, head width).
    keys_values: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, init=False)
    outputs: int = field(default=0, init=False)  # of a layer that returns a tuple
    logits: torch.Tensor | None = field(default=None, init=False)  # (1 + copies, vocabulary), the clean run's first

    @property
    def copies(self) -> int:
        """The number of corrupted runs (`int`)."""
        return self.noise.shape[0]

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers (`list[torch.nn.Module]`)."""
        return [layer for (layer,) in self.sites["states"]]

    def record(self, shortcut: bool) -> None:
        """Make the clean run and the corrupted ones together, and keep what they said.

        Args:
            shortcut (`bool`):
                Whether to keep what [`restored_probabilities`] needs for its shortcut, too.
        """
        length = len(self.fact.tokens)
        self.entering = []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            # A copy, because some models go on to add to it in place.
            values = _first(output).reshape(1 + self.copies, length, -1)  # OPT's are (rows * tokens, width)
            self.clean[module] = values[0].clone()

        def keep_state(module: nn.Module, args: tuple, output: Any) -> None:
            self.entering.append(_first(output)[1:].clone())
            self.outputs = len(output) if isinstance(output, tuple) else 0

        def keep_first(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.entering.append((args[0] if args else kwargs["hidden_states"])[1:].clone())

        cache = DynamicCache() if shortcut else None
        with ExitStack() as stack:
            for module in {module for layers in self.sites.values() for modules in layers for module in modules}:
                stack.enter_context(_handle(module.register_forward_hook(keep)))
            if shortcut:
                first = self.layers[0].register_forward_pre_hook(keep_first, with_kwargs=True)
                stack.enter_context(_handle(first))
                for layer in self.layers:
                    stack.enter_context(_handle(layer.register_forward_hook(keep_state)))
            clean = torch.zeros_like(self.noise[:1])
            stack.enter_context(self._corrupted(torch.cat([clean, self.noise])))
            self.logits = self._last_logits(0, 1 + self.copies, cache)
        if cache is not None:
            self.keys_values = [(layer.keys[1:], layer.values[1:]) for layer in cache.layers]

    def probabilities(self, answer: int) -> tuple[float, float]:
        """Return the answer's probability in the clean run, and its mean over the corrupted ones.

        Args:
            answer (`int`):
                The answer's first token.

        Returns:
            `tuple[float, float]`: Both probabilities.
        """
        found = _probabilities(self.logits, answer)  # (1 + copies,)
        return found[0].item(), found[1:].mean().item()

    def restored_probabilities(self, token: int, cells: Sequence[Cell], answer: int, shortcut: bool) -> torch.Tensor:
        """Return the answer's probability, the mean over the corrupted runs, for each state restored at a token.

        Args:
            token (`int`):
                The token.
            cells (`Sequence[Cell]`):
                What to restore there, in the order in which they begin.
            answer (`int`):
                The answer's first token.
            shortcut (`bool`):
                Whether only that is computed which a restored state may change. Otherwise the whole model runs over
                the whole prompt.

        Returns:
            `torch.Tensor`: Of shape (cells,), on the CPU.
        """
        first = token if shortcut else 0
        cache = None
        with ExitStack() as stack:
            if shortcut:
                stack.enter_context(self._joining(token, [cell.begin for cell in cells]))
                cache = Cache(
                    layers=[
                        _SharedPrefix(keys[..., :token, :], values[..., :token, :])
                        for keys, values in self.keys_values
                    ]
                )
            else:
                stack.enter_context(self._corrupted(self.noise.repeat(len(cells), 1, 1)))
            self._restore(stack, token, token - first, cells)
            logits = self._last_logits(first, len(cells) * self.copies, cache)
        return _probabilities(logits, answer).view(len(cells), self.copies).mean(1).cpu()

    def _restore(self, stack: ExitStack, token: int, place: int, cells: Sequence[Cell]) -> None:
        """Put the clean values in at one token, which is at this place among those that are computed."""
        width = len(self.fact.tokens) - token + place

        def put_in(chosen: list[int]) -> Callable:
            def hook(module: nn.Module, args: tuple, output: Any) -> Any:
                values = _first(output)
                rows = values.reshape(-1, self.copies, width, values.shape[-1])  # (cells, copies, tokens, width)
                rows[chosen, :, place] = self.clean[module][token].to(rows)
                values = rows.reshape(values.shape)
                return (values, *output[1:]) if isinstance(output, tuple) else values

            return hook

        for kind, layers in self.sites.items():
            for layer, modules in enumerate(layers):
                chosen = [i for i, cell in enumerate(cells) if cell.kind == kind and layer in cell.restored]
                for module in modules if chosen else ():
                    stack.enter_context(_handle(module.register_forward_hook(put_in(chosen))))

    @contextmanager
    def _corrupted(self, noise: torch.Tensor) -> Iterator[None]:
        """Within this context, noise is added to the subject's embeddings: (rows, subject's tokens, embedding)."""

        def corrupt(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, self.fact.begin : self.fact.end] += noise.to(output)
            return output

        with _handle(self.base.get_input_embeddings().register_forward_hook(corrupt)):
            yield

    @contextmanager
    def _joining(self, token: int, begins: Sequence[int]) -> Iterator[None]:
        """Within this context, rows pass through the layers below the one where they begin, with corrupted states."""
        states = torch.cat([self.entering[begin][:, token:].to(self.entering[0].device) for begin in begins])
        rows = states.shape[0]  # states: (cells * copies, tokens from this one on, hidden)

        def joined(layer: int, own: Callable) -> Callable:
            active = self.copies * sum(begin <= layer for begin in begins)

            def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple:
                if layer == 0:
                    hidden_states = states.to(hidden_states)
                if active:
                    args, kwargs = _rows(args, rows, active), _rows(kwargs, rows, active)
                    found = _first(own(hidden_states[:active], *args, **kwargs))
                    hidden_states = torch.cat([found, hidden_states[active:].to(found.device)])
                return (hidden_states, *[None] * (self.outputs - 1)) if self.outputs else hidden_states

            return forward

        with replaced_forwards({layer: joined(index, layer.forward) for index, layer in enumerate(self.layers)}):
            yield

    def _last_logits(self, first: int, rows: int, cache: Cache | None) -> torch.Tensor:
        """Run the prompt from a token on, and return the logits of its last one: (rows, vocabulary)."""
        input_ids = torch.tensor(self.fact.tokens[first:], device=self.base.get_input_embeddings().weight.device)
        kwargs = {} if cache is None else {"past_key_values": cache}
        if "logits_to_keep" in inspect.signature(self.base.forward).parameters:
            kwargs["logits_to_keep"] = 1
        output = self.base(input_ids=input_ids.expand(rows, -1), use_cache=cache is not None, **kwargs)
        return output.logits[:, -1]


class _SharedPrefix(DynamicLayer):
    """The corrupted runs' keys and values of the tokens before: (copies, heads, tokens, head width).

    All rows of a copy share them, and what a layer adds to them is not kept.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cells = key_states.shape[0] // self.keys.shape[0]
        keys, values = self.keys.repeat(cells, 1, 1, 1), self.values.repeat(cells, 1, 1, 1)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


@contextmanager
def _handle(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _rows(value: Any, rows: int, active: int) -> Any:
    """The first rows of every batched tensor in a layer's arguments; what is shared by all rows stays."""
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] % rows == 0:
        return value[: value.shape[0] // rows * active]  # BLOOM's biases have one row for each row and head
    if isinstance(value, tuple):
        return tuple(_rows(item, rows, active) for item in value)
    if isinstance(value, dict):
        return {key: _rows(item, rows, active) for key, item in value.items()}
    return value


def _probabilities(logits: torch.Tensor, answer: int) -> torch.Tensor:
    logits = logits.float()  # (rows, vocabulary)
    return (logits[:, answer] - logits.logsumexp(-1)).exp()
