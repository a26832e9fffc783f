"""Many edits: an ordered, immutable collection without conflicts."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow
from datasets import Dataset, Features, List, Value
from pyarrow import compute

from .edit import Edit
from .rows import RowSequence, iter_rows, write_rows


# Named once, so that an edit without probes and one with them have the same columns in every file.
_PROBES = List({"prompt": Value("string"), "answer": Value("string")})
EDIT_FEATURES = Features(
    {
        "id": Value("string"),
        "prompt": Value("string"),
        "target": Value("string"),
        "subject": Value("string"),
        "rephrases": List(Value("string")),
        "train_rephrases": List(Value("string")),
        "locality": _PROBES,
        "portability": _PROBES,
        "source": Value("string"),
    }
)


class EditConflictError(ValueError):
    """Two edits give one prompt different targets, or share an id."""


class EditSet(RowSequence[Edit]):
    """An ordered collection of edits, in which no two edits contradict each other.

    The edits are held in a memory-mapped Arrow file, not in memory: 100,000 of them need hardly more than 1,000.

    Args:
        edits (`Iterable[Edit]`):
            The edits, in order.

    Raises:
        [`EditConflictError`]: If two edits give one prompt different targets or the same target twice, or if two
            edits share an id.

    Examples:

    ```python
    >>> edits = EditSet([Edit("The capital of Kazakhstan is", "Astana")])
    >>> edits[0].target
    'Astana'
    >>> edits[:1].save("edits.jsonl")
    ```
    """

    def __init__(self, edits: Iterable[Edit]):
        self._data, suspects = store_edits(edits)
        clashes = describe_clashes([self[i] for i in suspects], [f"edit {i + 1}" for i in suspects])
        clashes += describe_crossed(self, lambda position: f"edit {position + 1}")
        if clashes:
            raise EditConflictError("\n  ".join([f"{len(clashes)} of {len(self)} edits clash:", *clashes]))

    def _item(self, row: dict) -> Edit:
        return Edit(**row)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EditSet) and super().__eq__(other)

    def __hash__(self) -> int:
        return hash((len(self), *self[:1]))  # of all edits, it would take seconds

    def __repr__(self) -> str:
        counts = dict.fromkeys(_LIST_FIELDS, 0)
        for row in iter_rows(self._data.select_columns(list(counts))):
            for name in counts:
                counts[name] += len(row[name])
        told = (f"{n} {name}" for name, n in counts.items() if n or name != "train_rephrases")
        return f"EditSet({len(self)} edits, {', '.join(told)})"

    def to_records(self) -> list[dict]:
        """Return the edits as plain dictionaries with the columns of `EDIT_FEATURES`.

        Returns:
            `list[dict]`: One dictionary an edit.
        """
        return list(iter_rows(self._data))

    def iter_jsonl(self) -> Iterator[str]:
        """Yield the edits as JSON Lines, without fields that are empty.

        Returns:
            `Iterator[str]`: One line an edit, with its line end.
        """
        for row in iter_rows(self._data):
            for name in _PROBE_FIELDS:
                row[name] = [{k: v for k, v in probe.items() if v is not None} for probe in row[name]]
            yield json.dumps({k: v for k, v in row.items() if v}, ensure_ascii=False) + "\n"

    def to_jsonl(self) -> str:
        """Return the edits as JSON Lines, without fields that are empty.

        Returns:
            `str`: One line an edit; [`load_edits`] reads it back to the same edits.
        """
        return "".join(self.iter_jsonl())

    def save(self, path: str | os.PathLike) -> None:
        """Write the edits as JSON Lines. An existing file is replaced in one step, so it is never half written.

        Args:
            path (`str` or `os.PathLike`):
                The file to write.
        """
        write_atomically(path, self)


_PROBE_FIELDS = ("locality", "portability")
_LIST_FIELDS = ("rephrases", "train_rephrases", *_PROBE_FIELDS)


def write_atomically(path: str | os.PathLike, content: str | EditSet | Iterable[str]) -> None:
    """Write a text file so that a reader, or a process killed halfway, sees the old content or the new, never a part.

    Args:
        path (`str` or `os.PathLike`):
            The file to write. Its folder is made if it is missing.
        content (`str`, [`EditSet`] or `Iterable[str]`):
            The content: a text, edits, which are written as JSON Lines, or pieces of a text.
    """
    if isinstance(content, EditSet):
        content = content.iter_jsonl()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines([content] if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def store_edits(edits: Iterable[Edit]) -> tuple[Dataset, list[int]]:
    """Write edits to disk, and find those that may clash, without holding more of each than two numbers.

    Args:
        edits (`Iterable[Edit]`):
            The edits, in order.

    Returns:
        `tuple[Dataset, list[int]]`: A dataset with the columns of `EDIT_FEATURES`, and the positions of all edits whose
        prompt or id is also another one's.
    """
    hashes = {"prompt": array("q"), "id": array("q")}

    def rows() -> Iterator[dict]:
        for edit in edits:
            row = {name: getattr(edit, name) for name in EDIT_FEATURES}
            for name in _PROBE_FIELDS:
                row[name] = [{"prompt": probe.prompt, "answer": probe.answer} for probe in row[name]]
            for name, found in hashes.items():
                found.append(hash(row[name]))
            yield row

    data = write_rows(rows(), EDIT_FEATURES)
    suspects: set[int] = set()
    for found in hashes.values():
        # Equal texts have equal hashes. Different ones that happen to share theirs only are looked at for nothing.
        keys = pyarrow.array(found, pyarrow.int64())
        values, counts = compute.value_counts(keys).flatten()
        shared = compute.is_in(keys, values.filter(compute.greater(counts, 1)))
        suspects.update(compute.indices_nonzero(shared).to_pylist())
    return data, sorted(suspects)


def describe_clashes(edits: Sequence[Edit], names: Sequence[str]) -> list[str]:
    """Say which edits cannot stand beside an earlier one: a second target for its prompt, or its id once more.

    Args:
        edits (`Sequence[Edit]`):
            The edits in order.
        names (`Sequence[str]`):
            How to call each edit, for example by its line in a file.

    Returns:
        `list[str]`: One sentence for each such edit, in order.
    """
    by_prompt: dict[str, int] = {}
    by_id: dict[str, int] = {}
    clashes = []
    for index, edit in enumerate(edits):
        earlier = by_prompt.setdefault(edit.prompt, index)
        if earlier != index:
            if edit.target == edits[earlier].target:
                reason = f"is a duplicate of {names[earlier]}: prompt {edit.prompt!r}, target {edit.target!r}"
            else:
                reason = (
                    f"is in conflict with {names[earlier]}: prompt {edit.prompt!r} has the target {edit.target!r} "
                    f"here and {edits[earlier].target!r} there"
                )
            clashes.append(f"{names[index]} {reason}")
        elif (earlier := by_id.setdefault(edit.id, index)) != index:
            clashes.append(f"{names[index]} has the `id` {edit.id!r} of {names[earlier]}, expected one of its own")
    return clashes


def describe_crossed(edits: EditSet, name: Callable[[int], str]) -> list[str]:
    """Say which `train_rephrases` would teach another edit's prompt or `train_rephrases` a target of their own, or are scored
    as another edit's `rephrases`.

    Args:
        edits ([`EditSet`]):
            The edits.
        name (`Callable[[int], str]`):
            How to call the edit at a position, for example by its line in a file.

    Returns:
        `list[str]`: One sentence for each such text.
    """
    rows = edits.to_dataset().select_columns(["prompt", "target", "rephrases", "train_rephrases"])
    owners: dict[str, int] = {}
    targets: dict[int, str] = {}
    clashes = []

    def clash(position: int, text: str, target: str, kind: str) -> None:
        owner = owners[text]
        clashes.append(
            f"{name(position)} is in conflict with {name(owner)}: {kind} {text!r} has the target {target!r} here, and as one of "
            f"the `train_rephrases` {targets[owner]!r} there"
        )

    for position, row in enumerate(iter_rows(rows)):
        for text in row["train_rephrases"]:
            targets.setdefault(position, row["target"])
            if targets[owners.setdefault(text, position)] != row["target"]:
                clash(position, text, row["target"], "the training rephrase")
    for position, row in enumerate(iter_rows(rows) if owners else ()):
        if row["prompt"] in owners and targets[owners[row["prompt"]]] != row["target"]:
            clash(position, row["prompt"], row["target"], "the prompt")
        clashes += [
            f"{name(position)} has {text!r} in its `rephrases` and {name(owners[text])} in its `train_rephrases`: what is trained on "
            "cannot be scored, leave it out of one of them"
            for text in row["rephrases"]
            if text in owners
        ]
    return clashes


def merge_probes(edit: Edit, other: Edit) -> Edit:
    """Join two records of one and the same edit, keeping every probe once.

    Args:
        edit (`Edit`):
            The record that gives id, subject and source where it has them.
        other (`Edit`):
            A record with the same prompt and target.

    Returns:
        [`Edit`]: The joined edit.
    """
    merged = {name: tuple(dict.fromkeys(getattr(edit, name) + getattr(other, name))) for name in _LIST_FIELDS}
    # What one record scores, the other may not train on.
    scored = {*merged["rephrases"], *(probe.prompt for name in _PROBE_FIELDS for probe in merged[name])}
    merged["train_rephrases"] = tuple(text for text in merged["train_rephrases"] if text not in scored)
    return replace(edit, subject=edit.subject or other.subject, source=edit.source or other.source, **merged)
