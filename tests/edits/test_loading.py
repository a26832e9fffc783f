"""Reading edits from every container, and what is said of every fault."""

import csv
import json

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict

from peft_locft.edits import Edit, EditDataError, EditSet, Probe, load_edits, loading
from peft_locft.edits.rows import CHUNK


A, B = Edit("A is", "b"), Edit("C is", "d")
ROW_A, ROW_B = {"prompt": "A is", "target": "b"}, {"prompt": "C is", "target": "d"}
JSON_A, JSON_B = json.dumps(ROW_A), json.dumps(ROW_B)
MISSING = "`target` is missing"
STREAMING = (
    "a streaming dataset was given, expected one of known length: breadth-first editing visits every edit in every "
    "epoch. Load it without `streaming=True`"
)
ACCEPTED = "a path, the name of a dataset on the Hub, a dataset, an EditSet or records"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def faults_of(source, **options) -> list[str]:
    with pytest.raises(EditDataError) as raised:
        load_edits(source, **options)
    title = source if isinstance(source, str) or hasattr(source, "suffix") else "the given records"
    faults = raised.value.faults
    assert str(raised.value) == (
        f"{title}: {len(faults)} fault{'s' * (len(faults) > 1)}, nothing was loaded:\n  " + "\n  ".join(faults)
    )
    return faults


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.json", f"[{JSON_A}, {JSON_B}]"),
        ("pretty.json", json.dumps([ROW_A, ROW_B], indent=4)),
        ("bom.json", f"\ufeff[{JSON_A}, {JSON_B}]"),
        ("lines.json", f"\n{JSON_A}\n\n{JSON_B}\n"),
        ("lines.jsonl", f"{JSON_A}\n{JSON_B}"),
        ("blank_lines.jsonl", f"\n\n{JSON_A}\n  \n{JSON_B}\n\n"),
        ("dos.jsonl", f"\ufeff{JSON_A}\r\n{JSON_B}\r\n"),
        ("table.csv", "prompt,target\nA is,b\nC is,d\n"),
        ("dos.csv", '\ufeffprompt,target\r\n"A is",b\r\nC is,d\r\n'),
        ("blank_lines.csv", "\nprompt,target\n\nA is,b\n\n\nC is,d"),
        ("other_formats.json", json.dumps([{"src": "A is", "alt": "b"}, {"prompt": "C is", "completion": " d"}])),
    ],
)
def test_text_file(write, name, content):
    assert load_edits(write(name, content)) == EditSet([A, B])
    assert load_edits(str(write(name, content))) == EditSet([A, B])


@pytest.mark.parametrize("indent", [None, 2])
def test_json_of_one_object(write, indent):
    assert load_edits(write("one.json", json.dumps(ROW_A, indent=indent))) == EditSet([A])


def test_csv_with_line_breaks_lists_and_empty_cells(write):
    text = (
        "id,prompt,target,rephrases,locality,portability,subject\n"
        '1,"Q: A?\n\nA:","b, or ""B""","[""A?"", ""A\\n?""]","[""L"", {""prompt"": ""M"", ""answer"": ""m""}]",,\n'
        ',C is,d,,,"[{""prompt"": ""P"", ""answer"": ""p""}]",C\n'
        "short,E is,f\n"
    )
    assert list(load_edits(write("edits.csv", text))) == [
        Edit("Q: A?\n\nA:", 'b, or "B"', id="1", rephrases=["A?", "A\n?"], locality=["L", Probe("M", "m")]),
        Edit("C is", "d", subject="C", portability=[Probe("P", "p")]),
        Edit("E is", "f", id="short"),
    ]


@pytest.mark.parametrize("mark", ["\u2028", "\x0c", "\x85", "\x1d"])
def test_csv_cell_is_not_cut_at_what_only_looks_like_a_line_end(write, mark):
    assert load_edits(write("edits.csv", f"prompt,target\nA{mark}is,b\n"))[0].prompt == f"A{mark}is"


def test_dataset():
    rows = [{**ROW_A, "locality": [{"prompt": "L", "answer": None}]}, {**ROW_B, "locality": []}]
    assert list(load_edits(Dataset.from_list(rows))) == [Edit("A is", "b", locality=["L"]), B]


def test_parquet(tmp_path):
    Dataset.from_list([ROW_A, ROW_B]).to_parquet(str(tmp_path / "edits.parquet"))
    assert load_edits(tmp_path / "edits.parquet") == EditSet([A, B])


@pytest.mark.parametrize("records", [[ROW_A, B], (A, ROW_B), iter([ROW_A, ROW_B])])
def test_records(records):
    assert load_edits(records) == EditSet([A, B])


def test_edit_set_passes_through():
    edits = EditSet([A, B])
    assert load_edits(edits) is edits


def test_adapter_folder(tmp_path):
    EditSet([A, B]).save(tmp_path / "edits.jsonl")
    assert load_edits(tmp_path) == load_edits(str(tmp_path)) == EditSet([A, B])


def test_folder_without_edits(tmp_path):
    with pytest.raises(FileNotFoundError, match="edits.jsonl does not exist: give a file of edits or the name of"):
        load_edits(tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_dataset_on_the_hub(monkeypatch, split):
    asked = []

    def fake(name, *, split):
        asked.append((name, split))
        return Dataset.from_list([ROW_A, {**ROW_B, "target": ""}])

    monkeypatch.setattr(loading, "load_dataset", fake)
    with pytest.raises(EditDataError, match="dataset 'owner/name.v2': 1 fault, nothing") as raised:
        load_edits("owner/name.v2", **({} if split == "train" else {"split": split}))
    assert raised.value.faults == ["row 2: `target` is empty, expected some text"]
    assert asked == [("owner/name.v2", split)]


@pytest.mark.parametrize("name", ["missing.json", "owner/missing.jsonl", "a/b/c", "no such file"])
def test_missing_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_dataset", lambda *args, **kwargs: pytest.fail("the Hub was asked"))
    with pytest.raises(FileNotFoundError) as raised:
        load_edits(name)
    assert str(raised.value) == f"{name} does not exist: give a file of edits or the name of a dataset on the Hub"


BROKEN_LINES = (
    f'{JSON_A}\n\n{{"prompt": "C is"}}\n{{"prompt": "D is", target: 1}}\n[1]\n{{"prompt": " ", "target": 5}}'
)
FAULTS_OF_LINES = [
    f"line 3: {MISSING}",
    "line 4: not JSON: Expecting property name enclosed in double quotes at column 20",
    "line 5: the record is a list, expected an object with `prompt` and `target`",
    "line 6: `prompt` is empty, expected some text",
    "line 6: `prompt` ends in white space (' '): remove it, a space is put between prompt and target",
    "line 6: `target` is a int (5), expected a string",
]


@pytest.mark.parametrize("name", ["edits.jsonl", "edits.json"])
def test_every_faulty_line_is_named(write, name):
    assert faults_of(write(name, BROKEN_LINES)) == FAULTS_OF_LINES


@pytest.mark.parametrize(
    ("name", "content", "faults"),
    [
        ("e.json", f'[\n{JSON_A},\n{{"prompt": }}\n]', ["line 3: not JSON: Expecting value at column 12"]),
        ("e.json", "", ["line 1: not JSON: Expecting value at column 1"]),
        ("e.json", "[]\n []", ["line 2: not JSON: Extra data at column 2"]),
        ("e.json", '{\n"prompt": "A is",\n"target": }', ["line 3: not JSON: Expecting value at column 11"]),
        ("e.json", "5", ["line 1: the record is a int, expected an object with `prompt` and `target`"]),
        ("e.json", '{\n"prompt": "A is"\n}', [f"line 1: {MISSING}"]),
        ("e.json", " \n[]", ["there are no edits"]),
        ("e.jsonl", "\n\n", ["there are no edits"]),
        ("e.jsonl", '{"prompt": "\\ud83d", "target": "b"}', ["line 1: `prompt` has a lone surrogate at character 1 ('\\ud83d')"]),
        ("e.csv", "", ["there are no edits"]),
        ("e.csv", "prompt,target\n\n", ["there are no edits"]),
        ("e.csv", "prompt,target\n,b\nA is, \n", ["line 2: `prompt` is missing", "line 3: `target` is empty, expected some text"]),
        ("e.csv", 'prompt,target\nA is,b\n"C is,d\nE is,f\n', ["line 3: not CSV: unexpected end of data; reading ended"]),
        ("e.csv", 'prompt,target\n"A"is,b\nC is,d\n', ["line 2: not CSV: ',' expected after '\"'; reading ended"]),
        (
            "e.csv",
            "prompt,target,locality,rephrases\nA is,b,text,[]\nC is,d,[],5\n",
            ["line 2: `locality` is 'text', expected a JSON list", "line 3: `rephrases` is a int (5), expected a list"],
        ),
        ("e.csv", "prompt;target\nA is;b\n", ["line 2: its columns ['prompt;target'] are those of no known format (needed for ..."]),
        ("e.txt", "", ["its ending is '.txt', expected one of ['.csv', '.json', '.jsonl', '.parquet']"]),
        ("edits", "", ["its ending is '', expected one of ['.csv', '.json', '.jsonl', '.parquet']"]),
        ("e.jsonl", b"\xff\xfe{", ["it is not UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 0..."]),
        ("e.csv", "prompt,target\né,b".encode("latin-1"), ["it is not UTF-8 text: 'utf-8' codec can't decode byte 0xe9 in position 14..."]),
        ("e.parquet", b"no parquet", ["it cannot be read as Parquet: Could not open Parquet input source..."]),
    ],
)  # fmt: skip
def test_faulty_file(write, name, content, faults):
    found = faults_of(write(name, content))
    assert len(found) == len(faults)
    for fault, expected in zip(found, faults):
        start, *rest = expected.split("...")
        assert fault.startswith(start) if rest else fault == expected


def test_json_records_are_named_by_the_line_on_which_they_begin(write):
    rows = [ROW_A, {"prompt": "x"}, {"prompt": 'y "],[\n', "target": "[{"}, {"prompt": "z"}]
    text = json.dumps(rows, indent=1)
    begins = [number for number, line in enumerate(text.split("\n"), 1) if line == " {"]
    faults = faults_of(write("edits.json", "\n\n" + text))
    assert [fault.split(": ")[0] for fault in faults] == [f"line {2 + begin}" for begin in begins[1:]]
    assert [fault.split(": ")[0] for fault in faults_of(write("short.json", json.dumps(rows)))] == ["line 1"] * 3


def test_csv_records_are_named_by_the_line_on_which_they_begin(write):
    text = '\nprompt,target,"no\nte"\n\nA is,\n"B\n\nis",,\n\n\n,d,e,f,g\nD is,\n'
    assert faults_of(write("edits.csv", text)) == [
        f"line 5: {MISSING}",
        f"line 6: {MISSING}",
        "line 11: it has 2 cells more than the header",
        f"line 12: {MISSING}",
    ]


def test_unreadable_file(write, monkeypatch):
    path = write("edits.jsonl", JSON_A)

    def refuse(self, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    assert faults_of(path) == ["it cannot be read: Permission denied"]


@pytest.mark.parametrize("records", [[], iter([]), {}])
def test_no_edits_at_all(records):
    assert faults_of(records) == ["there are no edits"]


def test_empty_edit_set_and_dataset_are_refused():
    for source, title in ((EditSet([]), "the given EditSet"), (Dataset.from_dict({}), "the given dataset")):
        with pytest.raises(EditDataError, match=f"^{title}: 1 fault, nothing was loaded:\n  there are no edits$"):
            load_edits(source)


def test_faulty_rows_of_a_dataset(tmp_path):
    data = Dataset.from_list([ROW_A, {"prompt": "C is", "target": None}])
    data.to_parquet(str(tmp_path / "edits.parquet"))
    assert faults_of(tmp_path / "edits.parquet") == [f"row 2: {MISSING}"]
    with pytest.raises(EditDataError, match=f"^the given dataset: 1 fault, nothing was loaded:\n  row 2: {MISSING}$"):
        load_edits(data)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Dataset.from_list([ROW_A]).to_iterable_dataset(), STREAMING),
        (IterableDatasetDict({"train": []}), STREAMING),
        (
            DatasetDict({"train": Dataset.from_list([ROW_A]), "test": Dataset.from_list([ROW_B])}),
            "a dataset with the splits ['test', 'train'] was given, expected one of them: pass `data[split]`",
        ),
        (5, f"edits were given as a int, expected {ACCEPTED}"),
        (A, f"edits were given as a Edit, expected {ACCEPTED}"),
        (None, f"edits were given as a NoneType, expected {ACCEPTED}"),
    ],
)
def test_source_of_a_wrong_type(source, message):
    with pytest.raises(TypeError) as raised:
        load_edits(source)
    assert str(raised.value) == message


def test_wrong_on_conflict():
    with pytest.raises(ValueError, match="^`on_conflict` is 'newest', expected 'raise', 'first' or 'last'$"):
        load_edits([A], on_conflict="newest")  # type: ignore[arg-type]


def test_more_than_fifty_faults_are_shortened_but_complete():
    with pytest.raises(EditDataError) as raised:
        load_edits([{"prompt": f"P{i}"} for i in range(60)])
    assert raised.value.faults == [f"record {i}: {MISSING}" for i in range(1, 61)]
    assert str(raised.value).split("\n") == [
        "the given records: 60 faults, nothing was loaded:",
        *(f"  record {i}: {MISSING}" for i in range(1, 51)),
        "  ... and 10 more (all are in the error's `faults`)",
    ]


def test_fifty_faults_are_all_shown():
    assert len(faults_of([{"prompt": f"P{i}"} for i in range(50)])) == 50


MANY = 2 * CHUNK + 500


def many_rows() -> list[dict]:
    return [{"prompt": f"Land {n} is", "target": f"size {n}", "rephrases": [f"Land {n}?"]} for n in range(MANY)]


def write_many(path, rows: list[dict]):
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({**row, "rephrases": json.dumps(row["rephrases"])} for row in rows)
    else:
        lines = map(json.dumps, rows)
        path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_many_edits_and_what_is_wrong_far_down(tmp_path, ending):
    rows = many_rows()
    edits = load_edits(write_many(tmp_path / f"good.{ending}", rows))
    assert list(edits) == [Edit(**row) for row in rows]
    assert edits.to_dataset().cache_files
    rows[3]["target"] = rows[-2]["target"] = ""
    rows[-1]["prompt"] = rows[1]["prompt"]
    noun, offset = ("row", 0) if ending == "parquet" else ("line", 1 if ending == "csv" else 0)
    places = [f"{noun} {n + offset}" for n in (4, MANY - 1, MANY, 2)]
    missing = "is missing" if ending == "csv" else "is empty, expected some text"
    assert faults_of(write_many(tmp_path / f"bad.{ending}", rows))[:3] == [
        f"{places[0]}: `target` {missing}",
        f"{places[1]}: `target` {missing}",
        f"{places[2]} is in conflict with {places[3]}: prompt 'Land 1 is' has the target 'size {MANY - 1}' here and "
        "'size 1' there",
    ]


def test_far_duplicates_are_merged_in_the_place_of_the_first(tmp_path):
    rows = many_rows()
    rows[-1] = {**rows[7], "rephrases": ["Land seven?"]}
    with pytest.warns(UserWarning, match=f"1 duplicates were merged: line {MANY} into line 8$"):
        edits = load_edits(write_many(tmp_path / "edits.jsonl", rows))
    plain = [Edit(**row) for row in rows[:-1]]
    plain[7] = Edit("Land 7 is", "size 7", rephrases=["Land 7?", "Land seven?"])
    assert list(edits) == plain


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_what_is_no_text_is_named_by_its_place_in_the_file(tmp_path, ending):
    path = write_many(tmp_path / f"edits.{ending}", many_rows())
    text = path.read_bytes()
    assert len(text) > 100_000  # many times what is decoded at once
    path.write_bytes(text + b"\xe9")
    (fault,) = faults_of(path)
    assert fault.startswith(f"it is not UTF-8 text: 'utf-8' codec can't decode byte 0xe9 in position {len(text)}: ")
