"""Greedy decoding in which guessed answers are checked in one pass and finished rows leave their batch.

Under greedy decoding a guess is right exactly as far as each of its tokens is the most probable one behind those before
it, and one forward pass over prompt and guess tells that for all of its tokens at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from ..tuner.weights import base_of


# Layers whose state is one key and one value a token, so that rows and tokens can be taken out of it. A dummy layer
# uses the state of another one.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
# How far logits of two ways to compute the same may be apart, as a fraction of their spread. Rounding made at most 2e-6
# in float32, and may make a hundredth in bfloat16; a token that is seen or placed wrongly made 0.15 and more.
_TOLERANCE = 0.05
# Whether a model decodes exactly. The answer lies in its architecture, so that it is tried once.
_TRIED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@dataclass
class Row:
    """A prompt that is being continued.

    Args:
        prompt (`list[int]`):
            The prompt's tokens, at least one.
        limit (`int`):
            How many tokens to generate at most, at least one.
        guess (`list[int]`):
            The answer that is expected, as far as it has to be read (see [`read_guess`]).
        tokens (`list[int]`, *optional*):
            The answer so far.
    """

    prompt: list[int]
    limit: int
    guess: list[int]
    tokens: list[int] = field(default_factory=list)

    def is_done(self, stops: set[int]) -> bool:
        """Return whether the answer has reached its limit or ended."""
        return len(self.tokens) >= self.limit or (bool(self.tokens) and self.tokens[-1] in stops)


class Batch(NamedTuple):
    """Rows between two steps. The cache holds, padded on the left, all of a row but the last token of its answer.

    Args:
        rows (`list[Row]`):
            The rows. None is done.
        cache ([`~transformers.DynamicCache`]):
            Keys and values, each of shape (batch, heads, width, head size) with the width of the longest row.
    """

    rows: list[Row]
    cache: DynamicCache

    @property
    def tokens(self) -> int:
        """How many tokens the cache holds, padding included (`int`)."""
        return len(self.rows) * self.cache.get_seq_length()


def read_guess(draft: Sequence[int] | None, limit: int, stops: set[int]) -> list[int]:
    """Return the part of a draft that has to be read to check it.

    Args:
        draft (`Sequence[int]`, *optional*):
            A guess of the answer's tokens.
        limit (`int`):
            How many tokens to generate at most.
        stops (`set[int]`):
            The tokens that end an answer.

    Returns:
        `list[int]`: The draft without the token that ends the answer, because nothing comes behind it: the first of
        `stops`, or the last that the limit allows.
    """
    guess = list(draft or ())[: limit - 1]
    return next((guess[:i] for i, token in enumerate(guess) if token in stops), guess)


def start(model: PreTrainedModel, rows: list[Row], stops: set[int]) -> Batch | None:
    """Read prompts with their guesses in one forward pass, and keep of each guess what greedy decoding would give.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, in evaluation mode.
        rows (`list[Row]`):
            The rows. Their `tokens` are filled with the right part of the guess and the token that follows it.
        stops (`set[int]`):
            The tokens that end an answer.

    Returns:
        [`Batch`] or `None`: What is not done yet; `None` where everything is.
    """
    read = [row.prompt + row.guess for row in rows]
    width = max(map(len, read))
    # Padded on the right, where causal attention sees none of it: no mask, and each row is computed as if alone. Any
    # token will do, so that it is the row's own.
    input_ids = torch.tensor([tokens + tokens[-1:] * (width - len(tokens)) for tokens in read])  # (batch, width)
    first = torch.tensor([[len(row.prompt) - 1] for row in rows])  # (batch, 1)
    last = torch.tensor([[len(tokens) - 1] for tokens in read])  # (batch, 1)
    places = torch.arange(width)
    cache = _empty_cache(model)
    predicted = _predict(
        model,
        cache,
        input_ids,
        mask=torch.ones_like(input_ids),
        positions=places.expand_as(input_ids),
        wanted=(places >= first) & (places <= last),
    )
    following = iter(predicted.argmax(dim=-1).tolist())  # (wanted,), row by row
    for row in rows:
        # One token more than the guess has; the last one is always the model's own.
        for token, guessed in zip([next(following) for _ in range(len(row.guess) + 1)], [*row.guess, None]):
            row.tokens.append(token)
            if token != guessed or row.is_done(stops):
                break
    return _keep(model, Batch(rows, cache), stops, on_the_right=True)


def step(model: PreTrainedModel, batch: Batch, stops: set[int]) -> Batch | None:
    """Generate one more token for each row.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, in evaluation mode.
        batch ([`Batch`]):
            The rows. Their `tokens` grow by one.
        stops (`set[int]`):
            The tokens that end an answer.

    Returns:
        [`Batch`] or `None`: What is not done yet; `None` where everything is.
    """
    lengths = _lengths(batch.rows)[:, None]  # (batch, 1), the tokens in the cache
    width = int(lengths.max())
    predicted = _predict(
        model,
        batch.cache,
        input_ids=torch.tensor([row.tokens[-1:] for row in batch.rows]),  # (batch, 1)
        mask=(torch.arange(width + 1) >= width - lengths).long(),  # (batch, width + 1)
        positions=lengths,
        wanted=torch.ones_like(lengths, dtype=torch.bool),
    )
    for row, token in zip(batch.rows, predicted.argmax(dim=-1).tolist()):
        row.tokens.append(token)
    return _keep(model, batch, stops)


def join(model: PreTrainedModel, first: Batch | None, second: Batch | None) -> Batch | None:
    """Make one batch of two, because a step costs little more for many rows than for a few.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        first ([`Batch`], *optional*):
            Some rows.
        second ([`Batch`], *optional*):
            Further rows.

    Returns:
        [`Batch`] or `None`: All rows; `None` where there are none.
    """
    if first is None or second is None:
        return first or second
    width = max(batch.cache.get_seq_length() for batch in (first, second))
    states = []
    for parts in zip(_states(first.cache), _states(second.cache)):
        # Each of shape (batch, heads, seq, size), padded on the left of seq.
        pairs = zip(*([F.pad(state, (0, 0, width - state.shape[2], 0)) for state in part] for part in parts if part))
        states.append([torch.cat(pair) for pair in pairs])
    return Batch(first.rows + second.rows, _cache_of(model, states))


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Return up to which length decoding is exact, prompt and answer together.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.

    Returns:
        `int` or `None`: In tokens: the shortest sliding window, which drops states beyond it, and the length at which
        some rotary embeddings change for the whole batch. `None` where there is no limit.
    """
    config = base_of(model).config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    settings = [config.to_dict(), rope, *(part for part in rope.values() if isinstance(part, dict))]
    lengths = [part.get("original_max_position_embeddings") for part in settings]
    lengths += [getattr(config, "max_position_embeddings", None)]
    lengths += [layer.sliding_window for layer in _empty_cache(model).layers if layer.get_max_length() > 0]
    return min((length for length in lengths if isinstance(length, int)), default=None)


@torch.no_grad()
def decodes_exactly(model: PreTrainedModel, tokens: Sequence[int]) -> bool:
    """Return whether a model can be decoded here, with the answers of `generate`.

    Its cache has to hold keys and values a token and nothing else, unlike that of Mamba or linear attention. The rest
    is tried instead of told from its name: whether tokens on the right change those on the left, as where a prompt
    is read in both directions, and whether a cache from which tokens were taken goes on as one without them does, as it
    does not where positions are counted by the size of the cache.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, in evaluation mode.
        tokens (`Sequence[int]`):
            Some text, to try it on.

    Returns:
        `bool`: Whether it can.
    """
    base = base_of(model)
    if isinstance(model, PeftModel) and any(
        config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None)
        for config in model.peft_config.values()
    ):
        return False  # PEFT's `generate` adds to what the forward pass gets
    takes = inspect.signature(base.forward).parameters
    if base.config.is_encoder_decoder or not {"past_key_values", "attention_mask"} <= set(takes):
        return False
    if any(type(layer) not in _PLAIN_LAYERS for layer in _empty_cache(model).layers):
        return False
    if base not in _TRIED:
        try:
            _TRIED[base] = _try(model, list(tokens))
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
        ):  # of code that takes these arguments in another sense
            _TRIED[base] = False
    return _TRIED[base]


def _try(model: PreTrainedModel, tokens: list[int]) -> bool:
    tokens = (tokens * 6)[:6]
    if (longest := longest_sequence(model)) is not None and longest < len(tokens):
        return False
    alone = model(input_ids=torch.tensor([tokens[:4]], device=model.device), use_cache=False).logits[0, -1]  # (vocab,)
    ids, cache = torch.tensor([tokens]), _empty_cache(model)
    everything = torch.ones_like(ids, dtype=torch.bool)
    read = _predict(model, cache, ids, everything.long(), torch.arange(6)[None], everything)  # (6, vocab)
    if any(type(layer) is not DummyLayer and layer.get_seq_length() != 6 for layer in cache.layers):
        return False
    # The first four tokens, with two of padding before them, and the fifth behind them.
    taken = _take(model, cache, torch.tensor([0]), torch.tensor([[0, 0, 0, 1, 2, 3]]))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    stepped = _predict(model, taken, ids[:, 4:5], mask, torch.tensor([[4]]), everything[:, :1])[0]  # (vocab,)
    return _are_close(read[3], alone) and _are_close(stepped, read[4])


def _are_close(logits: torch.Tensor, truth: torch.Tensor) -> bool:
    return bool((logits.float() - truth.float()).norm() <= _TOLERANCE * (truth.float() - truth.float().mean()).norm())


def _predict(
    model: PreTrainedModel,
    cache: DynamicCache,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Return the logits at the wanted positions, of shape (wanted, vocab), and lengthen the cache."""
    takes = inspect.signature(base_of(model).forward).parameters
    inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": wanted}
    inputs = {name: value.to(model.device) for name, value in inputs.items() if name in takes}
    logits = model(**inputs, past_key_values=cache, use_cache=True).logits
    return logits.flatten(0, -2) if "logits_to_keep" in takes else logits[wanted.to(logits.device)]


def _keep(model: PreTrainedModel, batch: Batch, stops: set[int], on_the_right: bool = False) -> Batch | None:
    """Take the rows that are done out of a batch, and bring the rest to the least width, padded on the left."""
    kept = [i for i, row in enumerate(batch.rows) if not row.is_done(stops)]
    if len(kept) == len(batch.rows) and not on_the_right:
        return batch
    if not kept:
        return None
    rows = [batch.rows[i] for i in kept]
    lengths = _lengths(rows)[:, None]  # (kept, 1)
    width = int(lengths.max())
    begins = 0 if on_the_right else batch.cache.get_seq_length() - lengths
    # The places in the old cache; those of the padding are any, because they are masked.
    places = (torch.arange(width) - (width - lengths)).clamp(min=0) + begins  # (kept, width)
    return Batch(rows, _take(model, batch.cache, torch.tensor(kept), places))


def _take(model: PreTrainedModel, cache: DynamicCache, rows: torch.Tensor, places: torch.Tensor) -> DynamicCache:
    """Return a cache of some rows, and of each of them the states at given places, of shape (rows, width)."""
    states = []
    for pair in _states(cache):
        states.append(
            [
                # (batch, heads, seq, size), of which the first axis is chosen from before the third
                state[rows.to(state.device)].take_along_dim(places.to(state.device)[:, None, :, None], dim=2)
                for state in pair
            ]
        )
    return _cache_of(model, states)


def _lengths(rows: list[Row]) -> torch.Tensor:
    """Return how many tokens of each row are in the cache between two steps, of shape (rows,)."""
    return torch.tensor([len(row.prompt) + len(row.tokens) - 1 for row in rows])


def _states(cache: DynamicCache) -> list[list[torch.Tensor]]:
    """Return the keys and values of each layer; nothing for a layer that uses another one's."""
    return [[layer.keys, layer.values] if layer.keys is not None else [] for layer in cache.layers]


def _cache_of(model: PreTrainedModel, states: list[list[torch.Tensor]]) -> DynamicCache:
    cache = _empty_cache(model)
    for index, pair in enumerate(states):
        if pair:
            cache.update(*pair, index)
    return cache


def _empty_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=base_of(model).config)
