"""Many edits: a sequence without clashes that survives every file."""

import csv
import json
import os
import random

import datasets
import pytest

from peft_locft.edits import EDIT_FEATURES, Edit, EditConflictError, EditSet, Probe, load_edits, write_atomically
from peft_locft.edits.edit_set import describe_clashes, merge_probes


FULL = Edit(
    "The capital of Kazakhstan is",
    "Astana",
    subject="Kazakhstan",
    rephrases=("Kazakhstan's capital is", "Kazakhstan is ruled from"),
    locality=(Probe("The capital of France is", "Paris"), Probe("The capital of Mali is")),
    portability=(Probe("Kazakhstan's parliament sits in", "Astana"),),
    id="kz",
    source="https://example.org/kz",
)
PLAIN = Edit("The chancellor of Germany is", "Friedrich Merz")
THIRD = Edit("The river through Paris is the", "Marne", rephrases=("Through Paris flows the",))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def edits() -> EditSet:
    return EditSet([FULL, PLAIN, THIRD])


def test_is_a_sequence(edits):
    assert len(edits) == 3
    assert list(edits) == [FULL, PLAIN, THIRD]
    assert (edits[0], edits[-1]) == (FULL, THIRD)
    assert PLAIN in edits
    assert edits.index(THIRD) == 2
    with pytest.raises(IndexError):
        edits[3]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (slice(1), [FULL]),
        (slice(1, None), [PLAIN, THIRD]),
        (slice(None, None, -2), [THIRD, FULL]),
        (slice(5, 9), []),
    ],
)
def test_slice_is_an_edit_set(edits, part, expected):
    assert isinstance(edits[part], EditSet)
    assert list(edits[part]) == expected


def test_equality_and_hash(edits):
    same = EditSet(iter([FULL, PLAIN, THIRD]))
    assert edits == same
    assert hash(edits) == hash(same)
    assert edits != EditSet([PLAIN, FULL, THIRD])
    assert edits != edits[:2]
    assert edits != [FULL, PLAIN, THIRD]


def test_does_not_share_the_callers_list():
    given = [FULL]
    edits = EditSet(given)
    given.append(PLAIN)
    assert list(edits) == [FULL]


def test_repr_counts_edits_and_probes(edits):
    assert repr(edits) == "EditSet(3 edits, 3 rephrases, 2 locality, 1 portability)"


@pytest.mark.parametrize(
    ("edits", "sentence"),
    [
        (
            [Edit("A is", "b"), Edit("C is", "d"), Edit("A is", "c")],
            "edit 3 is in conflict with edit 1: prompt 'A is' has the target 'c' here and 'b' there",
        ),
        (
            [Edit("A is", "b"), Edit("A is", "b", id="other")],
            "edit 2 is a duplicate of edit 1: prompt 'A is', target 'b'",
        ),
        (
            [Edit("A is", "b", id="7"), Edit("B is", "c", id="7")],
            "edit 2 has the `id` '7' of edit 1, expected one of its own",
        ),
        (
            [Edit("A is", "x", train_rephrases=["Tell A"]), Edit("B is", "y", train_rephrases=["Tell A"])],
            "edit 2 is in conflict with edit 1: the training rephrase 'Tell A' has the target 'y' here, and as one of the "
            "`train_rephrases` 'x' there",
        ),
        (
            [Edit("A is", "x"), Edit("B is", "y", train_rephrases=["A is"])],
            "edit 1 is in conflict with edit 2: the prompt 'A is' has the target 'x' here, and as one of the `train_rephrases` "
            "'y' there",
        ),
        (
            [Edit("A is", "x", rephrases=["What is A?"]), Edit("A's", "x", train_rephrases=["What is A?"])],
            "edit 1 has 'What is A?' in its `rephrases` and edit 2 in its `train_rephrases`: what is trained on cannot be scored, "
            "leave it out of one of them",
        ),
    ],
)
def test_clash_is_refused(edits, sentence):
    with pytest.raises(EditConflictError) as raised:
        EditSet(edits)
    assert str(raised.value) == f"1 of {len(edits)} edits clash:\n  {sentence}"


def test_what_is_trained_in_other_words_may_be_shared_by_edits_with_one_target():
    edits = [Edit("A is", "x", train_rephrases=["Tell A", "B is"]), Edit("B is", "x", train_rephrases=["Tell A"])]
    assert list(EditSet(edits)) == edits


def test_all_clashes_at_once_by_the_given_names():
    edits = [Edit("A is", "b", id="1"), Edit("A is", "c"), Edit("A is", "d"), Edit("B is", "b", id="1")]
    clashes = describe_clashes(edits, ["line 2", "line 4", "line 9", "line 11"])
    assert clashes == [
        "line 4 is in conflict with line 2: prompt 'A is' has the target 'c' here and 'b' there",
        "line 9 is in conflict with line 2: prompt 'A is' has the target 'd' here and 'b' there",
        "line 11 has the `id` '1' of line 2, expected one of its own",
    ]


def test_merge_keeps_the_probes_of_both_once():
    one = Edit("A is", "b", rephrases=["r1", "r2"], locality=["l1"], id="one", source="s1")
    two = Edit("A is", "b", subject="A", rephrases=["r2", "r3"], portability=[Probe("p", "q")], id="two", source="s2")
    assert merge_probes(one, two) == Edit(
        "A is",
        "b",
        subject="A",
        rephrases=["r1", "r2", "r3"],
        locality=["l1"],
        portability=[Probe("p", "q")],
        id="one",
        source="s1",
    )


@pytest.mark.parametrize(
    "scored", [{"rephrases": ["Tell A"]}, {"locality": ["Tell A"]}, {"portability": [Probe("Tell A", "c")]}]
)
def test_merge_does_not_train_on_what_one_record_scores(scored):
    trained = Edit("A is", "b", train_rephrases=["Tell A", "Say A"])
    assert merge_probes(trained, Edit("A is", "b", **scored)).train_rephrases == ("Say A",)


def test_merge_takes_subject_and_source_from_where_they_are():
    bare, told = Edit("A is", "b"), Edit("A is", "b", subject="A", source="s")
    assert merge_probes(bare, told) == merge_probes(told, bare) == told


def test_records_have_the_columns_in_order(edits):
    records = edits.to_records()
    assert [list(record) for record in records] == [list(EDIT_FEATURES)] * 3
    assert records[0]["locality"][1] == {"prompt": "The capital of Mali is", "answer": None}


def test_jsonl_leaves_empty_fields_out():
    text = EditSet([PLAIN, Edit("Ä", "ö", locality=[Probe("a"), Probe("b", "c")], id="1")]).to_jsonl()
    first, second, rest = text.split("\n")
    assert json.loads(first) == {"id": PLAIN.id, "prompt": PLAIN.prompt, "target": PLAIN.target}
    assert second == (
        '{"id": "1", "prompt": "Ä", "target": "ö", "locality": [{"prompt": "a"}, {"prompt": "b", "answer": "c"}]}'
    )
    assert rest == ""


def test_jsonl_is_that_of_each_edit_alone(edits):
    assert "".join(edits.iter_jsonl()) == edits.to_jsonl() == "".join(EditSet([edit]).to_jsonl() for edit in edits)


@pytest.mark.parametrize("content", ["text\nof lines\n", ["text", "\nof ", "lines\n"]])
def test_a_text_may_be_written_whole_or_in_pieces(tmp_path, content):
    write_atomically(tmp_path / "x.txt", content)
    assert (tmp_path / "x.txt").read_text() == "text\nof lines\n"


def test_edits_are_written_as_json_lines(edits, tmp_path):
    write_atomically(tmp_path / "x", edits)
    assert (tmp_path / "x").read_text(encoding="utf-8") == edits.to_jsonl()


def test_different_texts_of_one_hash_do_not_clash(monkeypatch):
    monkeypatch.setattr("peft_locft.edits.edit_set.hash", lambda text: 7, raising=False)
    edits = EditSet([FULL, PLAIN, THIRD])
    assert list(edits) == [FULL, PLAIN, THIRD] and load_edits(list(edits)) == edits
    with pytest.raises(EditConflictError, match="^1 of 3 edits clash:\n  edit 3 is a duplicate of edit 1"):
        EditSet([FULL, PLAIN, FULL])


def test_save_and_load_again(edits, tmp_path):
    path = tmp_path / "new" / "folder" / "edits.jsonl"
    edits.save(path)
    assert load_edits(path) == edits
    assert [edit.id for edit in load_edits(path)] == ["kz", PLAIN.id, THIRD.id]


def test_dataset_and_parquet_round_trip(edits, tmp_path):
    data = edits.to_dataset()
    assert data.features == EDIT_FEATURES
    assert load_edits(data) == edits
    data.to_parquet(str(tmp_path / "edits.parquet"))
    assert load_edits(tmp_path / "edits.parquet") == edits


def test_dataset_without_any_probe_has_the_same_columns():
    data = EditSet([PLAIN]).to_dataset()
    assert data.features == EDIT_FEATURES
    assert load_edits(data) == EditSet([PLAIN])
    assert EditSet([]).to_dataset().features == EDIT_FEATURES


def fail(*args):
    raise OSError("no space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", ["old content\n", None])
def test_failed_save_leaves_the_old_file_and_nothing_else(edits, tmp_path, monkeypatch, step, old):
    path = tmp_path / "edits.jsonl"
    if old is not None:
        path.write_text(old)
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        edits.save(path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({"edits.jsonl": old} if old else {})


def test_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert [file.name for file in tmp_path.iterdir()] == ["report.txt"]
    assert path.read_text() == "old"


def test_new_content_is_on_the_disk_before_it_replaces_the_old(tmp_path, monkeypatch):
    path = tmp_path / "edits.jsonl"
    path.write_text("old")
    steps, fsync, put = [], os.fsync, os.replace

    def spy_fsync(descriptor):
        steps.append(("fsync", os.fstat(descriptor).st_size, path.read_text()))
        fsync(descriptor)

    def spy_replace(source, target):
        steps.append(("replace", os.stat(source).st_size, path.read_text()))
        assert os.path.dirname(source) == str(tmp_path)  # on another file system it would be no single step
        put(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_atomically(str(path), "new content")
    assert steps == [("fsync", 11, "old"), ("replace", 11, "old")]
    assert path.read_text() == "new content"


# Line ends of every kind and what merely looks like one, quotes of JSON and CSV, marks that decoders swallow.
PIECES = [
    *"ab,;:\"'`\\/{}[]\t\n\r \u2028\u2029\x85\x0b\x0c\x1c\ufeff\xa0éß漢\u0301",
    "\r\n",
    "👩‍👩‍👧",
    "🇰🇿",
    "𝔘",
    "null",
    "NaN",
    '""',
]


def random_text(rng: random.Random, most: int = 12) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(0, most))) + rng.choice("xyz。🙂")


def random_edits(seed: int) -> EditSet:
    rng = random.Random(seed)

    def probes() -> list[Probe]:
        return [Probe(random_text(rng), random_text(rng)) for _ in range(rng.randint(0, 2))]

    return EditSet(
        Edit(
            f"{random_text(rng)}{number}",  # the number keeps the prompts apart
            random_text(rng),
            subject=rng.choice([None, random_text(rng)]),
            rephrases=[random_text(rng) for _ in range(rng.randint(0, 2))],
            locality=[*probes(), Probe(random_text(rng))],
            portability=probes(),
            source=rng.choice([None, random_text(rng)]),
        )
        for number in range(20)
    )


def write_csv(edits: EditSet, path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(EDIT_FEATURES))
        writer.writeheader()
        writer.writerows(
            {k: json.dumps(v) if isinstance(v, (list, tuple)) else v for k, v in record.items()}
            for record in edits.to_records()
        )


WRITERS = {
    "edits.jsonl": lambda edits, path: edits.save(path),
    "edits.json": lambda edits, path: path.write_text(json.dumps(edits.to_records(), indent=1, ensure_ascii=False)),
    "ascii.json": lambda edits, path: path.write_text(json.dumps(edits.to_records())),
    "edits.csv": write_csv,
    "edits.parquet": lambda edits, path: edits.to_dataset().to_parquet(str(path)),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("seed", range(5))
def test_random_text_survives_every_file(tmp_path, name, seed):
    edits = random_edits(seed)
    WRITERS[name](edits, tmp_path / name)
    assert load_edits(tmp_path / name) == edits


def test_random_text_covers_what_it_is_for():
    prompts = "".join(edit.prompt for seed in range(5) for edit in random_edits(seed))
    assert not [piece for piece in PIECES if piece not in prompts]
