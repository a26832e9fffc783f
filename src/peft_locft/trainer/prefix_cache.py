"""The prefix cache: all below the lowest trained layer is frozen, so its output for an edit is computed only once.

The layers below are made to pass on what they get, and the stored states are put in at the lowest trained layer. Masks,
positions and attention types stay the model's own, so nothing has to be known of its architecture: slicing its list of
layers would be wrong where a layer looks up by its index what kind of attention it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from ..tuner import layer_index, layers_name
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
    base = model.get_base_model()
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    stacks = sorted({layers_name(name) for name in trained} - {None})
    head = base.get_output_embeddings()
    above = tuple(f"{name}." for name, module in base.named_modules() if head is not None and module is head)
    outside = [name for name in trained if layers_name(name) is None and not (above and name.startswith(above))]
    if len(stacks) != 1 or outside:
        return None
    layers = list(base.get_submodule(stacks[0]))
    lowest = min(layer_index(name) for name in trained if layers_name(name) is not None)
    return Prefix(layers[:lowest], layers[lowest]) if lowest else None


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

        def put_in(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            # What was passed on from the embeddings has the dtype that the model computes in at present.
            if args:
                return (states.to(args[0].dtype), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": states.to(kwargs["hidden_states"].dtype)}

        handle = self.prefix.first.register_forward_pre_hook(put_in, with_kwargs=True)
        own = [layer.__dict__.get("forward") for layer in self.prefix.below]  # accelerate's hooks put one there
        for layer in self.prefix.below:
            layer.forward = self._pass_on
        try:
            yield
        finally:
            handle.remove()
            for layer, forward in zip(self.prefix.below, own):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def _pass_on(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple:
        outputs = self.store.outputs
        return (hidden_states, *[None] * (outputs - 1)) if outputs else hidden_states


class _Reached(Exception):
    """Ends a forward pass at the lowest trained layer, with what enters it."""

    def __init__(self, states: torch.Tensor):
        self.states = states


def _entering(model: nn.Module, prefix: Prefix, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    handle = prefix.first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    except _Reached as reached:
        return reached.states
    finally:
        handle.remove()
    raise RuntimeError(f"a forward pass did not reach {type(prefix.first).__name__}")


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
        try:
            return _build(model, prefix, dataset, args, pad_token_id, dtype)
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
    dataset: Dataset,
    args: EditConfig,
    pad_token_id: int,
    dtype: torch.dtype | None,
) -> PrefixCache:
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
            states = _entering(model, prefix, batch)[batch["attention_mask"].bool()]  # (tokens, hidden)
            if store is None:
                shape = (int(starts[-1]), states.shape[-1])
                store = StateStore(shape, dtype or states.dtype, outputs[-1])
                if store.bytes > args.prefix_cache_memory * 2**30:
                    folder = Path(args.output_dir)
                    if store.open_file(folder, prefix_key(model, prefix.first, dataset)):
                        break  # an interrupted run computed them
            tokens = torch.cat([torch.arange(starts[edit], starts[edit + 1]) for edit in chosen.tolist()])
            store.write(tokens, states)
    finally:
        counting.remove()
    store.finish()
    return PrefixCache(prefix, store, starts)
