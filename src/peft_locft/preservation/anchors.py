"""What the unedited model says to questions and in texts, which the edited one is held to by a KL term.

The divergence is that from the unedited to the edited model, as in the KL term of ROME's constrained baselines (arXiv
2202.05262, appendix on baselines) and in learning without forgetting (arXiv 1606.09282). What the unedited model says is
stored once: its most probable tokens one by one, and all others as one, so that a large vocabulary takes no room. A
divergence between distributions whose outcomes were joined is never larger than the one between the whole ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..edits.tokens import encode_prompts
from ..evaluation import generate_greedy
from ..tuner.temporary import evaluating
from .statistics import padded, save_whole


_KEPT = 64
_BATCH = 16


class Anchor(NamedTuple):
    """A sequence of tokens, and what the unedited model says at some of them.

    Args:
        input_ids (`list[int]`):
            The tokens.
        first (`int`):
            The first position whose next token is said. All from there to the last but one are.
        tokens (`torch.Tensor`):
            The most probable next tokens at these positions, of shape (positions, kept), in int32.
        log_probs (`torch.Tensor`):
            Their log probabilities, of the same shape, in float16.
    """

    input_ids: list[int]
    first: int
    tokens: torch.Tensor
    log_probs: torch.Tensor


@torch.no_grad()
def make_anchors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    answer_length: int,
    text_length: int,
    max_length: int | None = None,
) -> list[Anchor]:
    """Ask the unedited model what it says.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The unedited model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`Sequence[str]`):
            Questions, which it answers greedily. It is held to what it says in its answer, and to where that ends.
        texts (`Sequence[str]`):
            Texts, at every token of which it is held to what it says next.
        answer_length (`int`):
            How many tokens of an answer are looked at.
        text_length (`int`):
            How many tokens of a text are looked at.
        max_length (`int`, *optional*):
            The longest sequence that the model takes, in tokens. Questions that are longer with their answer are left
            out, and texts are cut.

    Returns:
        `list[Anchor]`: One for each question and text, in their order.
    """
    asked = [
        (prompt, ids)
        for prompt, ids in zip(prompts, encode_prompts(tokenizer, prompts))
        if ids and len(ids) + answer_length <= (max_length or math.inf)
    ]
    answers = generate_greedy(model, tokenizer, [prompt for prompt, _ in asked], [answer_length] * len(asked))
    sequences = [(ids + answer, len(ids) - 1) for (_, ids), answer in zip(asked, answers)]
    text_length = min(text_length, max_length or text_length)
    sequences += [(ids[:text_length], 0) for ids in encode_prompts(tokenizer, texts) if len(ids) > 1]
    anchors: list[Anchor | None] = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number][0]))
    with evaluating(model):
        for begin in range(0, len(order), _BATCH):
            chosen = order[begin : begin + _BATCH]
            ids, mask = padded([sequences[number][0] for number in chosen], model.device)
            said = torch.zeros_like(mask, dtype=torch.bool)
            for row, number in enumerate(chosen):
                sequence, first = sequences[number]
                said[row, first : len(sequence) - 1] = True
            states = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[said].float()
            log_probs, tokens = states.log_softmax(-1).topk(min(_KEPT, states.shape[-1] - 1))
            parts = said.sum(1).tolist()
            for number, some, probable in zip(chosen, log_probs.split(parts), tokens.split(parts)):
                sequence, first = sequences[number]
                anchors[number] = Anchor(sequence, first, probable.int().cpu(), some.half().cpu())
    return anchors


def save_anchors(anchors: Sequence[Anchor], path: Path, key: str) -> None:
    """Write anchors into a file, because asking for them takes minutes.

    Args:
        anchors (`Sequence[Anchor]`):
            The anchors, at least one.
        path (`Path`):
            The file.
        key (`str`):
            Tells what was asked from all else.
    """
    numbers = [(len(anchor.input_ids), anchor.first, len(anchor.tokens)) for anchor in anchors]
    tensors = {
        "numbers": torch.tensor(numbers, dtype=torch.int32),
        "input_ids": torch.tensor([token for anchor in anchors for token in anchor.input_ids], dtype=torch.int32),
        "tokens": torch.cat([anchor.tokens for anchor in anchors]),  # (positions of all, kept)
        "log_probs": torch.cat([anchor.log_probs for anchor in anchors]),
    }
    save_whole(tensors, path, {"key": key})


def load_anchors(path: Path, key: str) -> list[Anchor] | None:
    """Read anchors from a file.

    Args:
        path (`Path`):
            The file.
        key (`str`):
            As it was written with.

    Returns:
        `list[Anchor]` or `None`: The anchors; `None` if there is no such file, or of another key.
    """
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("key") != key:
            return None
        numbers, input_ids, tokens, log_probs = map(file.get_tensor, ("numbers", "input_ids", "tokens", "log_probs"))
    lengths, firsts, positions = numbers.T.tolist()
    parts = input_ids.split(lengths), firsts, tokens.split(positions), log_probs.split(positions)
    return [Anchor(ids.tolist(), first, told, probable) for ids, first, told, probable in zip(*parts)]


def divergence(
    logits: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor, owners: torch.Tensor
) -> torch.Tensor:
    """Return the mean KL divergence from what the unedited model said. A sequence counts as much as any other, however many
    of its positions are looked at: or else the answers to questions would be lost among long texts.

    Args:
        logits (`torch.Tensor`):
            The edited model's, of shape (positions, vocabulary).
        tokens (`torch.Tensor`):
            The unedited model's most probable tokens, of shape (positions, kept).
        log_probs (`torch.Tensor`):
            Their log probabilities, of the same shape.
        owners (`torch.Tensor`):
            Which sequence a position belongs to, of shape (positions,).

    Returns:
        `torch.Tensor`: A scalar, in nats for each position.
    """
    old = log_probs.float()
    new = logits.float().log_softmax(-1).gather(-1, tokens.long())  # (positions, kept)
    kept = (old.exp() * (old - new)).sum(-1)
    old_rest, new_rest = (_log_rest(some) for some in (old, new))
    moved = kept + old_rest.exp() * (old_rest - new_rest)  # (positions,)
    _, owners, counts = owners.unique(return_inverse=True, return_counts=True)
    return (moved / counts[owners]).sum() / len(counts)


def _log_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Return the log probability of all that is not kept."""
    return torch.log((1 - log_probs.exp().sum(-1)).clamp(min=1e-6))
