"""What a search found: every place of every rung, their ranking, and the place to use."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..edits import write_atomically
from ..evaluation import METRICS
from ..tuner import LocFTConfig
from .places import Place


RESULTS_NAME = "search.json"
_TABLE_NAME = "search.md"


@dataclass(frozen=True)
class Trial:
    """One place in one rung.

    Args:
        layer (`int`):
            The layer, counted from 0.
        group (`str`):
            One of `GROUPS`.
        module (`str`):
            What `target_modules` calls it.
        rung (`int`):
            Which round, counted from 1.
        edits (`int`):
            How many edits it was trained on.
        epochs (`int`):
            How many epochs it was trained for.
        learning_rate (`float`):
            The rate.
        scores (`dict[str, float]`):
            The scores by name.
        score (`float`):
            What it is ranked by: the mean of reliability, generalization, locality, portability and capability, as far as
            they were measured.
        seconds (`float`):
            How long training and scoring took.
    """

    layer: int
    group: str
    module: str
    rung: int
    edits: int
    epochs: int
    learning_rate: float
    scores: dict[str, float]
    score: float
    seconds: float

    @property
    def place(self) -> Place:
        """Where it was trained ([`Place`])."""
        return Place(self.layer, self.group, self.module)

    def to_json(self) -> str:
        """Return it as JSON, in one line (`str`)."""
        return json.dumps(asdict(self))


@dataclass
class SearchResults:
    """The result of [`search_locations`].

    Args:
        rows (`list[Trial]`):
            Every place of every rung, in the order in which they were trained.
        before (`dict[str, float]`, *optional*):
            The perplexity and further metrics of the unedited model.
        settings (`dict[str, Any]`, *optional*):
            What was searched.
    """

    rows: list[Trial]
    before: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.rows:
            raise ValueError("there are no `rows`: results of a search hold at least one place")

    def ranked(self) -> list[Trial]:
        """Return the last trial of each place, the best first. A place that came to a later rung stands before all that
        stopped earlier, because the scores of two rungs cannot be compared.

        Returns:
            `list[Trial]`: One for each place.
        """
        last = {row.place: row for row in sorted(self.rows, key=lambda row: row.rung)}
        return sorted(last.values(), key=lambda row: (-row.rung, -row.score, row.layer))

    @property
    def finalists(self) -> list[Trial]:
        """The trials of the last rung, the best first (`list[Trial]`)."""
        ranked = self.ranked()
        return [row for row in ranked if row.rung == ranked[0].rung]

    @property
    def best(self) -> LocFTConfig:
        """The config of the best place ([`LocFTConfig`]). The rate to use with it is `ranked()[0].learning_rate`."""
        return self.ranked()[0].place.config

    def pareto_axes(self) -> tuple[str, str]:
        """Return the two scores that are weighed against each other: generalization and capability. Where one was not
        measured, reliability or locality stands in for it.

        Returns:
            `tuple[str, str]`: Their names.
        """
        scores = self.finalists[0].scores  # a first rung of few edits may have had no question for some of them
        learned = "generalization" if "generalization" in scores else "reliability"
        return learned, next((name for name in ("capability", "locality") if name in scores), "reliability")

    def pareto_front(self) -> list[Trial]:
        """Return the places of the last rung that no other one beats in generalization without losing capability.

        Returns:
            `list[Trial]`: The best generalization first.
        """
        points = [(row, tuple(row.scores[name] for name in self.pareto_axes())) for row in self.finalists]

        def is_beaten(point: tuple[float, ...]) -> bool:
            return any(
                other != point and all(theirs >= mine for theirs, mine in zip(other, point)) for _, other in points
            )

        front = [(row, point) for row, point in points if not is_beaten(point)]
        return [row for row, _ in sorted(front, key=lambda pair: (-pair[1][0], -pair[1][1]))]

    def score_names(self) -> list[str]:
        """Return the names of the scores that were measured (`list[str]`)."""
        scores = dict.fromkeys(name for row in self.rows for name in row.scores)
        first = [name for name in (*METRICS, "capability") if name in scores]
        return [*first, *(name for name in scores if name not in first)]

    def table(self, most: int | None = None) -> str:
        """Return the ranking as a Markdown table.

        Args:
            most (`int`, *optional*):
                How many places to show. Defaults to all.

        Returns:
            `str`: One row a place. Those on the Pareto front have a star.
        """
        names, front = self.score_names(), self.pareto_front()
        columns = ["layer", "group", "rung", "edits", "epochs", "rate", *names, "mean", "front", "seconds"]
        lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        for row in self.ranked()[:most]:
            cells = [row.layer, row.group, row.rung, row.edits, row.epochs, f"{row.learning_rate:.3g}"]
            cells += [f"{row.scores[name]:.3f}" if name in row.scores else "" for name in names]
            cells += [f"{row.score:.3f}", "★" if row in front else "", f"{row.seconds:.1f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Return everything as JSON: settings, `before`, the ranking, the front and all rows.

        Returns:
            `str`: The text of `search.json`.
        """
        best = self.ranked()[0]
        content = {
            "settings": self.settings,
            "before": self.before,
            "best": {
                "layers": [best.layer],
                "target_modules": [best.module],
                "learning_rate": best.learning_rate,
                "scores": best.scores,
            },
            "pareto_front": [[row.layer, row.group] for row in self.pareto_front()],
            "rows": [asdict(row) for row in self.rows],
        }
        return json.dumps(content, indent=2) + "\n"

    def save(self, folder: str | os.PathLike) -> None:
        """Write `search.json` (everything) and `search.md` (the ranking).

        Args:
            folder (`str` or `os.PathLike`):
                Where to. It is made if it is missing.
        """
        folder = Path(folder)
        write_atomically(folder / RESULTS_NAME, self.to_json())
        write_atomically(folder / _TABLE_NAME, self.table())


def load_search(folder: str | os.PathLike) -> SearchResults:
    """Read the results that [`SearchResults.save`] wrote.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.

    Returns:
        [`SearchResults`]: The results.

    Raises:
        `FileNotFoundError`: If the folder has none.
    """
    path = Path(folder) / RESULTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {RESULTS_NAME}: it holds no results of a search")
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return SearchResults([Trial(**row) for row in content["rows"]], content["before"], content["settings"])
