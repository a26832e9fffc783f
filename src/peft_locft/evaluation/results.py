"""What an evaluation found: the scores before and after, and every single answer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, List, Value
from pyarrow import compute, parquet

from ..edits import write_atomically
from ..edits.contexts import CONTEXTS
from ..edits.rows import RowSequence, write_rows
from .questions import METRICS, Answer, Question, is_correct


RESULTS_NAME = "edit_results.json"
_TABLE_NAME = "edit_results.jsonl"
ROW_FEATURES = Features(
    {
        "edit_id": Value("string"),
        "metric": Value("string"),
        "prompt": Value("string"),
        "answer": Value("string"),
        "context": Value("string"),
        "before": Value("string"),
        "after": Value("string"),
        "correct_before": Value("bool"),
        "correct_after": Value("bool"),
    }
)
# What is kept beside the rows: the tokens of the answers before, which judge locality in a further evaluation.
_ANSWER_FEATURES = Features({"before": Value("string"), "before_tokens": List(Value("int32"))})


class _BeforeAnswers(RowSequence[Answer]):
    """The unedited model's answers."""

    def _item(self, row: dict[str, Any]) -> Answer:
        return Answer(row["before"], tuple(row["before_tokens"]))


@dataclass
class EditResults:
    """The result of an evaluation. The rows are held in a memory-mapped Arrow file, not in memory.

    Args:
        rows (`Sequence[dict]`):
            One row a question: `edit_id`, `metric`, `prompt` (as it was asked), `answer` (the expected one; for
            locality, what is known of it), `context`, the model's answers `before` and `after`, and whether each is
            right, `correct_before` and `correct_after`.
        settings (`dict`, *optional*):
            How the adapter was trained.
        times (`dict`, *optional*):
            How long each part took, in seconds.
        epoch_losses (`list[float]`, *optional*):
            The mean loss of each epoch of training.
        before_answers (`Sequence[Answer]`, *optional*):
            The unedited model's answers, for a further evaluation on the same edits. Not saved.
    """

    rows: Sequence[dict]
    settings: dict[str, Any] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    epoch_losses: list[float] = field(default_factory=list)
    before_answers: Sequence[Answer] = field(default_factory=list, repr=False)

    def __post_init__(self):
        if not isinstance(self.rows, RowSequence):
            # Tables that were written before there were contexts have none.
            rows = ({"context": CONTEXTS[0], **row} for row in self.rows)
            self.rows = RowSequence.of(write_rows(rows, ROW_FEATURES))

    @classmethod
    def from_answers(
        cls, questions: Sequence[Question], before: Sequence[Answer], after: Sequence[Answer]
    ) -> EditResults:
        """Judge answers.

        Args:
            questions (`Sequence[Question]`):
                The questions.
            before (`Sequence[Answer]`):
                The unedited model's answers to them.
            after (`Sequence[Answer]`):
                The edited model's answers to them.

        Returns:
            [`EditResults`]: With one row a question.
        """
        return cls.judge(zip(questions, before, after))

    @classmethod
    def judge(cls, answered: Iterable[tuple[Question, Answer, Answer]]) -> EditResults:
        """Judge answers one after the other, as they come.

        Args:
            answered (`Iterable[tuple[Question, Answer, Answer]]`):
                Each question with the unedited model's answer and the edited model's.

        Returns:
            [`EditResults`]: With one row a question.
        """
        rows = (
            {
                "edit_id": question.edit_id,
                "metric": question.metric,
                "prompt": question.prompt,
                "answer": question.answer,
                "context": question.context,
                "before": old.text,
                "after": new.text,
                "correct_before": is_correct(question, old, old),
                "correct_after": is_correct(question, new, old),
                "before_tokens": old.tokens,
            }
            for question, old, new in answered
        )
        data = write_rows(rows, Features({**ROW_FEATURES, **_ANSWER_FEATURES}))
        return cls(
            RowSequence.of(data.select_columns(list(ROW_FEATURES))),
            before_answers=_BeforeAnswers.of(data.select_columns(list(_ANSWER_FEATURES))),
        )

    @property
    def before(self) -> dict[str, float | None]:
        """The scores of the unedited model, as fractions by metric (`dict[str, float | None]`)."""
        return self._rates("correct_before")

    @property
    def after(self) -> dict[str, float | None]:
        """The scores of the edited model, as fractions by metric (`dict[str, float | None]`)."""
        return self._rates("correct_after")

    def by_context(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Return the scores in each context that the questions were asked in.

        Returns:
            `dict[str, dict[str, dict[str, float | None]]]`: By context, `before` and `after`, as fractions by metric.
        """
        found: dict[str, dict[str, dict[str, float | None]]] = {}
        columns = {"before": "correct_before", "after": "correct_after"}
        for row in self._means(["context", "metric"], list(columns.values())):
            scores = found.setdefault(row["context"], {name: dict.fromkeys(METRICS) for name in columns})
            for name, column in columns.items():
                scores[name][row["metric"]] = row[f"{column}_mean"]
        return {context: found[context] for context in CONTEXTS if context in found}

    def _rates(self, column: str) -> dict[str, float | None]:
        means = self._means(["metric"], [column])
        return dict.fromkeys(METRICS) | {row["metric"]: row[f"{column}_mean"] for row in means}

    def _means(self, keys: list[str], columns: list[str]) -> list[dict[str, Any]]:
        # By Arrow: the scores are asked for often, and there may be a million rows.
        return self._table().group_by(keys).aggregate([(column, "mean") for column in columns]).to_pylist()

    def _table(self) -> pyarrow.Table:
        return self.to_dataset().with_format("arrow")[:]

    def to_dataset(self) -> Dataset:
        """Return the rows as a table, for example to write it with `to_parquet` or `to_csv`.

        Returns:
            [`~datasets.Dataset`]: One row a question.
        """
        return self.rows.to_dataset()

    def to_json(self) -> str:
        """Return the summary as JSON: `before` and `after`, in all and by context, settings, times and epoch losses.

        Returns:
            `str`: The text of `edit_results.json`.
        """
        summary = {
            "before": self.before,
            "after": self.after,
            "contexts": self.by_context(),
            "edits": compute.count_distinct(self._table()["edit_id"]).as_py(),
            "questions": len(self.rows),
            "settings": self.settings,
            "times": {name: round(seconds, 2) for name, seconds in self.times.items()},
            "epoch_losses": self.epoch_losses,
        }
        return json.dumps(summary, indent=2, ensure_ascii=False) + "\n"

    def save(self, folder: str | os.PathLike) -> None:
        """Write `edit_results.json` (the summary), and the rows as `edit_results.jsonl` and `edit_results.parquet`.

        Args:
            folder (`str` or `os.PathLike`):
                Where to. It is made if it is missing.
        """
        folder = Path(folder)
        write_atomically(folder / _TABLE_NAME, (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        write_atomically(folder / RESULTS_NAME, self.to_json())
        with (folder / _TABLE_NAME).with_suffix(".parquet").open("wb") as file:
            parquet.write_table(self._table(), file)


def load_results(folder: str | os.PathLike) -> EditResults:
    """Read the results that [`EditResults.save`] wrote.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.

    Returns:
        [`EditResults`]: The results.

    Raises:
        `FileNotFoundError`: If the folder has none.
    """
    folder = Path(folder)
    missing = [name for name in (RESULTS_NAME, _TABLE_NAME) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {missing[0]}: it holds no results of an evaluation")
    summary = json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))
    with (folder / _TABLE_NAME).open(encoding="utf-8") as file:
        return EditResults(map(json.loads, file), summary["settings"], summary["times"], summary["epoch_losses"])
