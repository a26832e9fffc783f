"""How long edits are, in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ..tuner.weights import context_length


class Lengths(NamedTuple):
    """The lengths of edits.

    Args:
        tokens (`tuple[int, ...]`):
            How many tokens each edit has, with target and EOS.
        targets (`tuple[int, ...]`):
            How many of them are target and EOS.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def total(self) -> int:
        """The tokens of all edits (`int`)."""
        return sum(self.tokens)

    @property
    def longest(self) -> int:
        """The length of the longest edit (`int`)."""
        return max(self.tokens)

    @property
    def mean(self) -> int:
        """The mean length, rounded up (`int`)."""
        return math.ceil(self.total / len(self.tokens))

    @property
    def longest_prompt(self) -> int:
        """The length of the longest prompt (`int`)."""
        return max(tokens - targets for tokens, targets in zip(self.tokens, self.targets))

    @property
    def most_targets(self) -> int:
        """The most tokens that an edit learns (`int`)."""
        return max(self.targets)

    @property
    def mean_targets(self) -> int:
        """The mean number of tokens that an edit learns, rounded up (`int`)."""
        return math.ceil(sum(self.targets) / len(self.targets))

    def largest_batch(self, size: int) -> tuple[int, int]:
        """Return how long the edits of the largest batch are that shuffling can make.

        Args:
            size (`int`):
                How many edits make a batch.

        Returns:
            `tuple[int, int]`: The means, rounded up, of the most tokens and of the most targets that edits have.
        """
        means = [sum(sorted(values)[-size:]) / size for values in self]
        return math.ceil(means[0]), math.ceil(means[1])

    def check_context(self, config: PreTrainedConfig) -> None:
        """Refuse edits that are longer than a model's context.

        Args:
            config ([`~transformers.PreTrainedConfig`]):
                The model's config.

        Raises:
            `ValueError`: If one is.
        """
        context = context_length(config)
        if context and self.longest > context:
            raise ValueError(
                f"the longest edit has {self.longest} tokens, expected at most the {context} of the model's context: "
                "shorten it"
            )


def edit_lengths(num_edits: int, tokens: int | Sequence[int], targets: int | Sequence[int]) -> Lengths:
    """Check how many edits there are and how long they are.

    Args:
        num_edits (`int`):
            How many edits there are.
        tokens (`int` or `Sequence[int]`):
            How many tokens each has, with target and EOS.
        targets (`int` or `Sequence[int]`):
            How many of these are target and EOS.

    Returns:
        [`Lengths`]: The lengths, one for each edit.

    Raises:
        `ValueError`: If there are no edits, or the numbers do not fit together.
    """
    if not _is_count(num_edits):
        raise ValueError(f"`num_edits` is {num_edits!r}, expected at least 1: how many edits there are")
    lengths = Lengths(_each("tokens_per_edit", tokens, num_edits), _each("target_tokens", targets, num_edits))
    for length, target in zip(*lengths):
        if target >= length:
            raise ValueError(
                f"`target_tokens` is {target} for an edit of {length} tokens, expected at most {length - 1}: target and "
                "EOS are a part of `tokens_per_edit`, and so is the prompt, of at least one token"
            )
    return lengths


def _each(name: str, value: int | Sequence[int], num_edits: int) -> tuple[int, ...]:
    values = (value,) * num_edits if isinstance(value, int) else tuple(value)
    if len(values) != num_edits:
        raise ValueError(
            f"`{name}` has {len(values)} numbers for {num_edits} edits, expected one for each, or one for all"
        )
    faulty = next((one for one in values if not _is_count(one)), None)
    if faulty is not None:
        raise ValueError(f"`{name}` is {faulty!r}, expected at least 1 token")
    return values


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
