"""From text to tokens, in one way for training and for generation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(model: PreTrainedModel, argument: str = "tokenizer") -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a loaded model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        argument (`str`, *optional*, defaults to `"tokenizer"`):
            The caller's argument that takes a tokenizer, for the message.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: The tokenizer at the model's name.

    Raises:
        `ValueError`: If there is none.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise ValueError(f"the model does not tell where its tokenizer is: pass the tokenizer as `{argument}`")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer was found at the model's name, {name!r}: pass the tokenizer as `{argument}` ({error})"
        ) from error


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Encode prompts as a model is to continue them: with the tokenizer's first tokens, without an EOS at the end.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        prompts (`Sequence[str]`):
            The prompts.

    Returns:
        `list[list[int]]`: The tokens of each prompt.
    """
    if not prompts:
        return []  # tokenizers fail on an empty batch
    encoded = tokenizer(list(prompts), truncation=False, return_attention_mask=False)["input_ids"]
    return [_without_eos(tokenizer, ids) for ids in encoded]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Encode prompts and the answers that follow them after one space, without EOS.

    Prompt and answer are encoded jointly, as they stand in a text. Where the tokenizer merges across their boundary,
    the answer is encoded alone, because the model is only ever asked the prompt as it is encoded alone.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        prompts (`Sequence[str]`):
            The prompts.
        answers (`Sequence[str]`):
            As many answers.

    Returns:
        `list[tuple[list[int], list[int]]]`: For each pair, the tokens of the prompt and those of the answer.
    """
    prompt_ids = encode_prompts(tokenizer, prompts)
    joint_ids = encode_prompts(tokenizer, [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers)])
    pairs = []
    for ids, joint, answer in zip(prompt_ids, joint_ids, answers):
        if joint[: len(ids)] == ids:
            pairs.append((ids, joint[len(ids) :]))
        else:
            alone: Any = tokenizer(f" {answer}", add_special_tokens=False, return_attention_mask=False)["input_ids"]
            pairs.append((ids, list(alone)))
    return pairs


def find_subject(prompt: str, subject: str | None) -> list[tuple[int, int]]:
    """Return where a subject stands in a prompt: as words of their own, or if it nowhere does, inside of others, because not
    all scripts put spaces between words.

    Args:
        prompt (`str`):
            The prompt.
        subject (`str`, *optional*):
            The subject, as it is written in the prompt.

    Returns:
        `list[tuple[int, int]]`: For each time, its first character and the one behind its last; empty where it does not
        occur.
    """
    written = re.escape((subject or "").strip())
    if not written:
        return []
    for pattern in (rf"(?<!\w){written}(?!\w)", written):
        if found := [match.span() for match in re.finditer(pattern, prompt)]:
            return found
    return []


def subject_places(tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str | None, start: int = 0) -> list[int]:
    """Return which tokens of a prompt, as [`encode_prompts`] encodes it, share a character with its subject.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A fast tokenizer.
        prompt (`str`):
            The prompt.
        subject (`str`, *optional*):
            The subject, as it is written in the prompt.
        start (`int`, *optional*, defaults to `0`):
            The character from which on it is looked for.

    Returns:
        `list[int]`: Their places, counted from 0, wherever the subject stands; empty where it does not.
    """
    found = [(start + first, start + stop) for first, stop in find_subject(prompt[start:], subject)]
    return tokens_over(tokenizer, prompt, found) if found else []


def tokens_over(tokenizer: PreTrainedTokenizerBase, prompt: str, parts: Sequence[tuple[int, int]]) -> list[int]:
    """Return which tokens of a prompt, as [`encode_prompts`] encodes it, share a character with some parts of it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A fast tokenizer.
        prompt (`str`):
            The prompt.
        parts (`Sequence[tuple[int, int]]`):
            The first character of each part, and the one behind its last.

    Returns:
        `list[int]`: Their places, counted from 0.
    """
    encoded = tokenizer(prompt, truncation=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"][: len(_without_eos(tokenizer, encoded["input_ids"]))]
    return [
        place
        for place, (left, right) in enumerate(offsets)
        if any(left < stop and right > start for start, stop in parts)
    ]


def _without_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    # Some tokenizers end every text with EOS, which would tell the model that the prompt is already answered. One
    # whose BOS is its EOS may begin with it: a text of that token alone is left as it is.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
