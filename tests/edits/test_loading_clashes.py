"""Duplicates and conflicts, and the real data."""

import json
import warnings

import pytest

from peft_locft.edits import Edit, EditConflictError, EditDataError, EditSet, Probe, load_edits


SETTLE = "to settle conflicts, remove one of each two, or load with `on_conflict='first'` or `'last'`"


def row(prompt: str, target: str, **fields) -> dict:
    return {"prompt": prompt, "target": target, **fields}


def faults_of(source, **options) -> list[str]:
    with pytest.raises(EditDataError) as raised:
        load_edits(source, **options)
    return raised.value.faults


def load_and_warn(source, **options) -> tuple[list[Edit], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edits = load_edits(source, **options)
    return list(edits), [str(warning.message) for warning in caught]


@pytest.mark.parametrize("on_conflict", ["raise", "first", "last"])
def test_duplicates_are_merged_and_keep_the_probes_of_both(tmp_path, on_conflict):
    path = tmp_path / "edits.jsonl"
    rows = [
        row("A is", "b", rephrases=["r1", "r2"], locality=["l"], source="here"),
        row("C is", "d"),
        row("A is", " b ", rephrases=["r2", "r3"], subject="A", source="there"),
        row("A is", "b", portability=[{"prompt": "p", "answer": "q"}]),
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    edits, messages = load_and_warn(path, on_conflict=on_conflict)
    merged = Edit(
        "A is",
        "b",
        subject="A",
        rephrases=["r1", "r2", "r3"],
        locality=["l"],
        portability=[Probe("p", "q")],
        source="here",
    )
    assert edits == [merged, Edit("C is", "d")]
    assert messages == [f"{path}: 2 duplicates were merged: line 5 into line 1, line 7 into line 1"]


@pytest.mark.parametrize(("count", "rest"), [(10, ""), (12, " and 2 more")])
def test_many_duplicates_are_counted_and_the_first_ten_named(count, rest):
    _, messages = load_and_warn([row("A is", "b")] * (1 + count))
    named = ", ".join(f"record {number} into record 1" for number in range(2, 12))
    assert messages == [f"the given records: {count} duplicates were merged: {named}{rest}"]


def test_warnings_point_to_the_caller():
    with pytest.warns(UserWarning) as caught:
        load_edits(
            [row("A is", "b"), row("A is", "b"), row("A is", "c"), row("C is", "d", note="x")], on_conflict="first"
        )
    assert len(caught) == 3
    assert {warning.filename for warning in caught} == {__file__}


def test_conflicts_are_named_with_both_places_and_with_other_faults():
    records = [row("A is", "b"), row("C is", ""), row("A is", "c"), row("E is", "f"), row("A is", "d")]
    assert faults_of(records) == [
        "record 2: `target` is empty, expected some text",
        "record 3 is in conflict with record 1: prompt 'A is' has the target 'c' here and 'b' there",
        "record 5 is in conflict with record 1: prompt 'A is' has the target 'd' here and 'b' there",
        SETTLE,
    ]


@pytest.mark.parametrize("on_conflict", ["raise", "first"])
def test_what_is_trained_in_other_words_is_compared_with_other_edits(on_conflict):
    records = [row("A is", "b"), row("", "x"), row("C is", "d", train_rephrases=["A is"])]
    assert faults_of(records, on_conflict=on_conflict)[1:] == [
        "record 1 is in conflict with record 3: the prompt 'A is' has the target 'b' here, and as one of the `train_rephrases` "
        "'d' there"
    ]
    with pytest.raises(
        EditConflictError, match="edit 1 is in conflict with edit 2: the prompt 'A is' has the target 'b'"
    ):
        load_edits(
            [row("A is", "b"), row("A is", "c"), row("C is", "d", train_rephrases=["A is"])], on_conflict="first"
        )


@pytest.mark.parametrize(("on_conflict", "target", "probe"), [("first", "b", "r1"), ("last", "d", "r3")])
def test_conflicts_are_settled_with_a_warning(on_conflict, target, probe):
    records = [
        row("A is", "b", rephrases=["r1"]),
        row("E is", "f"),
        row("A is", "c", rephrases=["r2"]),
        row("A is", "d", rephrases=["r3"]),
    ]
    edits, messages = load_and_warn(records, on_conflict=on_conflict)
    assert edits == [Edit("A is", target, rephrases=[probe]), Edit("E is", "f")]
    other = "record 1" if on_conflict == "first" else "record 3"
    assert messages == [
        f"the given records: 2 conflicts were settled for the {on_conflict} edit: "
        f"record 3 and record 1, record 4 and {other}"
    ]


def test_settling_does_not_hide_faults():
    records = [row("A is", "b"), row("A is", "c"), row("A is", 5)]
    with pytest.warns(UserWarning, match="1 conflicts were settled"):
        assert faults_of(records, on_conflict="last") == ["record 3: `target` is a int (5), expected a string"]


@pytest.mark.parametrize("on_conflict", ["raise", "first", "last"])
def test_duplicate_ids_are_faults(on_conflict):
    records = [row("A is", "b", id="1"), row("C is", "d", id="1"), row("E is", "f", id="2")]
    assert faults_of(records, on_conflict=on_conflict) == [
        "record 2 has the `id` '1' of record 1, expected one of its own"
    ]


def test_edits_that_only_look_alike_stay_apart():
    records = [row("A is", "b"), row("a is", "b"), row(" A is", "b"), row("A is:", "b")]
    edits, messages = load_and_warn(records)
    assert ([edit.prompt for edit in edits], messages) == (["A is", "a is", " A is", "A is:"], [])


def test_real_zsre(shared_data, tmp_path):
    edits, messages = load_and_warn(shared_data / "zsre_1k.json")
    assert (len(edits), messages) == (1000, [])
    assert edits[0] == Edit(
        "Which river system contains Charity Creek?",
        "Chichester River",
        subject="Charity Creek",
        rephrases=["What river system is Charity Creek in?"],
        locality=[Probe("nq question: how many series of diary of a wimpy kid are there", "12")],
    )
    assert all(len(edit.rephrases) == len(edit.locality) == 1 for edit in edits)
    EditSet(edits).save(tmp_path / "edits.jsonl")
    assert list(load_edits(tmp_path / "edits.jsonl")) == edits


def test_real_counterfact_has_one_conflict(shared_data):
    assert faults_of(shared_data / "counterfact_1k.json") == [
        "line 5632 is in conflict with line 4622: prompt 'Frank Lampard, the' has the target 'quarterback' here and "
        "'basketball' there",
        SETTLE,
    ]


@pytest.mark.parametrize(("on_conflict", "target"), [("first", "basketball"), ("last", "quarterback")])
def test_real_counterfact_settled(shared_data, on_conflict, target):
    path = shared_data / "counterfact_1k.json"
    edits, messages = load_and_warn(path, on_conflict=on_conflict)
    assert len(edits) == 999
    assert [edit.target for edit in edits if edit.prompt == "Frank Lampard, the"] == [target]
    assert messages == [f"{path}: 1 conflicts were settled for the {on_conflict} edit: line 5632 and line 4622"]
