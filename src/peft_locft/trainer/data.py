"""From edits to batches: tokens, labels on the target only, padding on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..edits import EditDataError, EditSet
from ..edits.tokens import encode_answers


IGNORED = -100


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
        [`~datasets.Dataset`]: With the columns `index`, `input_ids` and `labels`, one row an edit, in order.

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
    rows, faults = [], []
    encoded = encode_answers(tokenizer, [edit.prompt for edit in edits], [edit.target for edit in edits])
    for number, (edit, (prompt_ids, target_ids)) in enumerate(zip(edits, encoded), 1):
        place = f"edit {number} ({edit.id})"
        length = len(prompt_ids) + len(target_ids) + 1  # and EOS
        if not target_ids:
            faults.append(f"{place}: the tokenizer turns its target {edit.target!r} into no tokens: nothing to learn")
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
            row = {"index": number - 1, "input_ids": prompt_ids + labels[len(prompt_ids) :], "labels": labels}
            rows.append(row)
    if faults:
        raise EditDataError("the edits as this model's tokenizer encodes them", faults)
    return Dataset.from_list(rows)


class EditCollator:
    """Pad edits on the right to the longest of the batch. Pads are masked, so no pad token has to be added.

    Args:
        pad_token_id (`int`):
            What stands in the padding; any token will do.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[int], fill: int) -> list[int]:
            return values + [fill] * (width - len(values))

        batch = {  # each (batch, width)
            "input_ids": torch.tensor([padded(row["input_ids"], self.pad_token_id) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor([padded(row["labels"], IGNORED) for row in rows]),
        }
        if "index" in rows[0]:
            batch["index"] = torch.tensor([row["index"] for row in rows])  # (batch,)
        return batch
