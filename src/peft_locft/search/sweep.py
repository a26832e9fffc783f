"""The trials of a search, rung by rung, on one model."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..edits import EditSet
from ..trainer import EditConfig, EditTrainer
from ..trainer.prefix_cache import shared_prefix_states
from ..trainer.preserving import shared_anchors
from .journal import Journal
from .places import Place
from .results import Trial
from .rungs import Rung
from .scoring import Scorer, overall


class Sweep:
    """A search under way: what all of its trials have in common."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: EditSet,
        args: EditConfig,
        scorer: Scorer,
        journal: Journal | None,
    ):
        self.model, self.tokenizer, self.edits, self.args = model, tokenizer, edits, args
        self.scorer, self.journal = scorer, journal
        self.rows: list[Trial] = list(journal.trials) if journal is not None else []

    def run(self, places: list[Place], plan: list[Rung]) -> list[Trial]:
        """Train and score rung by rung.

        Args:
            places (`list[Place]`):
                All places.
            plan (`list[Rung]`):
                The rungs, of [`plan_rungs`].

        Returns:
            `list[Trial]`: Every place of every rung, with those that the journal has.
        """
        with (
            _little_garbage(),
            shared_anchors(),
            tqdm(
                total=sum(rung.visits for rung in plan),
                # What an earlier run did takes no time now, so that it does not count for the time that is left.
                initial=sum(plan[row.rung - 1].edits * plan[row.rung - 1].epochs for row in self.rows),
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
                disable=self.args.disable_tqdm,
            ) as bar,
        ):
            for number, rung in enumerate(plan, 1):
                done = {row.place for row in self.rows if row.rung == number}
                waiting = [place for place in places if place not in done]
                bar.set_description(f"Rung {number} of {len(plan)}, {len(places)} places, {rung.edits} edits")
                with shared_prefix_states({place.layer for place in waiting}):
                    for place in waiting:
                        bar.set_postfix_str(str(place))
                        self._add(self._try(place, number, rung))
                        bar.update(rung.edits * rung.epochs)
                tried = sorted((row for row in self.rows if row.rung == number), key=lambda row: -row.score)
                kept = {row.place for row in tried[: plan[number].places]} if number < len(plan) else set()
                places = [place for place in places if place in kept]
        return self.rows

    def _add(self, trial: Trial) -> None:
        self.rows.append(trial)
        if self.journal is not None:
            self.journal.add(trial)

    def _try(self, place: Place, number: int, rung: Rung) -> Trial:
        start = time.perf_counter()
        args = copy.copy(self.args)
        args.num_train_epochs, args.disable_tqdm, args.report_to, args.push_to_hub = rung.epochs, True, [], False
        args.save_strategy, args.logging_strategy, args.eval_strategy = SaveStrategy.NO, *[IntervalStrategy.NO] * 2
        edits = self.edits[: rung.edits]
        # Trainer, optimizer and deltas of the trial before know each other, so that nothing else would free them now.
        gc.collect()
        model = get_peft_model(self.model, place.config)
        try:
            trainer = EditTrainer(model, args, edits, processing_class=self.tokenizer)
            trainer.remove_callback(PrinterCallback)  # which stands in for a progress bar
            trainer.train()
            scores = self.scorer.score(model, edits)
        finally:
            model.unload()
        return Trial(
            *place,
            rung=number,
            edits=rung.edits,
            epochs=round(trainer.state.epoch),
            learning_rate=trainer.args.learning_rate,
            scores=scores,
            score=overall(scores),
            seconds=round(time.perf_counter() - start, 3),
        )


@contextmanager
def _little_garbage() -> Iterator[None]:
    """Within this context, collecting garbage does not look at what was there before: it takes most of a short trial."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
