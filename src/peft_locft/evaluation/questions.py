"""The questions that judge edits, asked of one model, and the scores of its answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..edits import EditSet
from ..edits.contexts import CONTEXTS, chat_form, in_context
from ..edits.tokens import encode_answers
from .generation import decode_answer, generate_greedy


METRICS = ("reliability", "generalization", "locality", "portability")
# How much of an answer is looked at where the question does not tell: enough to read, few enough to be the answer.
_SHOWN_TOKENS = 8
# How many questions are encoded at a time.
_CHUNK = 1024


@dataclass(frozen=True)
class Question:
    """One question of an evaluation.

    Args:
        edit_id (`str`):
            The edit that it belongs to.
        metric (`str`):
            One of `"reliability"`, `"generalization"`, `"locality"`, `"portability"`.
        prompt (`str`):
            What is asked.
        answer (`str`, *optional*):
            The answer that counts as right; a locality question may have none.
        context (`str`, *optional*, defaults to `"bare"`):
            The context that the prompt stands in, one of `CONTEXTS`.
    """

    edit_id: str
    metric: str
    prompt: str
    answer: str | None
    context: str = "bare"


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question.

    Args:
        text (`str`):
            The generated text up to EOS.
        tokens (`tuple[int, ...]`):
            The generated tokens; for a locality question, as many as are compared.
    """

    text: str
    tokens: tuple[int, ...]


def questions_of(
    edits: EditSet, contexts: Sequence[str] = CONTEXTS[:1], tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Question]:
    """Return all questions of the edits: each prompt, and each rephrase, locality and portability probe.

    Args:
        edits ([`EditSet`]):
            The edits.
        contexts (`Sequence[str]`, *optional*, defaults to `("bare",)`):
            The contexts, of `CONTEXTS`, in each of which every one is asked.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer, for the context `"chat"`.

    Returns:
        `list[Question]`: The questions, in the order of the edits.
    """
    chat = chat_form(tokenizer) if "chat" in contexts else None
    questions = []
    for edit in edits:
        questions.append(Question(edit.id, "reliability", edit.prompt, edit.target))
        questions += [Question(edit.id, "generalization", prompt, edit.target) for prompt in edit.rephrases]
        questions += [Question(edit.id, "locality", probe.prompt, probe.answer) for probe in edit.locality]
        questions += [Question(edit.id, "portability", probe.prompt, probe.answer) for probe in edit.portability]
    return [
        replace(question, prompt=in_context(question.prompt, context, chat), context=context)
        for question in questions
        for context in contexts
    ]


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    description: str | None = None,
    drafts: Sequence[Sequence[int] | None] | None = None,
) -> list[Answer]:
    """Ask a model questions by free, greedy generation.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, as it stands (an adapter that is disabled stays disabled).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        questions (`Sequence[Question]`):
            The questions.
        batch_size (`int`, *optional*, defaults to `32`):
            How many to ask at once.
        description (`str`, *optional*):
            A title for a progress bar; without one there is none.
        drafts (`Sequence[Sequence[int] | None]`, *optional*):
            For each question a guess of the answer's tokens, or `None`: see [`generate_greedy`]. It makes a right guess
            faster, and never another answer.

    Returns:
        `list[Answer]`: One answer for each question.

    Raises:
        `ValueError`: If there are not as many drafts as questions.
    """
    drafts = [None] * len(questions) if drafts is None else drafts
    if len(drafts) != len(questions):
        raise ValueError(f"got {len(drafts)} `drafts` for {len(questions)} questions: give one for each, or `None`")
    # A question that comes several times (one locality probe for many edits) is asked once, with its first draft.
    distinct: dict[tuple[str, str | None, bool], Sequence[int] | None] = {}
    for question, draft in zip(questions, drafts):
        key = _key(question)
        if distinct.get(key) is None:
            distinct[key] = draft
    # One token more than the answer has, to see whether the model ends there. Locality compares just as many tokens
    # as the known answer has: what the model rambles on about after its answer is not what the probe asks.
    limits = [
        (length if answer else _SHOWN_TOKENS) if is_locality else max(length + 1, _SHOWN_TOKENS)
        for length, (_, answer, is_locality) in zip(
            map(len, _expected(tokenizer, [(prompt, answer) for prompt, answer, _ in distinct])), distinct
        )
    ]
    generated = generate_greedy(
        model,
        tokenizer,
        [prompt for prompt, _, _ in distinct],
        limits,
        batch_size=batch_size,
        description=description,
        drafts=list(distinct.values()),
    )
    answers = {
        key: Answer(decode_answer(tokenizer, tokens), tuple(tokens)) for key, tokens in zip(distinct, generated)
    }
    return [answers[_key(question)] for question in questions]


def drafts_of(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], unedited: Sequence[Answer]
) -> list[Sequence[int]]:
    """Guess how an edited model answers: as it should.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        questions (`Sequence[Question]`):
            The questions.
        unedited (`Sequence[Answer]`):
            The unedited model's answers to them.

    Returns:
        `list[Sequence[int]]`: For each question the tokens of its answer and EOS; for a locality question, those of the
        unedited model.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    expected = _expected(tokenizer, [(question.prompt, question.answer) for question in questions])
    return [
        old.tokens if question.metric == "locality" else tokens + end
        for question, tokens, old in zip(questions, expected, unedited)
    ]


def _key(question: Question) -> tuple[str, str | None, bool]:
    return question.prompt, question.answer, question.metric == "locality"


def _expected(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str | None]]) -> Iterator[list[int]]:
    """Yield the tokens of each expected answer, without EOS. Encoded by the chunk, because only they are kept."""
    for begin in range(0, len(pairs), _CHUNK):
        chunk = pairs[begin : begin + _CHUNK]
        encoded = encode_answers(tokenizer, [prompt for prompt, _ in chunk], [answer or "" for _, answer in chunk])
        yield from (tokens for _, tokens in encoded)


def is_correct(question: Question, answer: Answer, unedited: Answer) -> bool:
    """Judge an answer. The text up to EOS has to be the expected answer and nothing else; a locality question has to
    be answered as the unedited model does, token for token.

    Args:
        question (`Question`):
            The question.
        answer (`Answer`):
            The model's answer.
        unedited (`Answer`):
            The unedited model's answer.

    Returns:
        `bool`: Whether it is right.
    """
    if question.metric == "locality":
        return answer.tokens == unedited.tokens
    return " ".join(answer.text.split()) == " ".join(question.answer.split())


def rates(metrics: Iterable[str], correct: Iterable[bool]) -> dict[str, float | None]:
    """Return the share of right answers by metric.

    Args:
        metrics (`Iterable[str]`):
            The metric of each question.
        correct (`Iterable[bool]`):
            Whether its answer is right.

    Returns:
        `dict[str, float | None]`: A fraction for each of the four metrics, `None` where there was no question.
    """
    counts = {metric: [0, 0] for metric in METRICS}
    for metric, right in zip(metrics, correct):
        counts[metric][0] += right
        counts[metric][1] += 1
    return {metric: right / asked if asked else None for metric, (right, asked) in counts.items()}
