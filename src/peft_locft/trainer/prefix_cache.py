"""The prefix cache: all below the lowest trained layer is frozen, so its output for an edit is computed only once.

The layers below are made to pass on what they get, and the stored states are put in at the lowest trained layer. Masks,
positions and attention types stay the model's own, so nothing has to be known of its architecture: slicing its list of
layers would be wrong where a layer looks up by its index what kind of attention it has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from ..tuner import layer_index, layers_name
from ..tuner.temporary import replaced_forwards, unedited
from .batches import EditCollator
from .config import EditConfig
from .exactness import warn_off
from .state_store import StateStore, lengths_of, prefix_key


class Prefix(NamedTuple):
    """Where a model can be cut.

    Args:
        below (`list[torch.nn.Module]`):
            The layers below the lowest trained one.
        first (`torch.nn.Module`):
            The lowest trained layer.
    """

    below: list[nn.Module]
    first: nn.Module


def find_prefix(model: PeftModel) -> Prefix | None:
    """Find the layers below the lowest one that is trained.

    Args:
        model ([`~peft.PeftModel`]):
            The model.

    Returns:
        [`Prefix`] or `None`: `None` where there is nothing to gain: the lowest layer is trained, or the embeddings are.
    """
    layers, lowest = layers_of(model)
    return Prefix(layers[:lowest], layers[lowest]) if lowest else None


def layers_of(model: PeftModel) -> tuple[list[nn.Module], int]:
    """Return the layers that are trained on, and the number of the lowest trained one.

    Args:
        model ([`~peft.PeftModel`]):
            The model.

    Returns:
        `tuple[list[torch.nn.Module], int]`: All layers of this stack, and the number, counted from 0; none and 0 where something
        is trained that is in no layer.
    """
    base = model.get_base_model()
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    stacks = sorted({layers_name(name) for name in trained} - {None})
    head = base.get_output_embeddings()
    above = tuple(f"{name}." for name, module in base.named_modules() if head is not None and module is head)
    outside = [name for name in trained if layers_name(name) is None and not (above and name.startswith(above))]
    if len(stacks) != 1 or outside:
        return [], 0
    layers = list(base.get_submodule(stacks[0]))
    return layers, min(layer_index(name) for name in trained if layers_name(name) is not None)


class PrefixCache:
    """The hidden states that enter the lowest trained layer, for every token of every edit.

    Args:
        prefix ([`Prefix`]):
            Where the model is cut.
        store ([`StateStore`]):
            The states, in memory or in a file.
        starts (`torch.Tensor`):
            Of shape (edits + 1,), where each edit begins among the stored tokens.
    """

    def __init__(self, prefix: Prefix, store: StateStore, starts: torch.Tensor):
        self.prefix = prefix
        self.store = store
        self.starts = starts

    def states_at(self, edits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the states of some tokens.

        Args:
            edits (`torch.Tensor`):
                The edit of each token, of shape (rows, width).
            positions (`torch.Tensor`):
                The tokens' places in these edits, of shape (rows, width).

        Returns:
            `torch.Tensor`: Of shape (rows, width, hidden).
        """
        return self.store.read(self.starts[edits] + positions)

    @contextmanager
    def entering(self, states: torch.Tensor) -> Iterator[None]:
        """Within this context, the model's lower layers do nothing, and the lowest trained one gets stored states.

        Args:
            states (`torch.Tensor`):
                The states of a batch, of shape (rows, width, hidden).
        """

        with entering(self.prefix, lambda: states, self.store.outputs):
            yield


@contextmanager
def entering(prefix: Prefix, next_states: Callable[[], torch.Tensor], outputs: int) -> Iterator[None]:
    """Within this context, a model's lower layers do nothing, and the next one gets states that were kept.

    Args:
        prefix ([`Prefix`]):
            Where the model is cut.
        next_states (`Callable[[], torch.Tensor]`):
            Returns the states of a forward pass, of shape (rows, width, hidden).
        outputs (`int`):
            How many outputs a layer has, of which all but the first may be nothing; 0 where it returns no tuple.
    """

    def put_in(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # What was passed on from the embeddings has the dtype that the model computes in at present, and its device.
        if args:
            return (next_states().to(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": next_states().to(kwargs["hidden_states"])}

    def pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple:
        return (hidden_states, *[None] * (outputs - 1)) if outputs else hidden_states

    handle = prefix.first.register_forward_pre_hook(put_in, with_kwargs=True)
    try:
        with replaced_forwards(dict.fromkeys(prefix.below, pass_on)):
            yield
    finally:
        handle.remove()


class _LentStore:
    """States that many places read one after the other, so that none of them may delete them."""

    def __init__(self, store: StateStore):
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def delete(self) -> None:
        """Leave the states to the next place."""


class _SharedStates:
    """The unedited states that enter each of several layers. In the store, those of one layer stand behind those of the
    layer before.
    """

    def __init__(self, numbers: Collection[int]):
        self.numbers = sorted(numbers)
        self.store: StateStore | None = None  # of shape (layers * tokens, hidden), when it was first asked for

    def cache(
        self,
        model: PeftModel,
        prefix: Prefix,
        dataset: Dataset,
        args: EditConfig,
        pad_token_id: int,
        dtype: torch.dtype | None,
    ) -> PrefixCache | None:
        """Return the cache of a place, or `None` where it has to be built: these states are of other layers or tokens."""
        number = len(prefix.below)
        if number not in self.numbers:
            return None
        tokens = dataset.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"]
        if self.store is None:
            layers, _ = layers_of(model)
            self.layers = [layers[number] for number in self.numbers]
            self.dtype, self.tokens = dtype, tokens
            with unedited(model):
                self.store, self.starts = _build(model, prefix, self.layers, dataset, args, pad_token_id, dtype)
        place = self.numbers.index(number)
        if self.layers[place] is not prefix.first or dtype != self.dtype or not tokens.equals(self.tokens):
            return None
        return PrefixCache(prefix, _LentStore(self.store), self.starts + place * int(self.starts[-1]))


_SHARED: ContextVar[_SharedStates | None] = ContextVar("_SHARED", default=None)


@contextmanager
def shared_prefix_states(layers: Collection[int]) -> Iterator[None]:
    """Within this context, one model is trained at several places on the same edits, and the first cache that is built gives
    those of all places: one forward pass of the unedited model has the states that enter every layer.

    A cache of another model, other edits or another layer is built as ever. Together, the states are a file from the size on
    that `prefix_cache_memory` tells, in the output folder of the first place.

    Args:
        layers (`Collection[int]`):
            The lowest layers of the places, counted from 0.
    """
    shared = _SharedStates({layer for layer in layers if layer > 0})  # below the first one, there is nothing to share
    token = _SHARED.set(shared)
    try:
        yield
    finally:
        _SHARED.reset(token)
        if shared.store is not None:
            shared.store.delete()


class _Reached(Exception):
    """Ends a forward pass at the last layer whose states are wanted."""


def _entering(model: nn.Module, layers: Sequence[nn.Module], batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return what enters each of some layers, in their order, each of shape (rows, width, hidden)."""
    entered: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])
        if module is layers[-1]:
            raise _Reached

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    except _Reached:
        return entered
    finally:
        for handle in handles:
            handle.remove()
    raise RuntimeError(f"a forward pass did not reach {type(layers[-1]).__name__}")


def build_prefix_cache(
    model: PeftModel, dataset: Dataset, args: EditConfig, pad_token_id: int, dtype: torch.dtype | None = None
) -> PrefixCache | None:
    """Build the cache, or read the one that an interrupted run left.

    Args:
        model ([`~peft.PeftModel`]):
            The model, in evaluation mode.
        dataset ([`~datasets.Dataset`]):
            The tokenised edits.
        args ([`EditConfig`]):
            The training arguments.
        pad_token_id (`int`):
            What stands in the padding.
        dtype (`torch.dtype`, *optional*):
            What to keep the states in. Defaults to what the model says.

    Returns:
        [`PrefixCache`] or `None`: `None` where there is nothing to gain, and with a warning where it cannot be built.
    """
    reason = _obstacle(args)
    if reason is None:
        prefix = find_prefix(model)
        if prefix is None:
            return None
        shared = _SHARED.get()
        try:
            if shared is not None:
                cache = shared.cache(model, prefix, dataset, args, pad_token_id, dtype)
                if cache is not None:
                    return cache
            return PrefixCache(prefix, *_build(model, prefix, [prefix.first], dataset, args, pad_token_id, dtype))
        except (RuntimeError, TypeError, KeyError, AttributeError, IndexError, OSError) as error:
            reason = f"this model's layers cannot be cut ({type(error).__name__}: {error})"
    warn_off(reason)
    return None


def _obstacle(args: EditConfig) -> str | None:
    if args.neftune_noise_alpha:
        return "NEFTune adds new noise to the embeddings in each epoch"
    if args.gradient_checkpointing:
        return "with gradient checkpointing, the layers are run again, outside of its reach"
    if args.world_size > 1 or args.deepspeed or args.fsdp:
        return "training is distributed, which it was not tested with"
    return None


@torch.no_grad()
def _build(
    model: PeftModel,
    prefix: Prefix,
    layers: Sequence[nn.Module],
    dataset: Dataset,
    args: EditConfig,
    pad_token_id: int,
    dtype: torch.dtype | None,
) -> tuple[StateStore, torch.Tensor]:
    """Store what enters each of some layers; return the store, and where each edit begins in it."""
    lengths = lengths_of(dataset)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    collator = EditCollator(pad_token_id)
    order = torch.argsort(lengths, stable=True)  # so that batches have little padding
    outputs: list[int] = []
    counting = prefix.below[-1].register_forward_hook(
        lambda module, args, output: outputs.append(len(output) if isinstance(output, tuple) else 0)
    )
    store: StateStore | None = None
    batches = tqdm(
        order.split(args.per_device_eval_batch_size),
        desc="Computing the layers below",
        disable=args.disable_tqdm,
        leave=False,
    )
    try:
        for chosen in batches:
            columns = dataset[chosen.tolist()]
            batch = collator([dict(zip(columns, values)) for values in zip(*columns.values())])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            mask = batch["attention_mask"].bool()  # (rows, width)
            states = [entered[mask] for entered in _entering(model, layers, batch)]  # each (tokens, hidden)
            if store is None:
                shape = (len(layers) * int(starts[-1]), states[0].shape[-1])
                store = StateStore(shape, dtype or states[0].dtype, outputs[-1])
                if store.bytes > args.prefix_cache_memory * 2**30:
                    folder = Path(args.output_dir)
                    if store.open_file(folder, _key(model, layers, dataset)):
                        break  # an interrupted run computed them
            tokens = torch.cat([torch.arange(starts[edit], starts[edit + 1]) for edit in chosen.tolist()])
            for number, some in enumerate(states):
                store.write(tokens + number * int(starts[-1]), some)
    finally:
        counting.remove()
    store.finish()
    return store, starts


def _key(model: PeftModel, layers: Sequence[nn.Module], dataset: Dataset) -> str:
    """Return a hash of all that the states depend on, and of which layers they enter."""
    key = prefix_key(model, layers[-1], dataset)
    chosen = {id(layer) for layer in layers}
    return "".join([key, *(f" {name}" for name, module in model.named_modules() if id(module) in chosen)])
