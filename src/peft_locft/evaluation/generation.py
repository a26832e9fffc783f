"""Greedy generation for many prompts at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..edits.tokens import encode_prompts
from ..tuner.temporary import evaluating
from ..tuner.weights import base_of
from .decoding import Batch, Row, decodes_exactly, join, longest_sequence, read_guess, start, step


# How many batches of prompts are encoded, and sorted by length, at a time.
_CHUNK_BATCHES = 64
# A step costs little more for many rows than for a few, so that it waits for further ones until the caches hold so many
# tokens: half a gigabyte for a model of 8 billion parameters.
_OPEN_TOKENS = 4096
# How many rows of logits are computed at once, by prompt of a batch: one of a large vocabulary takes a megabyte.
_LOGITS = 8


@torch.no_grad()
def generate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: Sequence[int],
    *,
    batch_size: int = 32,
    description: str | None = None,
    drafts: Sequence[Sequence[int] | None] | None = None,
) -> list[list[int]]:
    """Continue prompts greedily: at each position the most probable token, until EOS or the limit.

    Nothing of the model's own generation settings is used (sampling, penalties, forced tokens), so the answers depend
    on nothing but its weights. They are those of the model's `generate` for each prompt alone. In float32 that holds
    token for token; in bfloat16 and float16, sums are rounded differently in batches of different shapes, so that one of
    two tokens of nearly the same probability may take the other's place, as with any other batch size too.

    A draft makes an answer faster, and never another one: as far as it is right, it costs one forward pass together
    with its prompt. Finished prompts leave their batch, and what is left of several batches goes on as one. Where that
    would not be exact (state-space models, sequences longer than a sliding window), `generate` is used.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model. It is in training mode afterwards if it was before.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`Sequence[str]`):
            The prompts.
        max_new_tokens (`Sequence[int]`):
            For each prompt, how many tokens to generate at most.
        batch_size (`int`, *optional*, defaults to `32`):
            How many prompts to read at once. At most twice as many answers are written at once, or more while prompts
            and answers have less than 4096 tokens together.
        description (`str`, *optional*):
            A title for a progress bar; without one there is none.
        drafts (`Sequence[Sequence[int] | None]`, *optional*):
            For each prompt a guess of the generated tokens, or `None` where there is none. With EOS at its end, it
            guesses too that the answer ends there.

    Returns:
        `list[list[int]]`: For each prompt the generated tokens, up to and with the first EOS.

    Raises:
        `ValueError`: If there are not as many limits, or drafts, as prompts, or `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}, expected at least 1")
    drafts = [None] * len(prompts) if drafts is None else drafts
    for name, given in (("max_new_tokens", max_new_tokens), ("drafts", drafts)):
        if len(given) != len(prompts):
            raise ValueError(f"got {len(given)} `{name}` for {len(prompts)} prompts: give one for each")
    answers: list[list[int]] = []
    if not prompts:
        return answers
    stops = eos_token_ids(model, tokenizer)
    with plain_generation(model), tqdm(total=len(prompts), desc=description, disable=description is None) as bar:
        longest = _longest_decoded(model, tokenizer)
        batch = None
        # Encoded by the chunk: enough for batches of uniform length, and no more than that is held.
        size = _CHUNK_BATCHES * batch_size
        for chunk in (slice(begin, begin + size) for begin in range(0, len(prompts), size)):
            rows = [
                Row(prompt, limit, read_guess(draft, limit, stops))
                for prompt, limit, draft in zip(
                    encode_prompts(tokenizer, prompts[chunk]), max_new_tokens[chunk], drafts[chunk]
                )
            ]
            answers += [row.tokens for row in rows]  # the very lists that are filled below
            bar.update(sum(row.limit < 1 for row in rows))
            rows = [row for row in rows if row.limit > 0]
            fits = [bool(row.prompt) and len(row.prompt) + row.limit <= longest for row in rows]
            for some in _batches([row for row, fit in zip(rows, fits) if not fit], batch_size):
                _generate(model, tokenizer, some, stops)
                bar.update(len(some))
            for some in _batches([row for row, fit in zip(rows, fits) if fit], batch_size):
                open_rows = len(some) + _size(batch)
                batch = join(model, batch, start(model, some, stops))
                while batch is not None and len(batch.rows) >= batch_size and batch.tokens >= _OPEN_TOKENS:
                    batch = step(model, batch, stops)
                bar.update(open_rows - _size(batch))
        while batch is not None:
            open_rows = _size(batch)
            batch = step(model, batch, stops)
            bar.update(open_rows - _size(batch))
    return answers


def decode_answer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return generated tokens as the text that a person would read.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        tokens (`Sequence[int]`):
            The generated tokens.

    Returns:
        `str`: The text without special tokens and without white space around it.
    """
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's EOS, and what the model's own settings add to it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Returns:
        `set[int]`: The token ids.
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(own if isinstance(own, (list, tuple)) else [own]) | {tokenizer.eos_token_id}
    return {i for i in ids if i is not None}


def _longest_decoded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return up to how many tokens, prompt and answer together, are decoded without `generate`."""
    (text,) = encode_prompts(tokenizer, ["The capital of Peru is Lima"])
    if not text or not decodes_exactly(model, text):
        return 0
    return longest_sequence(model) or float("inf")


def _batches(rows: list[Row], batch_size: int) -> Iterator[list[Row]]:
    """Yield rows of about one length together, fewer where their guesses are long: each token of one needs logits."""
    some, logits = [], 0
    for row in sorted(rows, key=lambda row: (len(row.prompt) + len(row.guess), row.limit)):
        needed = len(row.guess) + 1
        if some and (len(some) == batch_size or logits + needed > _LOGITS * batch_size):
            yield some
            some, logits = [], 0
        some.append(row)
        logits += needed
    if some:
        yield some


def _size(batch: Batch | None) -> int:
    return len(batch.rows) if batch is not None else 0


def _generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], stops: set[int]) -> None:
    """Continue rows with the model's own `generate`, padded on the left."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(len(row.prompt) for row in rows)
    input_ids = torch.tensor([[pad] * (width - len(row.prompt)) + row.prompt for row in rows])  # (batch, width)
    lengths = torch.tensor([len(row.prompt) for row in rows])
    attention_mask = (torch.arange(width) >= width - lengths[:, None]).long()  # (batch, width)
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=GenerationConfig(
            max_new_tokens=max(row.limit for row in rows),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=sorted(stops) or None,
        ),
    )
    for row, tokens in zip(rows, output[:, width:].tolist()):
        row.tokens += _until_eos(tokens[: row.limit], stops)


def _until_eos(tokens: list[int], stops: set[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in stops:
            return tokens[: position + 1]
    return tokens


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode with empty generation settings, and everything back afterwards."""
    base = base_of(model)
    settings = base.generation_config
    # `generate` fills what a given config leaves open from the model's own, so that one has to be empty.
    base.generation_config = GenerationConfig()
    try:
        with evaluating(model):
            yield
    finally:
        base.generation_config = settings
