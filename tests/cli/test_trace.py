"""`locft trace`: what it writes and says, and what it refuses."""

import json
import sys

import pytest

from peft_locft import Edit, EditSet
from peft_locft.cli import run
from peft_locft.location import layers_from_tracing, load_tracing


@pytest.fixture
def traced(capsys, monkeypatch, tmp_path, model_folder, edits):
    """Run the verb in an empty folder, on a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    edits.save(tmp_path / "edits.jsonl")

    def trace(*options):
        arguments = ["--model", model_folder, "--edits", "edits.jsonl", "--output", "out", "--copies", "2", *options]
        capsys.readouterr()
        code = run("trace", [str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return trace


def test_the_verb_writes_results_and_a_picture(traced, tmp_path, edits, model_folder):
    code, out, err = traced("--window", "2")
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tracing.json", "tracing.png"]
    results = load_tracing(tmp_path / "out")
    assert results.settings["model"] == str(model_folder)
    assert (results.settings["window"], results.settings["copies"], results.settings["answers"]) == (2, 2, "model")
    assert [row["prompt"] for row in results.rows] == [edit.prompt for edit in edits]
    assert f"Traced {results.num_facts} of {len(edits)} facts" in out
    for kind, peak in results.peaks.items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"│ {kind} ")]
        assert [cell.strip() for cell in line.split("│")[2:-1]] == [peak.role, str(peak.layer), f"{peak.effect:.3f}"]
    assert f"at the last subject token: {' '.join(map(str, layers_from_tracing(results)))}." in out
    assert "no proof of where to edit" in out
    assert "tracing.json and tracing.png are in out." in out


def test_what_is_left_out_is_said(traced, tmp_path):
    some = [Edit("The capital of Peru is", "Lima"), Edit("The capital of Cuba is", "Havana", subject="Cuba")]
    EditSet(some).save(tmp_path / "some.jsonl")
    code, out, err = traced("--edits", "some.jsonl")
    assert code == 0, err
    assert "Traced 1 of 2 facts" in out and "Left out: 1 with the reason 'no subject'." in out


@pytest.mark.filterwarnings("always")
def test_two_answers_to_one_prompt_are_one_fact(traced, tmp_path):
    records = [{"prompt": "The capital of Cuba is", "subject": "Cuba", "target": city} for city in ("Havana", "Lima")]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    code, out, err = traced("--edits", "two.jsonl")
    assert code == 0, err
    assert "1 conflicts were settled for the first edit" in err
    assert "Traced 1 of 1 facts" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--answers", "mine"], "`answers` is 'mine', expected 'model' or 'target'"),
        (["--copies", "0"], "`copies` is 0, expected at least 1"),
        (["--edits", "gone.jsonl"], "gone.jsonl does not exist"),
        (["--model", "/gone"], "the model folder /gone does not exist"),
        (["--output", "edits.jsonl"], "`--output` is edits.jsonl, which is a file: give a folder"),
        (["--answers", "target", "--edits", "unknown.jsonl"], "none of the 1 facts can be traced"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(options, message, traced, tmp_path):
    EditSet([Edit("The capital of Peru is", "Lima")]).save(tmp_path / "unknown.jsonl")
    code, out, err = traced(*options)
    assert code == 2 and message in err
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_results_are_written(traced, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = traced()
    assert code == 0, err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tracing.json"]
    assert "There is no picture: pictures need matplotlib" in out and "tracing.json is in out." in out
