"""What a model can do beside its edits: perplexity of plain text, and multiple-choice questions.

Both are judged by the probability that the model gives to a known text, unlike the scores of edits, which are generated.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..edits import EditDataError, EditError
from ..edits.tokens import encode_answers, encode_prompts
from ..tuner.messages import cut
from ..tuner.temporary import evaluating, replaced_forwards
from ..tuner.weights import base_of, context_length


# How many logits are held at once: 128 MiB in float32, of which the loss needs about three times as much.
_LOGITS = 2**25
# The question and its numbered answers as they stand in one text (AGI-Edgerunners/LLM-Adapters, `dataset/`).
_INSTRUCTION = re.compile(
    r"Please choose the correct \w+ to the question: (?P<question>.*?)\s*"
    r"\b(?P<label>[A-Z][a-z]+)1: (?P<choices>.*?)\s*[A-Z][a-z]+ format: (?P<names>\S+)\s*",
    re.S,
)


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question.

    Args:
        prompt (`str`):
            What stands before each choice, without a space at its end.
        choices (`tuple[str, ...]`):
            The possible answers, at least two. A list is accepted, and white space around a choice is dropped: one space
            joins prompt and choice.
        answer (`int`):
            The index of the right one, counted from 0.

    Raises:
        `ValueError`: With every fault at once, if a field has the wrong type or value.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self):
        faults = []
        if not isinstance(self.prompt, str) or not self.prompt.strip() or self.prompt != self.prompt.rstrip():
            faults.append(f"`prompt` is {cut(self.prompt)}, expected a text without white space at its end")
        are_texts = isinstance(self.choices, (list, tuple)) and all(
            isinstance(choice, str) and choice.strip() for choice in self.choices
        )
        if not are_texts or len(self.choices) < 2:
            faults.append(f"`choices` is {cut(self.choices)}, expected at least two texts that are not empty")
        elif type(self.answer) is not int or not 0 <= self.answer < len(self.choices):
            faults.append(
                f"`answer` is {cut(self.answer)}, expected the index of one of the choices, 0 to {len(self.choices) - 1}"
            )
        if faults:
            raise EditError(faults)
        object.__setattr__(self, "choices", tuple(choice.strip() for choice in self.choices))


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 512,
    batch_size: int = 8,
) -> float:
    """Return the perplexity of texts: the exponential of the mean negative log-likelihood of their tokens.

    Each text is cut into windows that do not overlap. The first token of a window has nothing before it to be predicted
    from and is not scored; where the tokenizer begins a text with BOS, so does every window, and BOS is that token.
    Every scored token counts the same, whatever its text. So the figure depends on tokenizer and `max_length`: compare a
    model with itself, before and after an edit.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, as it stands (an adapter that is disabled stays disabled). It is in training mode afterwards if it
            was before.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        texts (`Sequence[str]`):
            The texts.
        max_length (`int`, *optional*, defaults to `512`):
            The length of a window in tokens, at least 2. No window is longer than the model's context.
        batch_size (`int`, *optional*, defaults to `8`):
            How many windows to read at once.

    Returns:
        `float`: The perplexity, at least 1; infinity or NaN where the model's logits are.

    Raises:
        `ValueError`: If there is no text, or none of which a token can be scored.
    """
    if isinstance(texts, str) or not len(texts) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`texts` is {cut(texts)}, expected a list of at least one text")
    for name, value, least in (("max_length", max_length, 2), ("batch_size", batch_size, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"`{name}` is {cut(value)}, expected an integer of at least {least}")
    length = min(max_length, _context(model) or max_length)
    rows = [
        _Row(window, 1)
        for ids in encode_prompts(tokenizer, texts)
        for window in _windows(ids, length, tokenizer.bos_token_id)
    ]
    if not rows:
        raise ValueError(
            f"none of the {len(texts)} texts has 2 tokens, and the first token of a text is not scored: give longer texts"
        )
    total = _log_likelihoods(model, rows, batch_size).sum()
    return (-total / sum(len(row.ids) - 1 for row in rows)).exp().item()


def multiple_choice_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Choice],
    *,
    batch_size: int = 32,
) -> float:
    """Return the share of multiple-choice questions whose right answer is the likeliest behind the prompt.

    The score of a choice is the sum of the log-probabilities of its tokens, divided by the number of its characters, so
    that a long answer is not at a disadvantage: `acc_norm` of the [LM Evaluation
    Harness](https://github.com/EleutherAI/lm-evaluation-harness). Of equal scores the first wins.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, as it stands (an adapter that is disabled stays disabled). It is in training mode afterwards if it
            was before.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        questions (`Sequence[Choice]`):
            The questions, at least one.
        batch_size (`int`, *optional*, defaults to `32`):
            How many choices to read at once.

    Returns:
        `float`: A fraction. A question of which a score is NaN counts as wrong.

    Raises:
        `ValueError`: If there is no question, or one does not fit into the model's context.
    """
    if not len(questions) or not all(isinstance(question, Choice) for question in questions):
        raise ValueError(f"`questions` is {cut(questions)}, expected a list of at least one `Choice`")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"`batch_size` is {cut(batch_size)}, expected an integer of at least 1")
    pairs = [(number, choice) for number, question in enumerate(questions) for choice in question.choices]
    encoded = encode_answers(tokenizer, [questions[number].prompt for number, _ in pairs], [text for _, text in pairs])
    # Without anything before it, the first token has no probability.
    rows = [_Row(prompt + answer, max(len(prompt), 1)) for prompt, answer in encoded]
    context = _context(model)
    too_long = [number for (number, _), row in zip(pairs, rows) if context and len(row.ids) > context]
    if too_long:
        raise ValueError(
            f"{len(set(too_long))} of the {len(questions)} questions, number {too_long[0] + 1} first, are longer than the "
            f"{context} tokens of the model's context: leave them out"
        )
    likelihoods = iter(_log_likelihoods(model, rows, batch_size).tolist())
    right = 0
    for question in questions:
        scores = torch.tensor([next(likelihoods) / len(choice) for choice in question.choices], dtype=torch.float64)
        right += int(scores.argmax()) == question.answer and not scores.isnan().any()
    return int(right) / len(questions)


def load_choices(path: str | os.PathLike) -> list[Choice]:
    """Load multiple-choice questions from a JSON file, an array of records.

    A record has `prompt`, `choices` and `answer` (the index of the right choice), or it has the `instruction` and `answer`
    of the ARC and PIQA files of [LLM-Adapters](https://github.com/AGI-Edgerunners/LLM-Adapters). Of these, the choices
    are taken out of the instruction, and the prompt is made as the LM Evaluation Harness asks the same questions:
    `Question: ... Answer:` on two lines.

    Args:
        path (`str` or `os.PathLike`):
            The file.

    Returns:
        `list[Choice]`: The questions, at least one.

    Raises:
        [`EditDataError`]: With every fault and the number of its record, if the file is faulty. Nothing is loaded then.
        `FileNotFoundError`: If the file does not exist.
    """
    path = Path(path)
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise EditDataError(str(path), [f"it is not UTF-8 text: {error}"]) from error
    except json.JSONDecodeError as error:
        raise EditDataError(
            str(path), [f"line {error.lineno}: not JSON: {error.msg} at column {error.colno}"]
        ) from error
    if not isinstance(records, list) or not records:
        raise EditDataError(str(path), [f"it holds {cut(records)}, expected an array of at least one question"])
    questions, faults = [], []
    for number, record in enumerate(records, 1):
        try:
            questions.append(_to_choice(record))
        except EditError as error:
            faults += [f"record {number}: {fault}" for fault in error.faults]
    if faults:
        raise EditDataError(str(path), faults)
    return questions


def _to_choice(record: Any) -> Choice:
    if not isinstance(record, dict):
        raise EditError([f"it is {cut(record)}, expected an object"])
    if {"prompt", "choices", "answer"} <= record.keys():
        return Choice(record["prompt"], record["choices"], record["answer"])
    if not {"instruction", "answer"} <= record.keys():
        raise EditError(
            [f"it has the columns {cut(list(record))}, expected prompt, choices and answer, or instruction and answer"]
        )
    instruction, answer = record["instruction"], record["answer"]
    match = _INSTRUCTION.fullmatch(instruction) if isinstance(instruction, str) else None
    if match is None:
        raise EditError(
            [
                f"`instruction` is {cut(instruction)}, expected 'Please choose the correct answer to the question: ... "
                "Answer1: ... Answer2: ... Answer format: answer1/answer2'"
            ]
        )
    label, names = match["label"], match["names"].split("/")
    # The text and, in turn, the number of each further choice and its text.
    first, *others = re.split(rf"\b{label}(\d+):(?:\s|$)", match["choices"])
    found = [f"{label.lower()}{number}" for number in ("1", *others[::2])]
    faults = []
    if found != names:
        faults.append(f"`instruction` has the choices {cut(found)}, but says that they are {cut(names)}")
    if answer not in names:
        faults.append(f"`answer` is {cut(answer)}, expected one of {cut(names)}")
    if faults:
        raise EditError(faults)
    return Choice(f"Question: {match['question'].strip()}\nAnswer:", (first, *others[1::2]), names.index(answer))


class _Row(NamedTuple):
    ids: list[int]
    first: int  # the first token that is scored, at least 1


def _windows(ids: list[int], length: int, bos: int | None) -> Iterator[list[int]]:
    """Cut a text into windows with at least one token to score."""
    before = ids[:1] if ids and ids[0] == bos else []
    step = length - len(before)
    for begin in range(len(before), len(ids), step):
        window = before + ids[begin : begin + step]
        if len(window) > 1:
            yield window


def _context(model: PreTrainedModel) -> int | None:
    """Return how many tokens the model takes (`None` where its config does not tell)."""
    context = context_length(base_of(model).config)
    return context if isinstance(context, int) and context > 1 else None


@torch.no_grad()
def _log_likelihoods(model: PreTrainedModel, rows: list[_Row], batch_size: int) -> torch.Tensor:
    """Return the summed log-probability of the scored tokens of each row, of shape (rows,), in float64."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(model.active_peft_config).__name__} puts a learned prompt before the text, expected a model whose "
            "adapter changes modules, such as LocFTConfig or LoraConfig"
        )
    sums = torch.zeros(len(rows), dtype=torch.float64)
    # Rows of one length stand together, so that few are padded.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
    with evaluating(model):
        for begin in range(0, len(order), batch_size):
            some = order[begin : begin + batch_size]
            sums[some] = _read(model, [rows[index] for index in some])
    return sums


def _read(model: PreTrainedModel, rows: list[_Row]) -> torch.Tensor:
    """Return the log-likelihood of each row of a batch, of shape (batch,)."""
    lengths = torch.tensor([len(row.ids) for row in rows])[:, None]  # (batch, 1)
    firsts = torch.tensor([row.first for row in rows])[:, None]  # (batch, 1)
    width = int(lengths.max())
    # Padded on the right, behind all that causal attention sees; any token will do, so that it is the row's own.
    ids = torch.tensor([row.ids + row.ids[-1:] * (width - len(row.ids)) for row in rows])  # (batch, width)
    places = torch.arange(width)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": (places < lengths).long().to(model.device)}
    # The positions whose logits are wanted: each predicts the token behind it.
    predicts = (places >= firsts - 1) & (places < lengths - 1)  # (batch, width)
    owners, wanted = predicts.nonzero(as_tuple=True)  # (tokens,) each
    targets = ids[owners, wanted + 1]  # (tokens,)
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for piece, logits in _logits(model, inputs, owners, wanted):
        losses = F.cross_entropy(logits.float(), targets[piece].to(logits.device), reduction="none")  # (piece,)
        sums.index_add_(0, owners[piece], -losses.cpu().double())
    return sums


def _logits(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], owners: torch.Tensor, wanted: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield pieces of the wanted positions, with logits of shape (piece, vocab)."""
    base = base_of(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    size = max(_LOGITS // base.config.get_text_config(decoder=True).vocab_size, 1)
    pieces = [slice(begin, begin + size) for begin in range(0, len(wanted), size)]
    if decoder is base or "logits_to_keep" not in inspect.signature(base.forward).parameters:
        logits = model(**inputs, use_cache=False).logits  # (batch, width, vocab)
        for piece in pieces:
            yield piece, logits[owners[piece].to(logits.device), wanted[piece].to(logits.device)]
        return
    with _runs_once(decoder):
        for piece in pieces:
            # Pieces are cut from positions in the order of a boolean mask: row by row.
            mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)  # (batch, width)
            mask[owners[piece].to(mask.device), wanted[piece].to(mask.device)] = True
            yield piece, model(**inputs, use_cache=False, logits_to_keep=mask).logits.flatten(0, -2)


@contextmanager
def _runs_once(decoder: nn.Module) -> Iterator[None]:
    """Let the layers below the head run in the first forward pass only, and give the same output in the following ones.

    So the model itself makes the logits of each piece, with its own scaling and soft-capping.
    """
    own = decoder.forward
    outputs: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(own(*args, **kwargs))
        return outputs[0]

    with replaced_forwards({decoder: forward}):
        yield
