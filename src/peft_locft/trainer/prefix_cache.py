"""The prefix cache: all below the lowest trained layer is frozen, so its output for an edit is computed only once.

The layers below are made to pass on what they get, and the stored states are put in at the lowest trained layer. Masks,
positions and attention types stay the model's own, so nothing has to be known of its architecture: slicing its list of
layers would be wrong where a layer looks up by its index what kind of attention it has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from ..tuner import layer_index, layers_name
from .config import EditConfig
from .loss import edit_losses


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
        states (`torch.Tensor`):
            Of shape (tokens, hidden), the edits one behind the other.
        starts (`torch.Tensor`):
            Of shape (edits + 1,), where each edit begins.
        outputs (`int`):
            How many outputs a layer returns, in a tuple; 0 for a tensor alone.
    """

    def __init__(self, prefix: Prefix, states: torch.Tensor, starts: torch.Tensor, outputs: int):
        self.prefix = prefix
        self.outputs = outputs
        self.states = states
        self.starts = starts

    def batch(self, edits: Sequence[int], width: int, device: torch.device) -> torch.Tensor:
        """Return the states of some edits, padded on the right with zeros, which the attention mask hides.

        Args:
            edits (`Sequence[int]`):
                The edits.
            width (`int`):
                The length of the batch, in tokens.
            device (`torch.device`):
                Where to put them.

        Returns:
            `torch.Tensor`: Of shape (batch, width, hidden).
        """
        padded = torch.zeros(len(edits), width, self.states.shape[-1], dtype=self.states.dtype)
        for place, edit in enumerate(edits):
            start, end = int(self.starts[edit]), int(self.starts[edit + 1])
            padded[place, : end - start] = self.states[start:end]
        return padded.to(device, non_blocking=True)

    @contextmanager
    def entering(self, inputs: dict[str, torch.Tensor]) -> Iterator[None]:
        """Within this context, the model's lower layers do nothing, and the lowest trained one gets the stored states.

        Args:
            inputs (`dict[str, torch.Tensor]`):
                A batch, with `index`, the edits' places, of shape (batch,), and `input_ids`, of shape (batch, width).
        """
        ids = inputs["input_ids"]
        states = self.batch(inputs["index"].tolist(), ids.shape[1], ids.device)

        def put_in(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

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
        return (hidden_states, *[None] * (self.outputs - 1)) if self.outputs else hidden_states


class _Reached(Exception):
    """Ends a forward pass at the lowest trained layer, with what enters it."""

    def __init__(self, states: torch.Tensor):
        self.states = states


def _entering(model: nn.Module, prefix: Prefix, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    handle = prefix.first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    except _Reached as reached:
        return reached.states
    finally:
        handle.remove()
    raise RuntimeError(f"a forward pass did not reach {type(prefix.first).__name__}")


def build_prefix_cache(
    model: PeftModel,
    dataset: Dataset,
    collator: Callable[[list[dict]], dict[str, torch.Tensor]],
    args: EditConfig,
    keeps_logits: bool,
) -> PrefixCache | None:
    """Build the cache, and check that it is exact.

    Args:
        model ([`~peft.PeftModel`]):
            The model.
        dataset ([`~datasets.Dataset`]):
            The tokenised edits.
        collator (`Callable`):
            Makes a batch of some of them.
        args ([`EditConfig`]):
            The training arguments.
        keeps_logits (`bool`):
            Whether the model takes `logits_to_keep`.

    Returns:
        [`PrefixCache`] or `None`: `None` where there is nothing to gain, and with a warning where it would not be
        exact.
    """
    reason = _obstacle(model, args)
    prefix = find_prefix(model) if reason is None and isinstance(model, PeftModel) else None
    if prefix is None:
        if reason is not None:
            warnings.warn(f"the prefix cache is off, and training slower: {reason}", stacklevel=2)
        return None
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        cache = _build(model, prefix, dataset, args.per_device_eval_batch_size, not args.disable_tqdm)
        if not _is_exact(model, cache, dataset, collator, keeps_logits):
            reason = "with it, this model's losses are others, so its layers say more to each other than hidden states"
    except (RuntimeError, TypeError, KeyError, AttributeError, IndexError) as error:
        reason = f"this model's layers cannot be cut ({type(error).__name__}: {error})"
    finally:
        for module, training in was_training.items():
            module.training = training
    if reason is not None:
        warnings.warn(f"the prefix cache is off, and training slower: {reason}", stacklevel=2)
        return None
    return cache


def _obstacle(model: nn.Module, args: EditConfig) -> str | None:
    if args.neftune_noise_alpha:
        return "NEFTune adds new noise to the embeddings in each epoch"
    if args.gradient_checkpointing:
        return "with gradient checkpointing, the layers are run again, outside of its reach"
    if args.world_size > 1 or args.deepspeed or args.fsdp:
        return "training is distributed, which it was not tested with"
    return None


@torch.no_grad()
def _build(model: PeftModel, prefix: Prefix, dataset: Dataset, batch_size: int, show_progress: bool) -> PrefixCache:
    rows = dataset["input_ids"]
    lengths = torch.tensor([len(row) for row in rows])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    order = torch.argsort(lengths, stable=True).tolist()  # so that batches have little padding
    states: torch.Tensor | None = None
    outputs: list[int] = []
    counting = prefix.below[-1].register_forward_hook(
        lambda module, args, output: outputs.append(len(output) if isinstance(output, tuple) else 0)
    )
    batches = range(0, len(order), batch_size)
    for begin in tqdm(batches, desc="Computing the layers below", disable=not show_progress, leave=False):
        chosen = order[begin : begin + batch_size]
        width = int(lengths[chosen].max())
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros(len(chosen), width, dtype=torch.long)
        for place, row in enumerate(chosen):
            ids[place, : lengths[row]] = torch.tensor(rows[row])
            mask[place, : lengths[row]] = 1
        entering = _entering(
            model, prefix, ids.to(model.device), mask.to(model.device)
        ).cpu()  # (batch, width, hidden)
        if states is None:
            states = torch.empty(int(starts[-1]), entering.shape[-1], dtype=entering.dtype)
        for place, row in enumerate(chosen):
            states[starts[row] : starts[row + 1]] = entering[place, : lengths[row]]
    counting.remove()
    return PrefixCache(prefix, states, starts, outputs[-1])


@torch.no_grad()
def _is_exact(
    model: PeftModel,
    cache: PrefixCache,
    dataset: Dataset,
    collator: Callable[[list[dict]], dict[str, torch.Tensor]],
    keeps_logits: bool,
) -> bool:
    """Compare the losses of some edits, of different lengths, with those of the whole model."""
    batch = collator([dataset[row] for row in range(min(8, len(dataset)))])
    batch = {name: value.to(model.device) for name, value in batch.items()}
    plain = edit_losses(model, batch, keeps_logits).per_edit
    with cache.entering(batch):
        cached = edit_losses(model, batch, keeps_logits).per_edit
    # In 16 bits, other batches than those that the states were computed in round in other ways.
    tolerance = 1e-4 if cache.states.dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(plain, cached, rtol=tolerance, atol=tolerance)
