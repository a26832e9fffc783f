"""The passes of an edit, run on the meta device: no number is computed, but every operation and every tensor is seen.

The model, its adapter and the order of the operations are the real ones, so nothing has to be known of an architecture.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..trainer.loss import takes_logits_to_keep
from ..trainer.prefix_cache import Prefix


_META = torch.device("meta")


class Cost(NamedTuple):
    """What a pass costs.

    Args:
        flops (`int`):
            The floating-point operations of its matrix products, a multiplication and an addition counted as two.
        peak (`int`):
            The most bytes that its tensors take at a time, beside the model's weights.
    """

    flops: int
    peak: int


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all meta tensors that are made within it and still live.

    Args:
        known (`list[torch.Tensor]`):
            Tensors that were there before and are not counted, and neither are views of them.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool and args[0].is_meta:
            # A model asks whether a mask hides nothing, so that it may leave it out: a batch of edits is padded.
            return False
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._storages:
            self._storages.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


class _AsOnAnAccelerator(TorchFunctionMode):
    """Computes attention and mixtures of experts as an accelerator does, where the meta device does not."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            func = _attention
        elif func is getattr(torch, "_grouped_mm", None):
            func = _grouped_product
        return func(*args, **(kwargs or {}))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    # The kernel for a padded batch keeps no matrix of scores. The one that torch chooses on the meta device does, and its
    # memory grows with the square of the length.
    if enable_gqa:  # the kernel wants as many heads of keys as of queries: (batch, heads, tokens, width)
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, None, needs_grad, dropout_p, is_causal, scale=scale)[0]


def _grouped_product(rows: torch.Tensor, experts: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    # (rows, in) by (experts, in, out): each row by one of the matrices, and the first costs what the others do. On the
    # meta device torch takes no other dtype than bfloat16, and it counts no operations of grouped products.
    return rows @ experts[0]


def _measure(model: PeftModel, work: Callable[[], None]) -> Cost:
    known = [*model.parameters(), *model.buffers()]
    with _AsOnAnAccelerator(), FlopCounterMode(display=False) as counter, _LiveBytes(known) as live:
        try:
            work()
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"{type(model.get_base_model()).__name__} cannot be planned, because its passes do not run on tensors "
                f"without values ({error})"
            ) from error
    return Cost(counter.get_total_flops(), live.peak)


def _batch(size: int, width: int) -> dict[str, torch.Tensor]:
    # Each (size, width); which tokens they are is without effect.
    return {name: torch.empty(size, width, dtype=torch.long, device=_META) for name in ("input_ids", "attention_mask")}


def evaluation_cost(model: PeftModel, size: int, width: int) -> Cost:
    """Return what it costs to read a batch of questions, with the cache of keys and values.

    Args:
        model ([`~peft.PeftModel`]):
            The model, on the meta device.
        size (`int`):
            How many questions are asked at once.
        width (`int`):
            The length of question and answer, in tokens. Reading them in one pass takes no less memory than writing
            the answer token by token.

    Returns:
        [`Cost`]: Its cost.
    """
    last = {"logits_to_keep": 1} if takes_logits_to_keep(model.get_base_model()) else {}

    @torch.no_grad()
    def work() -> None:
        output = model(**_batch(size, width), use_cache=True, **last)
        output.logits[:, -1].float()  # (size, vocab)

    return _measure(model, work)


class _Reached(Exception):
    """Ends a pass at the lowest trained layer."""


def cache_cost(model: PeftModel, prefix: Prefix, size: int, width: int) -> tuple[Cost, torch.Tensor, int]:
    """Return what it costs to compute the layers below the lowest trained one.

    Args:
        model ([`~peft.PeftModel`]):
            The model, on the meta device.
        prefix ([`Prefix`]):
            Where it is cut.
        size (`int`):
            How many edits make a batch.
        width (`int`):
            Their length in tokens.

    Returns:
        `tuple[Cost, torch.Tensor, int]`: The cost; what enters the lowest trained layer, of shape (size, width,
        hidden), on the meta device; and how many outputs a layer returns in a tuple, 0 for a tensor alone.
    """
    entering: list[torch.Tensor] = []
    outputs: list[int] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    def count(module: nn.Module, args: tuple, output: Any) -> None:
        outputs.append(len(output) if isinstance(output, tuple) else 0)

    handles = [
        prefix.first.register_forward_pre_hook(stop, with_kwargs=True),
        prefix.below[-1].register_forward_hook(count),
    ]

    @torch.no_grad()
    def work() -> None:
        try:
            model(**_batch(size, width), use_cache=False)
        except _Reached:
            pass

    cost = _measure(model, work)
    for handle in handles:
        handle.remove()
    return cost, entering[0], outputs[0]


def cut(prefix: Prefix, outputs: int) -> None:
    """Make a model's lower layers do nothing, and let the lowest trained one get stored states, for good.

    Args:
        prefix ([`Prefix`]):
            Where to cut.
        outputs (`int`):
            How many outputs a layer returns in a tuple, 0 for a tensor alone.
    """

    def pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple:
        return (hidden_states, *[None] * (outputs - 1)) if outputs else hidden_states

    def put_in(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        before = args[0] if args else kwargs["hidden_states"]  # (batch, width, hidden)
        entering = torch.empty_like(before)  # cast to the dtype that the model computes in, as the trainer does
        return ((entering, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entering})

    for layer in prefix.below:
        layer.forward = pass_on
    prefix.first.register_forward_pre_hook(put_in, with_kwargs=True)


def training_cost(model: PeftModel, size: int, width: int, targets: int) -> Cost:
    """Return what a training step costs: forward, loss and backward, with the gradients at its end.

    Args:
        model ([`~peft.PeftModel`]):
            The model, on the meta device.
        size (`int`):
            How many edits make a batch.
        width (`int`):
            Their length in tokens.
        targets (`int`):
            How many tokens of each are learned.

    Returns:
        [`Cost`]: Its cost.
    """
    keeps_logits = takes_logits_to_keep(model.get_base_model())
    labels = torch.empty(size * targets, dtype=torch.long, device=_META)
    # As in `edit_losses`, but with positions in place of a mask, of which nobody knows here how many it selects.
    positions = torch.arange(width - targets - 1, width - 1, device=_META)

    def loss() -> torch.Tensor:
        if keeps_logits:
            logits = model(**_batch(size, width), use_cache=False, logits_to_keep=positions).logits
        else:
            logits = model(**_batch(size, width), use_cache=False).logits[:, positions]
        logits = logits.reshape(size * targets, -1).float()  # (tokens, vocab)
        losses = F.cross_entropy(logits, labels, reduction="none")
        logits.argmax(dim=-1)
        return losses.mean()  # and the logits are gone, before the backward pass makes as many gradients

    cost = _measure(model, lambda: loss().backward())
    model.zero_grad(set_to_none=True)
    return cost
