"""Rows on disk: the same as in memory, whoever reads them and whenever."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Features, List, Value

from peft_locft.edits import Edit, EditSet, rows
from peft_locft.edits.rows import CHUNK, RowSequence, iter_rows, write_rows


FEATURES = Features({"number": Value("int64"), "texts": List(Value("string")), "name": Value("string")})


def plain_rows(count: int) -> list[dict]:
    return [
        {"number": n, "texts": [str(n)] * (n % 3), "name": None if n % 5 == 0 else f"é {n}\u2028\n"}
        for n in range(count)
    ]


def edits_of(count: int) -> list[Edit]:
    return [
        Edit(f"The capital of land {n} is", f"Town {n}", rephrases=[f"Land {n}?"] * (n % 2), locality=["It is"])
        for n in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_rows_come_back_as_they_were(count):
    data = write_rows(iter(plain_rows(count)), FEATURES)
    assert data.features == FEATURES
    assert list(iter_rows(data)) == plain_rows(count) == data.to_list()
    # Many rows are on the disk, few in memory.
    assert bool(data.cache_files) == (count >= CHUNK)


def test_rows_are_taken_as_they_are_needed_and_not_all_at_once(monkeypatch):
    held = []
    table = rows.pyarrow.Table.from_pylist

    class Counted:
        @staticmethod
        def from_pylist(some, schema):
            held.append(len(some))
            return table(some, schema=schema)

    monkeypatch.setattr(rows.pyarrow, "Table", Counted)
    write_rows(iter(plain_rows(5 * CHUNK + 7)), FEATURES)
    assert max(held) == CHUNK and sum(held) == 5 * CHUNK + 7


def test_a_sequence_is_equal_to_the_list_of_its_items():
    plain = plain_rows(CHUNK + 3)
    sequence = RowSequence.of(write_rows(plain, FEATURES))
    assert sequence == plain and plain == sequence
    assert sequence[-2] == plain[-2] and sequence[CHUNK:] == plain[CHUNK:] and sequence[::-400] == plain[::-400]
    assert sequence != plain[:-1] and sequence != [*plain[:-1], plain[0]]
    assert sequence != tuple(plain) and sequence != "text"
    for index, error in ((len(plain), IndexError), (-len(plain) - 1, IndexError), ("name", TypeError)):
        with pytest.raises(error):
            sequence[index]


@pytest.mark.parametrize("count", [5, 2 * CHUNK])
def test_many_edits_are_a_sequence_as_few_are(count):
    plain, edits = edits_of(count), EditSet(edits_of(count))
    assert list(edits) == plain
    assert [edits[0], edits[count // 2], edits[-1]] == [plain[0], plain[count // 2], plain[-1]]
    for part in (slice(3), slice(count // 2, None), slice(None, None, -1), slice(1, None, 2), slice(count, None)):
        assert list(edits[part]) == plain[part]
        assert edits[part] == EditSet(plain[part]) and hash(edits[part]) == hash(EditSet(plain[part]))
    assert edits != EditSet([*plain[:-1], Edit("Another is", "one")])
    assert repr(edits) == f"EditSet({count} edits, {count // 2} rephrases, {count} locality, 0 portability)"


@pytest.mark.parametrize("part", [slice(None), slice(2, -2), slice(None, None, 3)])
def test_pickled_edits_need_no_file(tmp_path, part):
    # The process that pickles them ends, and its files with it.
    code = (
        "import pickle, sys; from peft_locft import Edit, EditSet\n"
        f"edits = EditSet(Edit(f'The capital of land {{n}} is', f'Town {{n}}') for n in range({CHUNK + 9}))\n"
        "print(edits.to_dataset().cache_files[0]['filename'])\n"
        f"pickle.dump(edits[{part}], open(sys.argv[1], 'wb'))"
    )
    path = tmp_path / "edits.pickle"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.strip())
    assert file.suffix == ".arrow" and file.parent.name.startswith("peft-locft-") and not file.parent.exists()
    plain = [Edit(f"The capital of land {n} is", f"Town {n}") for n in range(CHUNK + 9)]
    assert list(pickle.loads(path.read_bytes())) == plain[part]


def test_a_forked_process_leaves_the_files_of_its_parent_alone():
    code = (
        "import os; from peft_locft import Edit, EditSet\n"
        f"edits = EditSet(Edit(f'Land {{n}} is', 'big') for n in range({CHUNK}))\n"
        "child = os.fork()\n"
        "if not child: raise SystemExit\n"
        "os.waitpid(child, 0)\n"
        "assert os.path.exists(edits.to_dataset().cache_files[0]['filename'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_deep_copy_is_the_same_and_a_dataset_is_the_callers_own():
    edits = EditSet(edits_of(3))
    assert copy.deepcopy(edits) is edits
    edits.to_dataset().set_format("numpy")
    assert edits[1].rephrases == ("Land 1?",)
