"""What a run needs beside its edits to leave the rest of the model alone, and to make edits hold in other words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..edits import EditSet
from ..preservation import (
    Anchor,
    Delta,
    Focus,
    InputStatistics,
    LimitCallback,
    OutputStatistics,
    Projection,
    check_norms,
    focused,
    input_statistics,
    load_anchors,
    make_anchors,
    output_statistics,
    save_anchors,
    squared_norm,
    trained_deltas,
)
from ..tuner import num_layers
from ..tuner.temporary import unedited
from .augmentation import every_way, varied
from .config import EditConfig
from .forms import make_forms
from .pool import TrainingPool
from .samples import ANCHORS_NAME, Samples, hash_of


_ANSWER_TOKENS, _ANCHOR_TOKENS, _STATISTICS_TOKENS, _GRADIENT_TOKENS = 8, 32, 512, 48
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
    is_resumed: bool,
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
        is_resumed (`bool`):
            Whether the run goes on from a checkpoint.
        add_callback (`Callable`):
            The trainer's.
        remove_callback (`Callable`):
            The trainer's.

    Returns:
        [`Preservation`]: What is in force.
    """
    deltas: list[Delta] = []
    if asked := [
        name
        for name in ("projector", "output_projector", "subject_focus", "l2_weight", "max_delta", "max_growth")
        if getattr(args, name)
    ]:
        deltas = trained_deltas(model, asked[0])  # first, because all else takes minutes
        if args.l2_weight or args.max_growth:
            check_norms(deltas)
    samples = Samples(model, tokenizer, edits, args, is_resumed)
    focus = None
    if args.subject_focus and (at_subjects := focused(deltas, num_layers(model.config))):
        focus = Focus(at_subjects)
    projection = None
    if args.projector or args.output_projector:
        of = partial(_statistics, model, tokenizer, [delta.name for delta in deltas], samples, args, max_length)
        inputs = of(InputStatistics) if args.projector else None
        outputs = of(OutputStatistics) if args.output_projector else None
        projection = Projection(deltas, inputs, args.projector, focus, outputs, args.output_projector)
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
            behind = projection.modules if projection is not None else ()
            stack.enter_context(focus.applied(behind))
        if args.max_delta or args.max_growth:
            limits = LimitCallback(deltas, args.max_delta, args.max_growth)
            add_callback(limits)
            stack.callback(remove_callback, limits)
        yield Preservation(pool, deltas, projection, args.kl_weight, args.l2_weight, focus)
    samples.finish()  # if there was no exception


@contextmanager
def shared_anchors() -> Iterator[None]:
    """Within this context, one model is trained at several places with the same arguments, and asked once what it says."""
    token = _SHARED_ANCHORS.set([])
    try:
        yield
    finally:
        _SHARED_ANCHORS.reset(token)


def _anchors(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, samples: Samples, max_length: int | None, seed: int
) -> list[Anchor]:
    shared = _SHARED_ANCHORS.get()
    if shared:
        return shared
    asked = varied(samples.prompts, samples.chat, samples.texts, seed)
    path = samples.folder / ANCHORS_NAME
    key = hash_of([*asked, *samples.texts, f"{_ANSWER_TOKENS} {_ANCHOR_TOKENS} {max_length}"])
    anchors = load_anchors(path, key)  # an interrupted run asked for them
    if anchors is None:
        with unedited(model):
            anchors = make_anchors(
                model,
                tokenizer,
                asked,
                samples.texts,
                answer_length=_ANSWER_TOKENS,
                text_length=_ANCHOR_TOKENS,
                max_length=max_length,
            )
        if anchors and shared is None:
            save_anchors(anchors, path, key)
    if shared is not None:
        shared += anchors
    return anchors


def _statistics(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    samples: Samples,
    args: EditConfig,
    max_length: int | None,
    kind: type[InputStatistics] | type[OutputStatistics],
) -> InputStatistics | OutputStatistics:
    if args.statistics is not None:
        return kind.load(args.statistics)
    if (samples.folder / kind.file_name).is_file():  # an interrupted run computed them
        statistics = kind.load(samples.folder)
        if set(names) <= set(statistics):
            return statistics
    if kind is InputStatistics:
        length = min(_STATISTICS_TOKENS, max_length or _STATISTICS_TOKENS)
        compute = partial(input_statistics, max_length=length)
        ways = [every_way(prompt, samples.chat, samples.texts, args.seed) for prompt in samples.prompts]
        asked = [form for forms in ways for form in forms]
    else:
        length = min(_GRADIENT_TOKENS, max_length or _GRADIENT_TOKENS)
        compute = partial(output_statistics, max_length=length, seed=args.seed)
        asked = samples.prompts  # each in one way, because backward passes take longer
    with unedited(model):
        parts = [compute(model.get_base_model(), tokenizer, some, names) for some in (samples.texts, asked) if some]
    # Half of it questions: what all of them have in common shall not be what an edit is told by. As a part of the texts
    # they would be lost, because they are short (docs/log.md).
    moments = {name: sum(part[name] for part in parts) / len(parts) for name in names}
    statistics = kind(moments, sum(part.tokens for part in parts))
    statistics.save(samples.folder)
    return statistics
