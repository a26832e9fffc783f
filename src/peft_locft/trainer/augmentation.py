"""One edit in several contexts, so that it holds in other words, and where other text stands before it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..edits import Edit


_QUESTION_ANSWER = "Question: {}\nAnswer:"
_PREFIX_WORDS = (2, 10)


def contexts_of(
    edit: Edit, count: int, prefixes: Sequence[str], tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[str]:
    """Return further forms of an edit's prompt: as a question to be answered, as a turn of a chat if the tokenizer has a
    template for it, and behind random text that the model said (LocFT-BF, appendix on data augmentation).

    Args:
        edit ([`Edit`]):
            The edit.
        count (`int`):
            How many forms beside the bare prompt.
        prefixes (`Sequence[str]`):
            Texts whose beginnings stand before the prompt.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        seed (`int`):
            The seed of the choice among `prefixes`.

    Returns:
        `list[str]`: `count` prompts.
    """
    forms = [_QUESTION_ANSWER.format(edit.prompt)]
    if tokenizer.chat_template is not None:
        forms.append(_chat(edit.prompt, tokenizer))
    choice = random.Random(f"{seed} {edit.id}")
    while len(forms) < count:
        words = choice.choice(prefixes).split()[: choice.randint(*_PREFIX_WORDS)]
        forms.append(f"{' '.join(words)}. {edit.prompt}")
    return forms[:count]


def _chat(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    # A template that writes BOS is encoded by a tokenizer that adds it too.
    return text.removeprefix(tokenizer.bos_token) if _adds_bos(tokenizer) else text


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def drawn_form(edit: int, forms: int, epoch: int, seed: int) -> int:
    """Return which form of an edit an epoch trains: each once, in an order that differs from edit to edit, then anew.

    Args:
        edit (`int`):
            The edit's place.
        forms (`int`):
            How many forms it has.
        epoch (`int`):
            The epoch, from 0.
        seed (`int`):
            The run's seed.

    Returns:
        `int`: From 0 to `forms - 1`; 0 is the bare prompt.
    """
    around, place = divmod(epoch, forms)
    order = list(range(forms))
    random.Random(f"{seed} {edit} {around}").shuffle(order)
    return order[place]
