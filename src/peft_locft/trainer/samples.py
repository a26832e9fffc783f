"""Prompts and texts that a run is held to: the user's, or what the unedited model makes up, kept for a run that is resumed."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..edits import EditSet, write_atomically
from ..edits.contexts import chat_form
from ..preservation import (
    InputStatistics,
    OutputStatistics,
    sample_questions,
    sample_statements,
    sample_texts,
)
from ..preservation.statistics import FOLDER_NAME
from ..tuner.fingerprint import tokenizer_fingerprint
from ..tuner.temporary import unedited
from .augmentation import is_question, without_edits
from .config import EditConfig
from .neighbours import neighbours
from .precision import multiplies_bfloat16, rounded
from .state_store import weights_hash


_SAMPLES_NAME, ANCHORS_NAME = "samples.json", "anchors.safetensors"
_PROMPTS, _TEXTS, _TEXT_TOKENS = 1000, 512, 128
# Where all edits are beginnings of sentences, a third of the prompts are others that the model makes up, and a third the
# edits' own about others. The rest stay questions.
_STATEMENTS, _NEIGHBOURS = 1 / 3, 1 / 3
_MOST = 1000
# Of as small a share of the prompts that it was to make up, there is something to be told. SmolLM2-135M says nine in ten.
_FEW = 0.2
# How many numbers of each weight tell a model from another.
_GLANCE = 64


class Samples:
    """Prompts and texts: the user's, or what the unedited model says, kept in a folder for a run that is resumed, and for one
    that was killed before it had a checkpoint and is begun anew.

    Args:
        model ([`~peft.PeftModel`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        edits ([`EditSet`]):
            The edits.
        args ([`EditConfig`]):
            The training arguments.
        is_resumed (`bool`):
            Whether the run goes on. Else what the folder has is forgotten, unless it is of a run that was begun alike.

    Raises:
        `ValueError`: If the run that is resumed was begun with other samples.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: EditSet,
        args: EditConfig,
        is_resumed: bool,
    ):
        self._model, self._tokenizer, self._args = model, tokenizer, args
        self.folder = Path(args.output_dir) / FOLDER_NAME
        self._path = self.folder / _SAMPLES_NAME
        self._edits, self._counts = edits, _counts(edits)
        is_computed = (args.projector or args.output_projector) and args.statistics is None
        if args.contexts or args.kl_weight or is_computed:
            self._check_begun(is_resumed)
        elif not is_resumed:
            self._forget()

    @cached_property
    def prompts(self) -> Sequence[str]:
        given = self._given["preservation_prompts"]
        if not given:
            own = _own_prompts(self._said, self._counts, self._edits, self.texts, self._args.seed)
            if len(own) < _FEW * _PROMPTS:
                warnings.warn(
                    f"of {_PROMPTS} prompts to be held to, the model made up only {len(own)} that make sense: give "
                    "`preservation_prompts` of your own, such as questions that its users ask",
                    stacklevel=2,
                )
            return own
        kept = without_edits(given, self._edits)
        if len(kept) < len(given):
            warnings.warn(
                f"{len(given) - len(kept)} of the {len(given)} `preservation_prompts` are left out: they are prompts of the edits, or "
                "asked when these are scored, and what the model is held to can be neither",
                stacklevel=2,
            )
        return kept

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
                known[kind] = _say(kind, self._counts, self._model, self._tokenizer, self._args)
            self._keep(known)
        return known[kind]

    def _check_begun(self, is_resumed: bool) -> None:
        """Refuse to go on with other texts than the run was begun with, of which its statistics may be."""
        given = {"contexts": self._args.contexts}
        for field, texts in self._given.items():
            given[field] = hash_of(texts) if texts else None
        known = self._known()
        if not is_resumed:
            of = {
                "model": _glance(self._model),
                "tokenizer": tokenizer_fingerprint(self._tokenizer),
                "edits": hash_of(self._edits.iter_jsonl()),
                "seed": self._args.seed,
            }
            if (known.get("given"), known.get("of")) != (given, of):
                self._forget()
                known = {"of": of}
        earlier = known.setdefault("given", given)
        if differing := [name for name in given if given[name] != earlier[name]]:
            raise ValueError(
                f"the run in {self.folder.parent} was begun with other {', '.join(map(repr, differing))} than given now: "
                "resume with the same, or start a new run in another folder"
            )
        self._keep(known)

    def _forget(self) -> None:
        """Delete what another run left, which may have been of another model; not what the arguments name."""
        self._path.unlink(missing_ok=True)
        (self.folder / ANCHORS_NAME).unlink(missing_ok=True)
        statistics = self._args.statistics
        if statistics is None or Path(statistics).resolve() not in (
            self.folder.resolve(),
            self.folder.parent.resolve(),
        ):
            for kind in (InputStatistics, OutputStatistics):
                (self.folder / kind.file_name).unlink(missing_ok=True)

    def _known(self) -> dict[str, Any]:
        return json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}

    def finish(self) -> None:
        """Delete what only a run that was interrupted needs again."""
        (self.folder / ANCHORS_NAME).unlink(missing_ok=True)

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
    args: EditConfig,
) -> Any:
    if kind == "chat":
        try:
            return chat_form(tokenizer)
        except ValueError as error:
            warnings.warn(f"edits are not trained as turns of a chat: {error}", stacklevel=2)
            return None
    if not counts[kind]:
        return []
    with _sampling_fast(model):
        if kind == "texts":
            return sample_texts(model, tokenizer, counts[kind], _TEXT_TOKENS, args.seed, not args.disable_tqdm)
        sample = sample_questions if kind == "questions" else sample_statements
        return sample(model, tokenizer, counts[kind], args.seed, not args.disable_tqdm)


def _own_prompts(
    say: Callable[[str], list[str]], counts: dict[str, int], edits: EditSet, texts: Sequence[str], seed: int
) -> list[str]:
    """Return what to be held to, where the user gives no prompts."""
    others = neighbours(edits, texts, counts["neighbours"], seed)
    return [*without_edits([*say("questions"), *say("statements")], edits), *others]


def hash_of(texts: Iterable[str]) -> str:
    """Return a hash of texts and their order."""
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        digest.update(("\0" * bool(number) + text).encode())
    return digest.hexdigest()


def _glance(model: PeftModel) -> str:
    """Return a hash of some numbers of each weight that is not trained, called as it is wherever the adapter is."""
    frozen = (weight for weight in model.get_base_model().named_parameters() if not weight[1].requires_grad)
    return weights_hash(((name.replace(".base_layer.", "."), value) for name, value in frozen), _GLANCE)


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
    say = partial(_say, counts=counts, model=model, tokenizer=tokenizer, args=args)
    asks = args.kl_weight or args.projector or args.output_projector
    if args.preservation_texts is None and (asks or args.contexts):
        args.preservation_texts = say("texts")
    if args.preservation_prompts is None and asks:
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
