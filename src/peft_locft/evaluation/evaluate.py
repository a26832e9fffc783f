"""Evaluate an edited model against itself without the edits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..edits import EditSet
from ..edits.contexts import CONTEXTS, check_contexts
from ..tuner.temporary import unedited
from .questions import Answer, Question, ask, drafts_of, questions_of
from .results import EditResults


# Edits whose questions are held in memory at once: enough to make batches of prompts of one length.
_EDITS_AT_ONCE = 4096


def evaluate_edits(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: EditSet,
    *,
    contexts: Sequence[str] = CONTEXTS[:1],
    batch_size: int = 32,
    before: Sequence[Answer] | None = None,
    show_progress: bool = True,
) -> EditResults:
    """Score edits by free, greedy generation, with the adapter and without it.

    Reliability: the prompt is answered with the target. Generalization: so are its rephrases. Portability: questions
    that follow from the edit get the answers that follow. In these, an answer is right when the text up to EOS is the
    expected one and nothing else. Locality: questions beside the edit are answered as the unedited model answers them,
    token for token, over as many tokens as the probe's known answer has, or 8 where none is known.

    Args:
        model ([`~peft.PeftModel`]):
            The edited model. Its active adapters are switched off for the answers before.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        edits ([`EditSet`]):
            The edits.
        contexts (`Sequence[str]`, *optional*, defaults to `("bare",)`):
            The contexts in each of which every question is asked: `"bare"`, as it is; `"question"`, behind `Question:`
            and before `Answer:`; `"chat"`, as a turn of a chat; `"prefix"`, behind a sentence that has nothing to do
            with it.
        batch_size (`int`, *optional*, defaults to `32`):
            How many questions to ask at once.
        before (`Sequence[Answer]`, *optional*):
            The unedited model's answers to the questions of `edits` in these contexts, if they are known already.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Returns:
        [`EditResults`]: The scores and every answer.

    Raises:
        `ValueError`: If a context is not known, or the tokenizer has no chat template for `"chat"`.
    """
    check_contexts(contexts, tokenizer)
    parts = range(0, len(edits), _EDITS_AT_ONCE)
    times = {"evaluate_before": 0.0, "evaluate_after": 0.0}

    def title(whom: str, part: int) -> str | None:
        count = f", part {part} of {len(parts)}" if len(parts) > 1 else ""
        return f"Asking the {whom} model{count}" if show_progress else None

    def answered() -> Iterator[tuple[Question, Answer, Answer]]:
        asked = 0
        for part, first in enumerate(parts, 1):
            questions = questions_of(edits[first : first + _EDITS_AT_ONCE], contexts, tokenizer)
            start = time.perf_counter()
            if before is None:
                # Without drafts: the unedited model hardly ever answers with the target.
                with unedited(model):
                    old = ask(model, tokenizer, questions, batch_size=batch_size, description=title("unedited", part))
            else:
                old = before[asked : asked + len(questions)]
            middle = time.perf_counter()
            new = ask(
                model,
                tokenizer,
                questions,
                batch_size=batch_size,
                description=title("edited", part),
                drafts=drafts_of(tokenizer, questions, old),
            )
            times["evaluate_before"] += middle - start
            times["evaluate_after"] += time.perf_counter() - middle
            asked += len(questions)
            yield from zip(questions, old, new)

    results = EditResults.judge(answered())
    results.times = times
    return results
