"""Rows on disk: Arrow files that are memory-mapped, so that many edits need no more memory than few."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar, overload

import pyarrow
from datasets import Dataset, Features


T = TypeVar("T")
# Rows that are held in memory at once. Fewer than these are never written to disk.
CHUNK = 1000


def write_rows(rows: Iterable[dict[str, Any]], features: Features) -> Dataset:
    """Write rows into a temporary Arrow file, a chunk at a time. It is removed when the process ends.

    Args:
        rows (`Iterable[dict]`):
            The rows, each with every column.
        features ([`~datasets.Features`]):
            The columns.

    Returns:
        [`~datasets.Dataset`]: The rows, memory-mapped; in memory if they are fewer than `CHUNK`.
    """
    rows, schema = iter(rows), features.arrow_schema

    def next_table() -> pyarrow.Table:
        return pyarrow.Table.from_pylist(list(islice(rows, CHUNK)), schema=schema)

    table = next_table()
    if len(table) < CHUNK:
        return Dataset(table)
    descriptor, path = tempfile.mkstemp(suffix=".arrow", dir=_temporary_folder())
    with open(descriptor, "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        while len(table):
            writer.write_table(table)
            table = next_table()
    return Dataset.from_file(path)


@functools.cache
def _temporary_folder() -> str:
    # One for the process and not one for each dataset: what is derived from a dataset, perhaps in another process,
    # reads the same file, and may outlive it.
    folder, owner = tempfile.mkdtemp(prefix="peft-locft-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not at the end of a process that was forked from it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def iter_rows(data: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the rows of a dataset. Iterating over the dataset itself does the same, 20 times slower.

    Args:
        data ([`~datasets.Dataset`]):
            The dataset.

    Returns:
        `Iterator[dict]`: The rows.
    """
    for batch in data.iter(CHUNK):
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))


class RowSequence(Sequence[T]):
    """A sequence whose items are rows of a dataset, and are made when they are asked for."""

    _data: Dataset

    @classmethod
    def of(cls, data: Dataset) -> RowSequence[T]:
        """Return the sequence of a dataset's rows, as they are.

        Args:
            data ([`~datasets.Dataset`]):
                The rows.

        Returns:
            [`RowSequence`]: The sequence.
        """
        sequence = cls.__new__(cls)
        sequence._data = data
        return sequence

    def _item(self, row: dict[str, Any]) -> T:
        """Make an item of a row. The rows are items themselves where a subclass says nothing else."""
        return row

    def to_dataset(self) -> Dataset:
        """Return the rows as a dataset.

        Returns:
            [`~datasets.Dataset`]: One row an item.
        """
        return self._data.with_format(None)  # a copy, because a format can be set in place

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[T]:
        return map(self._item, iter_rows(self._data))

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> RowSequence[T]: ...

    def __getitem__(self, index):
        chosen = range(len(self))[index]
        if isinstance(chosen, range):
            return self.of(self._data.select(chosen or []))  # an empty range may begin beyond the rows
        return self._item(self._data[chosen])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (RowSequence, list)) or len(self) != len(other):
            return False
        return self is other or all(mine == theirs for mine, theirs in zip(self, other))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows)"

    def __deepcopy__(self, memo: dict) -> RowSequence[T]:
        return self  # it cannot be changed

    def __reduce__(self):
        # With the rows, and not with the name of a file that is gone when this process ends.
        return _unpickle, (type(self), self._data.with_format("arrow")[:])


def _unpickle(kind: type[RowSequence], table: pyarrow.Table) -> RowSequence:
    return kind.of(Dataset(table))
