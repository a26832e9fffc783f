"""A fact as tokens: where its subject stands, and what role each token has."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..edits.tokens import encode_prompts, find_subject, tokens_over


# ROME (arXiv 2202.05262), figure 2: the roles over which effects are averaged.
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)


class Fact(NamedTuple):
    """A prompt and the place of its subject.

    Args:
        tokens (`list[int]`):
            The tokens of the prompt.
        begin (`int`):
            The first token of the subject.
        end (`int`):
            The token behind its last one.
    """

    tokens: list[int]
    begin: int
    end: int


def read_fact(tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str) -> Fact:
    """Encode a prompt, and find the tokens of its subject by their characters.

    A token belongs to the subject if it shares a character with it. Of several occurrences the first counts, and those as
    words of their own come before those inside of others.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A fast tokenizer.
        prompt (`str`):
            The prompt.
        subject (`str`):
            The subject, as it is written in the prompt.

    Returns:
        [`Fact`]: The tokens.

    Raises:
        `ValueError`: If the tokenizer is not fast, or if the subject is not in the prompt or has no token of its own.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, which is needed to tell the characters of each token: "
            "load one with `AutoTokenizer.from_pretrained`"
        )
    found = find_subject(prompt, subject)
    if not found:
        raise ValueError(
            f"the subject {subject!r} does not occur in the prompt {prompt!r}: write it as it stands in the prompt, "
            "upper and lower case included"
        )
    (tokens,) = encode_prompts(tokenizer, [prompt])
    inside = tokens_over(tokenizer, prompt, found[:1])
    if not inside:
        raise ValueError(
            f"no token of the prompt {prompt!r} stands for the subject {subject!r}, which the tokenizer drops: "
            "give another subject"
        )
    return Fact(tokens, inside[0], inside[-1] + 1)


def roles_of(length: int, begin: int, end: int) -> list[str | None]:
    """Return the role of each token.

    Each has one role. The token of a subject of one token is the last subject token. A single token behind the subject
    is the last token; a subject at the end of the prompt keeps its roles.

    Args:
        length (`int`):
            The number of tokens in the prompt.
        begin (`int`):
            The first token of the subject.
        end (`int`):
            The token behind its last one.

    Returns:
        `list[str | None]`: One of [`ROLES`] for each token; `None` before the subject, where effects are zero.
    """
    first, middle, last, subsequent, further, final = ROLES
    roles: list[str | None] = [None] * begin
    roles += [first, *[middle] * (end - begin - 2)] if end - begin > 1 else []
    roles.append(last)
    after = length - end
    roles += [subsequent, *[further] * (after - 2)] if after > 1 else []
    return [*roles, final] if after else roles
