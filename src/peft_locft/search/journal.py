"""The file that a search writes its results to as they come, and goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..edits import write_atomically
from .results import Trial


JOURNAL_NAME = "search.jsonl"


class Journal:
    """The results of a search: a line that says what they belong to, and one for each place of each rung.

    Args:
        path (`Path`):
            The file.
        identity (`Mapping[str, Any]`):
            All that the results depend on, by name, as JSON.

    Attributes:
        trials (`list[Trial]`):
            What is there already.

    Raises:
        `ValueError`: If the file holds a search with another identity.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self._path, self._is_open = path, False
        self.trials: list[Trial] = []
        self._identity = json.loads(json.dumps(identity))
        if not path.is_file():
            return
        header, *lines = path.read_text(encoding="utf-8").split("\n")
        found = _header(header)
        if found is None:
            raise ValueError(f"{path} is no file of a search: choose another output folder, or delete it")
        differing = [name for name in {**self._identity, **found} if found.get(name) != self._identity.get(name)]
        if differing:
            raise ValueError(
                f"{path} holds a search with another {', '.join(sorted(differing))} than given now: choose another output "
                "folder, give what it was begun with, or delete it"
            )
        # What stands behind the last line end was being written when the process was killed.
        self.trials = [Trial(**json.loads(line)) for line in lines[:-1]]

    def add(self, trial: Trial) -> None:
        """Append a result. A process that is killed meanwhile leaves all results before it as they were.

        Args:
            trial ([`Trial`]):
                The result.
        """
        self.trials.append(trial)
        if not self._is_open:  # not before there is a result: a search that fails at once leaves no file
            lines = [json.dumps({"search": self._identity}), *(trial.to_json() for trial in self.trials)]
            write_atomically(self._path, "".join(f"{line}\n" for line in lines))
            self._is_open = True
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{trial.to_json()}\n")
            file.flush()
            os.fsync(file.fileno())


def _header(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)["search"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None
