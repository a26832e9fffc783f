"""The contexts in which a prompt stands before a model: bare, as a question, in a chat, behind other text."""

from __future__ import annotations

import random
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


CONTEXTS = ("bare", "question", "chat", "prefix")
_PLACE = "{the prompt}"
# Fixed, so that every model and every adapter is asked the same; no adapter is trained on them.
_PREFIXES = (
    "The shop on the corner opens at nine.",
    "It had rained all night, and the streets were still wet.",
    "Add the flour slowly and keep stirring.",
    "Two of the three lifts were out of order.",
    "She closed the book and looked out of the window.",
    "Trains to the coast leave every half hour.",
    "Most of the seats were taken when we came in.",
    "Water the plants twice a week in summer.",
)


def check_contexts(contexts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Refuse contexts in which no prompt can be put.

    Args:
        contexts (`Sequence[str]`):
            The contexts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer, whose chat template `"chat"` needs.

    Raises:
        `ValueError`: If there are none, if one is not of `CONTEXTS` or comes twice, or if the tokenizer has no chat
            template.
    """
    if (
        isinstance(contexts, str)
        or not contexts
        or set(contexts) - set(CONTEXTS)
        or len(set(contexts)) < len(contexts)
    ):
        raise ValueError(
            f"the contexts are {contexts!r}, expected some of {', '.join(map(repr, CONTEXTS))}, each once"
        )
    if "chat" not in contexts or tokenizer is None:
        return
    if tokenizer.chat_template is None:
        raise ValueError(
            "the contexts have 'chat', but the tokenizer has no chat template: leave 'chat' out, or take the tokenizer "
            "of a model for chats"
        )
    chat_form(tokenizer)


def in_context(prompt: str, context: str, chat: str | None = None) -> str:
    """Put a prompt in a context.

    Args:
        prompt (`str`):
            The prompt.
        context (`str`):
            `"bare"`: as it is. `"question"`: behind `Question:` and before `Answer:`. `"chat"`: as a turn of a chat.
            `"prefix"`: behind a sentence that has nothing to do with it, always the same one for the same prompt.
        chat (`str`, *optional*):
            A turn of a chat, of [`chat_form`], for `"chat"`.

    Returns:
        `str`: What the model is asked.
    """
    if context == "question":
        return f"Question: {prompt}\nAnswer:"
    if context == "chat":
        return chat.replace(_PLACE, prompt)
    if context == "prefix":
        return f"{random.Random(prompt).choice(_PREFIXES)} {prompt}"
    return prompt


def chat_form(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return how a turn of a chat is written, with a mark where the prompt stands.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Returns:
        `str` or `None`: `None` if the tokenizer has no template. Some templates write the date: a run keeps what it got.

    Raises:
        `ValueError`: If its template does not take one turn of the user alone.
    """
    if tokenizer.chat_template is None:
        return None
    turn = [{"role": "user", "content": _PLACE}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise ValueError(
            f"the tokenizer's chat template does not take one turn of the user alone ({error}), in which a prompt is put: leave the "
            "context 'chat' out, or set `tokenizer.chat_template` to one that takes it"
        ) from error
    # A template that writes BOS is encoded by a tokenizer that adds it too.
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text
