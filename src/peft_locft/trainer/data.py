"""From edits to tokens, with labels on the target only."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..edits import Edit, EditDataError, EditSet
from ..edits.rows import CHUNK, write_rows
from ..edits.tokens import encode_answers


IGNORED = -100
_FEATURES = Features({"index": Value("int64"), "input_ids": List(Value("int32")), "labels": List(Value("int32"))})


def tokenize_edits(edits: EditSet, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """Encode each edit as prompt, space, target and EOS, with labels on target and EOS.

    Args:
        edits ([`EditSet`]):
            The edits.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer; it needs an EOS token.
        max_length (`int`, *optional*):
            The longest sequence that the model takes, in tokens.

    Returns:
        [`~datasets.Dataset`]: With the columns `index`, `input_ids` and `labels`, one row an edit, in order; memory-mapped.

    Raises:
        [`EditDataError`]: Naming every edit that is too long or whose target has no tokens.
        `ValueError`: If the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no EOS token, which every target has to end with, or else "
            "the edited model would not know where its answer ends: set `tokenizer.eos_token` and pass the tokenizer "
            "as `processing_class`"
        )
    faults: list[str] = []

    def rows() -> Iterator[dict]:
        for number, (edit, prompt_ids, target_ids) in enumerate(_encoded(edits, tokenizer), 1):
            place = f"edit {number} ({edit.id})"
            length = len(prompt_ids) + len(target_ids) + 1  # and EOS
            if not target_ids:
                faults.append(
                    f"{place}: the tokenizer turns its target {edit.target!r} into no tokens: nothing to learn"
                )
            elif max_length is not None and len(prompt_ids) >= max_length:
                faults.append(
                    f"{place}: its prompt alone has {len(prompt_ids)} tokens, which leaves nothing of the target to learn "
                    f"within the {max_length} tokens that `max_length`, the tokenizer and the model's context allow: shorten "
                    "the prompt"
                )
            elif max_length is not None and length > max_length:
                faults.append(
                    f"{place}: it has {length} tokens with EOS, expected at most the {max_length} that `max_length`, the "
                    "tokenizer and the model's context allow: shorten it"
                )
            else:
                labels = [IGNORED] * len(prompt_ids) + target_ids + [tokenizer.eos_token_id]
                yield {"index": number - 1, "input_ids": prompt_ids + labels[len(prompt_ids) :], "labels": labels}

    data = write_rows(rows(), _FEATURES)
    if faults:
        raise EditDataError("the edits as this model's tokenizer encodes them", faults)
    return data


def _encoded(edits: EditSet, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Edit, list[int], list[int]]]:
    """Yield each edit with the tokens of its prompt and of its target, encoded by the chunk."""
    remaining = iter(edits)
    while chunk := list(islice(remaining, CHUNK)):
        pairs = encode_answers(tokenizer, [edit.prompt for edit in chunk], [edit.target for edit in chunk])
        yield from ((edit, *pair) for edit, pair in zip(chunk, pairs))
