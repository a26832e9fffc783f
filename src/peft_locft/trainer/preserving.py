"""What a run needs beside its edits to leave the rest of the model alone, and to make edits hold in other words."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..edits import EditSet, write_atomically
from ..edits.contexts import chat_form
from ..preservation import (
    STATISTICS_NAME,
    Anchor,
    Delta,
    Focus,
    InputStatistics,
    LimitCallback,
    Projection,
    input_statistics,
    make_anchors,
    sample_questions,
    sample_statements,
    sample_texts,
    squared_norm,
    trained_deltas,
)
from ..tuner.temporary import unedited
from .augmentation import every_way, is_question, varied
from .config import EditConfig
from .forms import make_forms
from .neighbours import neighbours
from .pool import TrainingPool
from .precision import multiplies_bfloat16, rounded


FOLDER_NAME = "preservation"
_SAMPLES_NAME = "samples.json"
_PROMPTS, _TEXTS, _TEXT_TOKENS = 1000, 512, 128
# Where all edits are beginnings of sentences, a third of the prompts are others that the model makes up, and a third the
# edits' own about others. The rest stay questions.
_STATEMENTS, _NEIGHBOURS = 1 / 3, 1 / 3
_ANSWER_TOKENS, _ANCHOR_TOKENS = 8, 32
_MOST = 1000
# What the unedited model says, where several adapters of one model are trained; empty until the first one is.
_SHARED_ANCHORS: ContextVar[list[Anchor] | None] = ContextVar("_SHARED_ANCHORS", default=None)


@dataclass
class Preservation:
    """What beside the edits' loss a run is trained by.

    Args:
        pool ([`TrainingPool`]):
            All sequences.
        deltas (`list[Delta]`):
            What is trained, if a term depends on it.
        projection ([`Projection`], *optional*):
            The projectors that deltas are trained behind.
        kl_weight (`float`):
            How much a nat of divergence counts.
        l2_weight (`float`):
            How much the relative size of the deltas counts.
        focus ([`Focus`], *optional*):
            What lets deltas learn from subjects.
    """

    pool: TrainingPool
    deltas: list[Delta]
    projection: Projection | None
    kl_weight: float
    l2_weight: float
    focus: Focus | None = None

    def terms(self, divergence: torch.Tensor | None) -> torch.Tensor | float:
        """Return what is added to a batch's mean loss.

        Args:
            divergence (`torch.Tensor`, *optional*):
                How far the model has moved from what is preserved.

        Returns:
            `torch.Tensor` or `float`: A scalar, 0 where all terms are off.
        """
        terms = self.kl_weight * divergence if divergence is not None else 0.0
        return terms + self.l2_weight * squared_norm(self.deltas) if self.l2_weight else terms


@contextmanager
def preserving(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: EditSet,
    bare: Dataset,
    args: EditConfig,
    max_length: int | None,
    add_callback: Callable,
    remove_callback: Callable,
) -> Iterator[Preservation]:
    """Prepare what the arguments ask for. Within this context, it is in force.

    Args:
        model ([`~peft.PeftModel`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        edits ([`EditSet`]):
            The edits.
        bare ([`~datasets.Dataset`]):
            The tokens of their bare prompts.
        args ([`EditConfig`]):
            The training arguments.
        max_length (`int`, *optional*):
            The longest sequence that the model takes, in tokens.
        add_callback (`Callable`):
            The trainer's.
        remove_callback (`Callable`):
            The trainer's.

    Returns:
        [`Preservation`]: What is in force.
    """
    deltas: list[Delta] = []
    if asked := [
        name for name in ("projector", "subject_focus", "l2_weight", "max_delta", "max_growth") if getattr(args, name)
    ]:
        deltas = trained_deltas(model, asked[0])  # first, because all else takes minutes
    folder = Path(args.output_dir) / FOLDER_NAME
    samples = _Samples(model, tokenizer, edits, args, folder)
    focus = Focus(deltas) if args.subject_focus else None
    projection = None
    if args.projector:
        statistics = _statistics(model, tokenizer, deltas, samples, args, folder)
        projection = Projection(deltas, statistics, args.projector, focus.linear if focus else F.linear)
    prefixes = samples.texts if args.contexts else []
    chat = samples.chat if args.contexts else None
    forms = make_forms(edits, args.contexts, prefixes, chat, tokenizer, max_length, args.seed, focus is not None)
    anchors = _anchors(model, tokenizer, samples, max_length, args.seed) if args.kl_weight else []
    pool = TrainingPool(bare, forms, anchors, args.seed)
    if args.max_steps <= 0 and args.num_train_epochs < pool.most_forms:
        warnings.warn(
            f"an edit has up to {pool.most_forms} forms, of which each of the {args.num_train_epochs:g} epochs trains one, so that "
            "some bare prompts are never trained: give more `num_train_epochs`, or fewer `contexts` or `train_rephrases`",
            stacklevel=2,
        )
    with ExitStack() as stack:
        if projection is not None:
            stack.enter_context(projection.applied())
        if focus is not None:
            behind = {delta.entrance() for delta in deltas} if projection is not None else ()
            stack.enter_context(focus.applied(behind))
        if args.max_delta or args.max_growth:
            limits = LimitCallback(deltas, args.max_delta, args.max_growth)
            add_callback(limits)
            stack.callback(remove_callback, limits)
        yield Preservation(pool, deltas, projection, args.kl_weight, args.l2_weight, focus)


@contextmanager
def shared_anchors() -> Iterator[None]:
    """Within this context, one model is trained at several places with the same arguments, and asked once what it says."""
    token = _SHARED_ANCHORS.set([])
    try:
        yield
    finally:
        _SHARED_ANCHORS.reset(token)


def forget_samples(args: EditConfig) -> None:
    """Delete what a run that was not resumed left, which may have been of another model; not what the arguments name."""
    folder = Path(args.output_dir) / FOLDER_NAME
    (folder / _SAMPLES_NAME).unlink(missing_ok=True)
    if args.statistics is None or Path(args.statistics).resolve() != folder.resolve():
        (folder / STATISTICS_NAME).unlink(missing_ok=True)


def _anchors(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, samples: _Samples, max_length: int | None, seed: int
) -> list[Anchor]:
    shared = _SHARED_ANCHORS.get()
    if shared:
        return shared
    with unedited(model):
        anchors = make_anchors(
            model,
            tokenizer,
            varied(samples.prompts, samples.chat, samples.texts, seed),
            samples.texts,
            answer_length=_ANSWER_TOKENS,
            text_length=_ANCHOR_TOKENS,
            max_length=max_length,
        )
    if shared is not None:
        shared += anchors
    return anchors


class _Samples:
    """Prompts and texts: the user's, or what the unedited model says, kept in a folder for a run that is resumed."""

    def __init__(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, edits: EditSet, args: EditConfig, folder: Path
    ):
        self._model, self._tokenizer, self._args, self._path = model, tokenizer, args, folder / _SAMPLES_NAME
        self._edits, self._counts = edits, _counts(edits)
        if args.contexts or args.kl_weight or (args.projector and args.statistics is None):
            self._check_given()

    @cached_property
    def prompts(self) -> Sequence[str]:
        given = self._given["preservation_prompts"]
        return given or _own_prompts(self._said, self._counts, self._edits, self.texts, self._args.seed)

    @cached_property
    def texts(self) -> Sequence[str]:
        return self._given["preservation_texts"] or self._said("texts")

    @cached_property
    def chat(self) -> str | None:
        return self._said("chat")

    @cached_property
    def _given(self) -> dict[str, Sequence[str]]:
        return {field: self._own(field) for field in ("preservation_prompts", "preservation_texts")}

    def _own(self, field: str) -> Sequence[str]:
        given = getattr(self._args, field)
        texts = read_texts(given, field) if isinstance(given, str) else [text for text in given or [] if text.strip()]
        # A large file is drawn from: what is read is held in memory, and read again in every epoch.
        return random.Random(self._args.seed).sample(texts, _MOST) if len(texts) > _MOST else texts

    def _said(self, kind: str) -> Any:
        known = self._known()
        if kind not in known:
            with unedited(self._model):
                known[kind] = _say(kind, self._counts, self._model, self._tokenizer, self._args.seed)
            self._keep(known)
        return known[kind]

    def _check_given(self) -> None:
        """Refuse to go on with other texts than the run was begun with, of which its statistics may be."""
        given = {"contexts": self._args.contexts}
        for field, texts in self._given.items():
            given[field] = hashlib.sha256("\0".join(texts).encode()).hexdigest() if texts else None
        known = self._known()
        earlier = known.setdefault("given", given)
        if differing := [name for name in given if given[name] != earlier[name]]:
            raise ValueError(
                f"the run in {self._path.parent.parent} was begun with other {', '.join(map(repr, differing))} than given now: "
                "resume with the same, or start a new run in another folder"
            )
        self._keep(known)

    def _known(self) -> dict[str, Any]:
        return json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}

    def _keep(self, known: dict[str, Any]) -> None:
        write_atomically(self._path, json.dumps(known, ensure_ascii=False, indent=1))


def _counts(edits: EditSet) -> dict[str, int]:
    """Return how much of each kind a model is to make up: its prompts are of the kind that the edits' are."""
    begun = sum(not is_question(edit.prompt) for edit in edits) / max(len(edits), 1)
    statements, others = (round(share * begun * _PROMPTS) for share in (_STATEMENTS, _NEIGHBOURS))
    questions = _PROMPTS - statements - others
    return {"questions": questions, "statements": statements, "neighbours": others, "texts": _TEXTS}


def _say(
    kind: str,
    counts: dict[str, int],
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Any:
    if kind == "chat":
        return chat_form(tokenizer)
    if not counts[kind]:
        return []
    with _sampling_fast(model):
        if kind == "texts":
            return sample_texts(model, tokenizer, counts[kind], _TEXT_TOKENS, seed)
        sample = sample_questions if kind == "questions" else sample_statements
        return sample(model, tokenizer, counts[kind], seed)


def _own_prompts(
    say: Callable[[str], list[str]], counts: dict[str, int], edits: EditSet, texts: Sequence[str], seed: int
) -> list[str]:
    """Return what to be held to, where the user gives no prompts."""
    return [*say("questions"), *say("statements"), *neighbours(edits, texts, counts["neighbours"], seed)]


def _sampling_fast(model: PreTrainedModel | PeftModel) -> AbstractContextManager:
    """In 16 bits where that is faster: what is drawn at random need not be exact."""
    parameters = list(model.parameters())
    if multiplies_bfloat16(model.device) and all(parameter.dtype == torch.float32 for parameter in parameters):
        return rounded(parameters, torch.bfloat16)
    return nullcontext()


def fill_samples(args: EditConfig, edits: EditSet, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model make up what several runs are going to need, once for all.

    Args:
        args ([`EditConfig`]):
            The training arguments, in which it is filled in.
        edits ([`EditSet`]):
            The edits.
        model ([`~transformers.PreTrainedModel`]):
            The unedited model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
    """
    counts = _counts(edits)
    say = partial(_say, counts=counts, model=model, tokenizer=tokenizer, seed=args.seed)
    if args.preservation_texts is None and (args.kl_weight or args.projector or args.contexts):
        args.preservation_texts = say("texts")
    if args.preservation_prompts is None and (args.kl_weight or args.projector):
        texts = args.preservation_texts
        texts = read_texts(texts, "preservation_texts") if isinstance(texts, str) else texts
        args.preservation_prompts = _own_prompts(say, counts, edits, texts, args.seed)


def read_texts(path: str, field: str) -> list[str]:
    """Read texts from a file: what stands between its empty lines, or its lines if it has none.

    Args:
        path (`str`):
            The file.
        field (`str`):
            The field or option that names it, for the message. Those of `"preservation_prompts"` are always lines.

    Returns:
        `list[str]`: The texts, at least one.

    Raises:
        `ValueError`: If the file does not exist, is no text in UTF-8, or has no text in it.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`{field}` is {path!r}, which cannot be read ({error}), expected a text file in UTF-8 with one text to a line"
        ) from error
    has_paragraphs = field != "preservation_prompts" and "\n\n" in content
    parts = content.split("\n\n") if has_paragraphs else content.splitlines()
    texts = [text.strip() for text in parts if text.strip()]
    if not texts:
        raise ValueError(f"`{field}` is {path!r}, which is empty, expected at least one text")
    return texts


def _statistics(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    deltas: Sequence[Delta],
    samples: _Samples,
    args: EditConfig,
    folder: Path,
) -> InputStatistics:
    if args.statistics is not None:
        return InputStatistics.load(args.statistics)
    if (folder / STATISTICS_NAME).is_file():
        return InputStatistics.load(folder)  # an interrupted run computed them
    base = model.get_base_model()
    names = [delta.name for delta in deltas]
    asked = [form for prompt in samples.prompts for form in every_way(prompt, samples.chat, samples.texts, args.seed)]
    with unedited(model):
        parts = [input_statistics(base, tokenizer, some, names) for some in (samples.texts, asked) if some]
    # Half of it questions: what all of them have in common shall not be what an edit is told by. As a part of the texts
    # they would be lost, because they are short (docs/log.md).
    moments = {name: sum(part[name] for part in parts) / len(parts) for name in names}
    statistics = InputStatistics(moments, sum(part.tokens for part in parts))
    statistics.save(folder)
    return statistics
