"""What a place is worth: the scores of its edits, and what the rest of the model can still do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..edits import EditSet
from ..evaluation import METRICS, Answer, ask, evaluate_edits, questions_of
from ..evaluation.capability import perplexity
from .text_states import TextStates


# What a place is ranked by: the mean of those of them that exist.
RANKED = (*METRICS, "capability")


class Scorer:
    """Scores edited models against the unedited one, which is asked only once.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The unedited model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        edits ([`EditSet`]):
            The sample.
        texts (`Sequence[str]`, *optional*):
            The texts whose perplexity is measured.
        metrics (`Mapping[str, Callable[[PreTrainedModel], float]]`, *optional*):
            Further measures of what the model can do; more is better.
        batch_size (`int`):
            How many questions are asked at once.
        states ([`TextStates`], *optional*):
            Where to keep what the layers below an edit say about the texts.

    Attributes:
        before (`dict[str, float]`):
            The perplexity and the further measures of the unedited model.

    Raises:
        `ValueError`: If a measure of the unedited model is no positive number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: EditSet,
        texts: Sequence[str] | None,
        metrics: Mapping[str, Callable[[PreTrainedModel], float]] | None,
        batch_size: int,
        states: TextStates | None = None,
    ):
        self.tokenizer, self.texts, self.metrics, self.batch_size = tokenizer, texts, metrics or {}, batch_size
        self._states = states
        self.before = self._measure(model)
        for name, value in self.before.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"the metric {name!r} of the unedited model is {value}, expected a positive number: capability is "
                    "measured as a fraction of it"
                )
        self._answers: Sequence[Answer] = ask(model, tokenizer, questions_of(edits), batch_size=batch_size)

    def score(self, model: PeftModel, edits: EditSet) -> dict[str, float]:
        """Score an edited model.

        Args:
            model ([`~peft.PeftModel`]):
                The edited model.
            edits ([`EditSet`]):
                The edits that it was trained on: the first ones of the sample.

        Returns:
            `dict[str, float]`: The metrics of [`evaluate_edits`] that the edits have questions for; with texts or
            metrics, `capability`, the mean of what is left of each, at most 1; `perplexity`, and the metrics by name.
        """
        results = evaluate_edits(
            model,
            self.tokenizer,
            edits,
            batch_size=self.batch_size,
            before=self._answers[: len(questions_of(edits))],
            show_progress=False,
        )
        scores = {name: value for name, value in results.after.items() if value is not None}
        measured = self._measure(model)
        if measured:
            scores["capability"] = fmean(self._left(name, value) for name, value in measured.items())
        return scores | measured

    def _measure(self, model: PreTrainedModel | PeftModel) -> dict[str, float]:
        measured = {}
        if self.texts is not None:
            measure = partial(perplexity, model, self.tokenizer, self.texts)
            is_whole = self._states is None or not isinstance(model, PeftModel)
            measured["perplexity"] = measure() if is_whole else self._states.read(model, measure)
        return measured | {name: float(metric(model)) for name, metric in self.metrics.items()}

    def _left(self, name: str, value: float) -> float:
        """Return how much of a capability is left: at most all of it, so that luck in it does not outweigh the edits."""
        if not math.isfinite(value) or value <= 0:
            return 0.0
        before = self.before[name]
        return min(before / value if name == "perplexity" else value / before, 1.0)


def overall(scores: Mapping[str, float]) -> float:
    """Return the one number that places are ranked by: the mean of those of reliability, generalization, locality,
    portability and capability that there are.

    Args:
        scores (`Mapping[str, float]`):
            The scores by name.

    Returns:
        `float`: From 0 to 1.
    """
    return fmean(scores[name] for name in RANKED if name in scores)


def check_metrics(metrics: Mapping[str, Callable] | None) -> None:
    """Refuse metrics that cannot be called, or have the name of another score.

    Args:
        metrics (`Mapping[str, Callable]`, *optional*):
            The metrics.

    Raises:
        `TypeError`: If one is no function.
        `ValueError`: If one has a name that is taken.
    """
    for name, metric in (metrics or {}).items():
        if not callable(metric):
            raise TypeError(
                f"`metrics` has {metric!r} as {name!r}, expected a function that takes a model and returns a number"
            )
        if name in (*RANKED, "perplexity"):
            raise ValueError(f"`metrics` has the name {name!r}, which is that of another score: choose another name")
