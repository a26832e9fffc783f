"""Read edits from a file, a folder, the Hub, a dataset or records, and report every fault at once."""

from __future__ import annotations

import csv
import json
import os
import re
import warnings
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

import pyarrow
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from pyarrow.dataset import ParquetFileFormat
from pyarrow.fs import LocalFileSystem

from .edit import Edit, EditError
from .edit_set import EditSet, describe_clashes, describe_crossed, merge_probes, store_edits
from .formats import foreign_columns, to_fields
from .rows import CHUNK


LEDGER_NAME = "edits.jsonl"
_LIST_COLUMNS = ("rephrases", "train_rephrases", "locality", "portability")
_SHOWN_FAULTS = 50


class EditDataError(ValueError):
    """Edits could not be loaded.

    Args:
        source (`str`):
            What was read.
        faults (`list[str]`):
            Every fault, each with its line or row.
    """

    def __init__(self, source: str, faults: list[str]):
        self.faults = faults
        shown = [f"  {fault}" for fault in faults[:_SHOWN_FAULTS]]
        if len(faults) > len(shown):
            shown.append(f"  ... and {len(faults) - len(shown)} more (all are in the error's `faults`)")
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}, nothing was loaded:", *shown]))


def load_edits(
    source: str | os.PathLike | Dataset | EditSet | Iterable[dict | Edit],
    *,
    split: str = "train",
    on_conflict: Literal["raise", "first", "last"] = "raise",
) -> EditSet:
    """Load edits, in any common format, and check them.

    The format is recognised by the columns: the project's own (`prompt`, `target`, and optionally `subject`,
    `rephrases`, `train_rephrases`, `locality`, `portability`, `id`, `source`), TRL's `prompt` and `completion`, ZsRE, CounterFact (flat
    and nested), WikiBigEdit, and KnowEdit or EasyEdit. Records that say the same twice become one edit that keeps the
    probes of both, with a warning.

    Args:
        source (`str`, `os.PathLike`, [`~datasets.Dataset`], [`EditSet`] or `Iterable[dict]`):
            A `.json`, `.jsonl`, `.csv` or `.parquet` file, an adapter's folder (its `edits.jsonl` is read), the name
            of a dataset on the Hub, a dataset, or records.
        split (`str`, *optional*, defaults to `"train"`):
            The split to take of a dataset on the Hub.
        on_conflict (`str`, *optional*, defaults to `"raise"`):
            What to do with two edits of one prompt with different targets: `"raise"` names them, `"first"` and
            `"last"` keep the one that comes first or last in the source.

    Returns:
        [`EditSet`]: The edits, at least one.

    Raises:
        [`EditDataError`]: With every fault and its line, if the data is faulty. Nothing is loaded then.
        `FileNotFoundError`: If the file does not exist.
        `TypeError`: If `source` is a streaming dataset or of another unknown type.

    Examples:

    ```python
    >>> edits = load_edits([{"prompt": "The capital of Kazakhstan is", "target": "Astana"}])
    >>> len(edits)
    1
    ```
    """
    if on_conflict not in ("raise", "first", "last"):
        raise ValueError(f"`on_conflict` is {on_conflict!r}, expected 'raise', 'first' or 'last'")
    if isinstance(source, EditSet):
        if not len(source):
            raise EditDataError("the given EditSet", ["there are no edits"])
        return source
    title, noun, records = _open(source, split)
    numbers = array("q")
    faults: list[str] = []
    foreign: set[str] = set()

    def valid_edits() -> Iterator[Edit]:
        for number, record in records:
            try:
                if isinstance(record, _Unreadable):
                    raise EditError([record.reason])
                edit = record if isinstance(record, Edit) else Edit(**to_fields(record))
            except EditError as error:
                faults.extend(f"{noun} {number}: {fault}" for fault in error.faults)
                continue
            numbers.append(number)
            foreign.update(foreign_columns(record) if isinstance(record, dict) else ())
            yield edit

    data, suspects = store_edits(valid_edits())
    edits = EditSet.of(data)
    if not len(edits) and not faults:
        faults = ["there are no edits"]
    places = {position: f"{noun} {numbers[position]}" for position in suspects}
    kept = _resolve(title, {position: edits[position] for position in suspects}, places, on_conflict)
    clashes = describe_clashes(list(kept.values()), [places[position] for position in kept])
    if any("is in conflict with" in clash for clash in clashes):
        clashes.append("to settle conflicts, remove one of each two, or load with `on_conflict='first'` or `'last'`")
    if len(kept) == len(suspects):  # or else they are looked for in what is left
        clashes += describe_crossed(edits, lambda position: f"{noun} {numbers[position]}")
    if faults or clashes:
        raise EditDataError(title, faults + clashes)
    if foreign:
        warnings.warn(f"{title}: the columns {sorted(foreign)} are no part of an edit and were left out", stacklevel=2)
    if len(kept) == len(suspects):
        return edits
    replaced = dict.fromkeys(suspects) | kept
    resolved = (replaced.get(position, edit) for position, edit in enumerate(edits))
    return EditSet(edit for edit in resolved if edit is not None)


class _Unreadable:
    """Stands in the stream of records for a piece of the source that could not be parsed."""

    def __init__(self, reason: str):
        self.reason = reason


def _resolve(title: str, edits: dict[int, Edit], places: dict[int, str], on_conflict: str) -> dict[int, Edit]:
    """Merge duplicates, and settle conflicts if that was asked for; say both in one warning each.

    `edits` and `places` are by position. What is kept of several edits has the position of the first of them, and there
    `places` then names the one that is kept.
    """
    kept: dict[int, Edit] = {}
    first: dict[Any, int] = {}
    merged, settled = [], []
    for position, edit in edits.items():
        # A conflict that is not to be settled keeps both edits, so that it can be reported.
        at = first.setdefault((edit.prompt, edit.target) if on_conflict == "raise" else edit.prompt, position)
        if at == position:
            kept[at] = edit
        elif kept[at].target == edit.target:
            kept[at] = merge_probes(kept[at], edit)
            merged.append(f"{places[position]} into {places[at]}")
        else:
            settled.append(f"{places[position]} and {places[at]}")
            if on_conflict == "last":
                kept[at], places[at] = edit, places[position]
    if merged:
        warnings.warn(f"{title}: {len(merged)} duplicates were merged: {_some(merged)}", stacklevel=3)
    if settled:
        warnings.warn(
            f"{title}: {len(settled)} conflicts were settled for the {on_conflict} edit: {_some(settled)}",
            stacklevel=3,
        )
    return kept


def _some(items: list[str], most: int = 10) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _open(source: Any, split: str) -> tuple[str, str, Iterator[tuple[int, Any]]]:
    """Return a title for messages, what the source is counted in, and the records with their numbers in it."""
    if isinstance(source, (IterableDataset, IterableDatasetDict)):
        raise TypeError(
            "a streaming dataset was given, expected one of known length: breadth-first editing visits every edit in "
            "every epoch. Load it without `streaming=True`"
        )
    if isinstance(source, DatasetDict):
        raise TypeError(
            f"a dataset with the splits {sorted(source)} was given, expected one of them: pass `data[split]`"
        )
    if isinstance(source, Dataset):
        return "the given dataset", "row", enumerate(source, 1)
    if not isinstance(source, (str, os.PathLike)):
        if not isinstance(source, Iterable):
            raise TypeError(
                f"edits were given as a {type(source).__name__}, expected a path, the name of a dataset on the Hub, a "
                "dataset, an EditSet or records"
            )
        return "the given records", "record", enumerate(source, 1)
    path = Path(source)
    if path.is_dir():
        path = path / LEDGER_NAME
    if not path.is_file():
        # "name" or "owner/name", with no ending of a data file: what the Hub calls a dataset.
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in _READERS:
            return f"dataset {source!r}", "row", enumerate(load_dataset(str(source), split=split), 1)
        raise FileNotFoundError(f"{path} does not exist: give a file of edits or the name of a dataset on the Hub")
    if path.suffix not in _READERS:
        raise EditDataError(str(path), [f"its ending is {path.suffix!r}, expected one of {sorted(_READERS)}"])
    noun = "row" if path.suffix == ".parquet" else "line"
    return str(path), noun, _READERS[path.suffix](path)


@contextmanager
def _open_text(path: Path, newline: str) -> Iterator[TextIO]:
    """Open a text file, without changing its line ends. That it cannot be read is its only fault."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        try:
            path.read_bytes().decode("utf-8-sig")  # knows the place in the file, where the stream knows it in a piece
        except UnicodeDecodeError as error:
            raise EditDataError(str(path), [f"it is not UTF-8 text: {error}"]) from error
        raise
    except OSError as error:
        raise EditDataError(str(path), [f"it cannot be read: {error.strerror}"]) from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with _open_text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line.removesuffix("\n"))
                except json.JSONDecodeError as error:
                    yield number, _Unreadable(f"not JSON: {error.msg} at column {error.colno}")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Read an array of records, or one record, with the line on which each begins."""
    with _open_text(path, newline="") as file:
        text = file.read()
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(path)  # one object a line, whatever the file is called
        else:
            yield error.lineno, _Unreadable(f"not JSON: {error.msg} at column {error.colno}")
        return
    if not isinstance(data, list):
        yield 1, data
        return
    decoder, position, counted, line = json.JSONDecoder(), text.index("[") + 1, 0, 1
    for record in data:
        position = _BETWEEN_RECORDS.match(text, position).end()
        line += text.count("\n", counted, position)
        counted = position
        yield line, record
        position = decoder.raw_decode(text, position)[1]


_BETWEEN_RECORDS = re.compile(r"[\s,]*")


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    with _open_text(path, newline="") as file:  # a stream: `str.splitlines` would cut a cell at U+2028 or a form feed
        yield from _csv_records(csv.reader(file, strict=True))


def _csv_records(reader: Any) -> Iterator[tuple[int, Any]]:
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # where the record begins: a quoted cell may hold line breaks
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield line, _Unreadable(f"not CSV: {error}; reading ended")
            return
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            continue
        if len(cells) > len(header):
            yield line, _Unreadable(f"it has {len(cells) - len(header)} cells more than the header")
            continue
        # An empty cell is a missing value.
        record: dict[str, Any] = dict.fromkeys(header) | {name: cell for name, cell in zip(header, cells) if cell}
        try:
            for name in _LIST_COLUMNS:
                if record.get(name):
                    record[name] = json.loads(record[name])
            yield line, record
        except json.JSONDecodeError:
            yield line, _Unreadable(f"`{name}` is {record[name]!r}, expected a JSON list")


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        batches = ParquetFileFormat().make_fragment(str(path), LocalFileSystem()).to_batches(batch_size=CHUNK)
        yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise EditDataError(str(path), [f"it cannot be read as Parquet: {error}"]) from error


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
