"""Causal tracing: which states of a model carry a fact from its subject to the answer."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..edits import Edit, load_edits
from ..edits.tokens import encode_answers, load_tokenizer, subject_places
from ..tuner.temporary import evaluating
from ..tuner.weights import base_of
from .facts import ROLES, Fact, read_fact, roles_of
from .sites import KINDS
from .tracer import Tracer
from .tracing_results import TracingResults


NO_SUBJECT = "no subject"
NOT_IN_PROMPT = "subject not in the prompt"
NO_TOKEN = "no token of the prompt stands for the subject"
TOO_LONG = "prompt longer than the model's context"
NOT_KNOWN = "answer not known to the model"
NOT_LOWERED = "noise does not lower the answer's probability"


@dataclass(frozen=True, eq=False)
class Trace:
    """The causal trace of one fact.

    Args:
        tokens (`tuple[str, ...]`):
            The tokens of the prompt, as text.
        subject (`tuple[int, int]`):
            The first token of the subject, and the one behind its last.
        answer (`str`):
            The first token of the answer, as text.
        known (`bool`):
            Whether the model itself continues the prompt with that token.
        clean_probability (`float`):
            The probability of that token.
        corrupted_probability (`float`):
            Its mean probability over the corrupted runs.
        effects (`dict[str, torch.Tensor]`):
            The indirect effects, of shape (tokens, layers): of restoring a layer's output (`"states"`), or a window of
            MLPs (`"mlp"`) or attentions (`"attention"`) around a layer.
    """

    tokens: tuple[str, ...]
    subject: tuple[int, int]
    answer: str
    known: bool
    clean_probability: float
    corrupted_probability: float
    effects: dict[str, torch.Tensor]

    @property
    def roles(self) -> list[str | None]:
        """The role of each token, `None` before the subject (`list[str | None]`)."""
        return roles_of(len(self.tokens), *self.subject)


def trace(
    model: PreTrainedModel | PeftModel,
    prompt: str,
    subject: str,
    answer: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    noise: float | None = None,
    copies: int = 10,
    window: int = 10,
    batch_size: int = 250,
    seed: int = 0,
) -> Trace:
    """Trace one fact: the indirect effect of every token and layer on the model's answer.

    The subject's embeddings are corrupted by noise, so that the model no longer answers as it did. Then one state at a
    time is restored to its clean value. The indirect effect is the answer's probability with the state restored, less
    that without, each a mean over the corrupted runs (ROME, [arXiv 2202.05262](https://arxiv.org/abs/2202.05262),
    section 2.1; the windows are of its appendix). It shows where a fact passes by, and is no proof of where to edit
    ([arXiv 2301.04213](https://arxiv.org/abs/2301.04213)).

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A decoder of transformers, with what its active adapters put into it.
        prompt (`str`):
            The prompt.
        subject (`str`):
            What the fact is about, as it is written in the prompt. Of several occurrences the first is corrupted.
        answer (`str`, *optional*):
            The answer whose first token is looked at. Defaults to what the model itself says next.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The model's fast tokenizer. Defaults to that of the folder or repository that the model was loaded from.
        noise (`float`, *optional*):
            The standard deviation of the noise. Defaults to three times that of the subject's embeddings.
        copies (`int`, *optional*, defaults to `10`):
            How many corrupted runs there are, each with its own noise.
        window (`int`, *optional*, defaults to `10`):
            How many layers of MLPs or attentions are restored together; the paper's number, for a model of 48 layers.
        batch_size (`int`, *optional*, defaults to `250`):
            How many rows to compute at once: `batch_size // copies` restored states.
        seed (`int`, *optional*, defaults to `0`):
            What the noise depends on.

    Returns:
        [`Trace`]: The effects.

    Raises:
        `ValueError`: If the subject does not occur in the prompt, the answer has no token, the tokenizer is missing or
            not fast, a number is out of range, the prompt is longer than the model's context, or the model's layers are not
            found.
    """
    tokenizer = load_tokenizer(base_of(model)) if tokenizer is None else tokenizer
    tracer = _tracer(model, noise, copies, window, batch_size, seed)
    fact = read_fact(tokenizer, prompt, subject)
    if len(fact.tokens) > tracer.context:
        raise ValueError(
            f"the prompt has {len(fact.tokens)} tokens, expected at most the {tracer.context} of the model's context: give a "
            "shorter one"
        )
    wanted = None
    if answer is not None:
        wanted = _first_token(tokenizer, prompt, answer)
        if wanted is None:
            raise ValueError(f"the answer {answer!r} has no token: give some text, or leave it out")
    with evaluating(tracer.base), torch.no_grad():
        runs = tracer.run(fact, tracer.noise_scale([fact]) if noise is None else noise)
        said = int(runs.logits[0].argmax())
        wanted = said if wanted is None else wanted
        clean, corrupted = runs.probabilities(wanted)
        effects = tracer.effects(runs, wanted)
    return Trace(
        tokens=tuple(tokenizer.decode([token]) for token in fact.tokens),
        subject=(fact.begin, fact.end),
        answer=tokenizer.decode([wanted]),
        known=wanted == said,
        clean_probability=clean,
        corrupted_probability=corrupted,
        effects=effects,
    )


def trace_edits(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Iterable[Edit] | str | os.PathLike,
    *,
    answers: str = "model",
    noise: float | None = None,
    copies: int = 10,
    window: int = 10,
    batch_size: int = 250,
    seed: int = 0,
    kinds: Collection[str] = KINDS,
    roles: Collection[str] = ROLES,
    show_progress: bool = True,
) -> TracingResults:
    """Trace many facts, and average their indirect effects by the role of the token.

    Facts are left out, and counted, if they have no subject or one that is not in the prompt or has no token there, if the
    prompt is longer than the model's context, if the model does not know them, and if the noise does not make their answers
    less probable.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A decoder of transformers, with what its active adapters put into it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its fast tokenizer.
        edits (`Iterable[Edit]`, `str` or `os.PathLike`):
            The facts: edits with a subject, such as an [`EditSet`], or the file that [`load_edits`] reads them from.
        answers (`str`, *optional*, defaults to `"model"`):
            `"model"`: what the model itself says next, right or wrong, is traced, because the target of an edit is
            what it does not know yet. `"target"`: the targets are true facts, and those are traced that the model
            knows, which means that it says the target's first token next.
        noise (`float`, *optional*):
            The standard deviation of the noise. Defaults to three times that of the embeddings of all subjects.
        copies (`int`, *optional*, defaults to `10`):
            How many corrupted runs a fact has, each with its own noise.
        window (`int`, *optional*, defaults to `10`):
            How many layers of MLPs or attentions are restored together; the paper's number, for a model of 48 layers.
        batch_size (`int`, *optional*, defaults to `250`):
            How many rows to compute at once: `batch_size // copies` restored states.
        seed (`int`, *optional*, defaults to `0`):
            What the noise depends on.
        kinds (`Collection[str]`, *optional*, defaults to all):
            What is restored: `"states"`, `"mlp"`, `"attention"`. What is not named takes no time, and has no results.
        roles (`Collection[str]`, *optional*, defaults to all):
            The roles of the tokens at which it is restored, such as `"last subject token"`. Those of the others are not a
            number.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`TracingResults`]: The averages, and one row a fact.

    Raises:
        `ValueError`: If no fact is left to trace, if `answers`, a kind or a role is none of these, or as [`trace`].
    """
    if answers not in ("model", "target"):
        raise ValueError(f"`answers` is {answers!r}, expected 'model' or 'target'")
    for name, given, known in (("kinds", kinds, KINDS), ("roles", roles, ROLES)):
        if isinstance(given, str) or not given or not set(given) <= set(known):
            raise ValueError(f"`{name}` is {given!r}, expected one or more of {list(known)} in a list")
    if isinstance(edits, (str, os.PathLike)):
        edits = load_edits(edits, on_conflict="first")  # two answers to one prompt are one fact to trace
    tracer = _tracer(model, noise, copies, window, batch_size, seed, kinds, roles)
    rows, facts = [], []
    for edit in edits:
        fact, reason = None, NO_SUBJECT
        if edit.subject and edit.subject.strip():
            reason = None if edit.subject.strip() in edit.prompt else NOT_IN_PROMPT
            if reason is None and tokenizer.is_fast and not subject_places(tokenizer, edit.prompt, edit.subject):
                reason = NO_TOKEN
            fact = read_fact(tokenizer, edit.prompt, edit.subject) if reason is None else None
            if fact is not None and len(fact.tokens) > tracer.context:
                fact, reason = None, TOO_LONG
        wanted = _first_token(tokenizer, edit.prompt, edit.target) if answers == "target" else None
        rows.append(_row(edit, reason))
        facts.append((fact, wanted))
    known = [fact for fact, _ in facts if fact is not None]
    averages = _Averages(tracer)
    with evaluating(tracer.base), torch.no_grad():
        if known and noise is None:
            noise = tracer.noise_scale(known)
        for row, (fact, wanted) in zip(tqdm(rows, desc="Tracing", disable=not show_progress), facts):
            if fact is not None:
                _trace_row(tracer, tokenizer, row, fact, wanted, answers, noise, averages)
    if not any(row["left_out"] is None for row in rows):
        counts = TracingResults({}, {}, rows, {}).left_out
        raise ValueError(
            f"none of the {len(rows)} facts can be traced: "
            + (", ".join(f"{count} have the reason '{reason}'" for reason, count in counts.items()) or "got no fact")
            + ". Give facts whose subject stands in the prompt, and which the model knows, or more `noise`"
        )
    settings = {
        "model": getattr(tracer.base.config, "_name_or_path", "") or type(tracer.base).__name__,
        "answers": answers,
        "noise": noise,
        "copies": copies,
        "window": window,
        "seed": seed,
    }
    return TracingResults(averages.effects(), averages.tokens, rows, settings)


class _Averages:
    """Sums of effects by role, so that no fact's own effects have to be kept."""

    def __init__(self, tracer: Tracer):
        shape = (len(ROLES), tracer.num_layers)
        self.roles = tracer.roles
        self.sums = {kind: torch.zeros(shape, dtype=torch.float64) for kind in tracer.kinds}
        self.tokens = dict.fromkeys(ROLES, 0)

    def add(self, fact: Fact, effects: dict[str, torch.Tensor]) -> None:
        for token, role in enumerate(roles_of(len(fact.tokens), fact.begin, fact.end)):
            if role in self.roles:
                self.tokens[role] += 1
                for kind, values in effects.items():
                    self.sums[kind][ROLES.index(role)] += values[token]

    def effects(self) -> dict[str, torch.Tensor]:
        counts = torch.tensor(list(self.tokens.values()), dtype=torch.float64)[:, None]  # (roles, 1)
        return {kind: sums / counts for kind, sums in self.sums.items()}  # not a number where no token has the role


def _trace_row(
    tracer: Tracer,
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    fact: Fact,
    wanted: int | None,
    answers: str,
    noise: float,
    averages: _Averages,
) -> None:
    runs = tracer.run(fact, noise)
    said = int(runs.logits[0].argmax())
    row["answer"] = tokenizer.decode([said])
    row["clean"], row["corrupted"] = runs.probabilities(said)
    if answers == "target" and wanted != said:
        row["left_out"] = NOT_KNOWN
    elif not row["corrupted"] < row["clean"]:
        row["left_out"] = NOT_LOWERED
    else:
        averages.add(fact, tracer.effects(runs, said))


def _row(edit: Edit, reason: str | None) -> dict[str, Any]:
    row = {"id": edit.id, "prompt": edit.prompt, "subject": edit.subject}
    return {**row, "answer": None, "clean": None, "corrupted": None, "left_out": reason}


def _tracer(
    model: PreTrainedModel | PeftModel,
    noise: float | None,
    copies: int,
    window: int,
    batch_size: int,
    seed: int,
    kinds: Collection[str] = KINDS,
    roles: Collection[str] = ROLES,
) -> Tracer:
    if noise is not None and not (noise > 0 and math.isfinite(noise)):
        raise ValueError(f"`noise` is {noise}, expected a standard deviation above 0, or None for the default")
    return Tracer(model, copies, window, batch_size, seed, kinds, roles)


def _first_token(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> int | None:
    ((_, tokens),) = encode_answers(tokenizer, [prompt], [answer.strip()])
    return tokens[0] if answer.strip() and tokens else None
