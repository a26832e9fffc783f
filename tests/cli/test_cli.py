"""The `locft` command: its front door, and what its verbs do when all is well."""

import importlib.metadata
import json
import shutil
import sys

import pytest

from peft_locft import EditResults, load_edits, load_results
from peft_locft.cli.tables import print_results


FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "edit_results.json",
    "edit_results.jsonl",
    "edit_results.parquet",
    "edits.jsonl",
}


def summary(folder) -> dict:
    return json.loads((folder / "edit_results.json").read_text(encoding="utf-8"))


def cells(out: str, *words: str) -> list[list[str]]:
    """The rows of a printed table in which each of the words is a cell."""
    rows = [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in out.splitlines()]
    return [row for row in rows if set(words) <= set(row)]


# ---- The front door ----


@pytest.mark.parametrize("argument, code", [("--help", 0), ("--version", 0), ("edti", 2)])
def test_front_door_answers_without_loading_anything(argument, code, process):
    ask = (
        "import sys, locft\n"
        f"code = locft.main([{argument!r}])\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(code, sorted(loaded & {'torch', 'peft_locft', 'peft', 'transformers', 'datasets', 'trl', 'numpy'}))\n"
    )
    done = process(sys.executable, "-c", ask)
    assert (done.code, done.out.splitlines()[-1]) == (0, f"{code} []"), done.err


def test_help_names_the_verbs(command):
    for argument in ("--help", "-h", "help"):
        done = command(argument)
        assert done.code == 0 and done.err == ""
        for verb in ("edit", "evaluate", "ask"):
            assert f"\n  {verb} " in done.out


def test_without_a_verb_the_help_is_shown_and_the_code_is_2(process, script):
    done = process(script)
    assert done.code == 2
    assert done.out == process(script, "--help").out != ""


@pytest.mark.parametrize(
    "verb, near", [("edot", "edit"), ("Evaluate", "evaluate"), ("akk", "ask"), ("qqq", None), ("--model", None)]
)
def test_misspelt_verb(verb, near, command):
    done = command(verb)
    hint = f", did you mean `{near}`?" if near else "."
    assert done == (
        2,
        "",
        f"locft: there is no verb {verb!r}{hint} The verbs are plan, trace, search, edit, evaluate, export, ask.\n",
    )


def test_version(command):
    for argument in ("--version", "-V"):
        assert command(argument) == (0, f"locft {importlib.metadata.version('peft-locft')}\n", "")


@pytest.mark.parametrize(
    "verb, options",
    [
        ("edit", ["--model", "--edits", "--output", "--layers", "--target_modules", "--on_conflict", "--skip_loss"]),
        ("evaluate", ["--adapter", "--model", "--edits", "--output", "--contexts", "--batch_size"]),
        ("ask", ["--adapter", "--model", "--max_new_tokens"]),
    ],
)
def test_each_verb_has_help(verb, options, command):
    done = command(verb, "--help")
    assert done.code == 0
    assert f"usage: locft {verb} " in done.out
    for option in options:
        assert f"\n  {option} " in done.out


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (RuntimeError("no memory"), 1), (None, 0)])
def test_exit_codes_of_what_happens_in_a_verb(error, code, command, monkeypatch):
    def main(arguments):
        assert arguments == ["--adapter", "x"]
        if error is not None:
            raise error

    monkeypatch.setattr("peft_locft.cli.ask.main", main)
    messages = {130: "locft ask: interrupted\n", 1: "locft ask: failed: RuntimeError: no memory\n", 0: ""}
    assert command("ask", "--adapter", "x") == (code, "", messages[code])


# ---- edit ----


def test_edit_writes_adapter_card_ledger_and_results(edited, edits):
    assert edited.done.code == 0, edited.done.err
    for noise in ("Traceback", "FutureWarning", "warning:"):
        assert noise not in edited.done.err
    assert {path.name for path in edited.folder.iterdir() if path.is_file()} == FILES
    assert load_edits(edited.folder) == edits
    assert (edited.folder / "README.md").read_text().startswith("---\nlibrary_name: peft\n")
    results = summary(edited.folder)
    assert results["before"] == {"reliability": 0.0, "generalization": 0.0, "locality": 1.0, "portability": None}
    assert results["after"]["reliability"] == 1.0
    assert all(0 <= results["after"][name] <= 1 for name in ("generalization", "locality"))
    assert results["settings"]["layers"] == [1]


def test_edit_prints_scores_and_answers(edited):
    assert cells(edited.done.out, "reliability") == [["reliability", "0.00", "1.00", "8"]]
    ((prompt, before, after, expected),) = cells(edited.done.out, "The capital of Peru is")
    assert before != after == expected == "Lima"
    assert f"Trained {summary(edited.folder)['settings']['epochs']} epochs" in edited.done.out
    assert edited.done.out.rstrip().endswith("are in capitals.")


def test_edit_says_why_it_chose_the_place(command, edited, model_folder, tmp_path):
    arguments = ["--model", model_folder, "--edits", edited.edits, "--output", "default", "--num_train_epochs", 1]
    done = command("edit", *arguments)
    assert done.code == 0, done.err
    settings = summary(tmp_path / "default")["settings"]
    assert f"\nEdited layer 1, mlp.down_proj: {settings['reason']}.\nTrained 1 epochs" in done.out
    assert settings["reason"].startswith("the paper names no place for a model of this type and size")
    assert settings["recipe"] == "paper" and "| recipe | paper |" in (tmp_path / "default" / "README.md").read_text()
    assert "Edited layer" not in edited.done.out and summary(edited.folder)["settings"]["reason"] is None


def test_edit_with_options_from_a_file(command, edited, model_folder, tmp_path):
    lines = [f"model: {model_folder}", f"edits: {edited.edits}", "output: not-this-one", "layers: [1]"]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    done = command("edit", "--config", "run.yaml", "--output", "from-file")
    assert done.code == 0, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from-file", "run.yaml"]
    # The same run, down to the last bit of the adapter.
    for name in ("adapter_model.safetensors", "edit_results.jsonl", "edits.jsonl"):
        assert (tmp_path / "from-file" / name).read_bytes() == (edited.folder / name).read_bytes(), name
    ours, theirs = summary(tmp_path / "from-file"), summary(edited.folder)
    assert {**ours, "times": None} == {**theirs, "times": None}


def test_edit_takes_modules_and_training_options(command, edited, model_folder, tmp_path):
    options = ["--target_modules", "mlp.up_proj", "self_attn.o_proj", "--num_train_epochs", "2", "--seed", "7"]
    options += ["--learning_rate", "0.002", "--save_strategy", "no", "--stop_loss", "0"]
    done = command("edit", "--model", model_folder, "--edits", edited.edits, "--output", "out", *options)
    assert done.code == 0, done.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    settings = summary(tmp_path / "out")["settings"]
    assert settings["layers"] is None, "without `--layers`, every layer is edited"
    assert settings["target_modules"] == ["mlp.up_proj", "self_attn.o_proj"]
    expected = {"max_epochs": 2, "epochs": 2, "seed": 7, "learning_rate": 0.002, "stop_loss": 0}
    assert {name: settings[name] for name in expected} == expected


def test_edit_goes_on_with_a_run_that_was_interrupted(command, edited, model_folder, tmp_path):
    folder = shutil.copytree(edited.folder, tmp_path / "killed")
    for name in FILES:
        (folder / name).unlink()
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    arguments = ["edit", "--model", model_folder, "--edits", edited.edits, "--output", "killed", "--layers", "1"]
    assert command(*arguments).code == 2, "a folder with a checkpoint holds a run"
    done = command(*arguments, "--resume_from_checkpoint", "true")
    assert done.code == 0, done.err
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (edited.folder / name).read_bytes()


@pytest.mark.filterwarnings("default::UserWarning")  # as outside of the tests, where one is not an error
def test_edit_warns_in_one_line_when_it_settles_a_conflict(command, model_folder, tmp_path):
    lines = [{"prompt": "The capital of Peru is", "target": city} for city in ("Quito", "Lima")]
    lines.append({"prompt": "The capital of Cuba is", "target": "Havana"})
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--on_conflict", "last", "--num_train_epochs", "1", "--save_strategy", "no", "--disable_tqdm", "true"]
    done = command("edit", "--model", model_folder, "--edits", "edits.jsonl", "--output", "out", *options)
    assert done.code == 0, done.err
    (warning,) = [line for line in done.err.splitlines() if "warning" in line]
    assert warning.startswith("locft edit: warning: edits.jsonl: 1 conflicts were settled for the last edit")
    assert [edit.target for edit in load_edits(tmp_path / "out")] == ["Lima", "Havana"]


# ---- evaluate ----


def test_evaluate_scores_again_and_keeps_what_is_known_of_the_run(command, edited, tmp_path):
    folder = shutil.copytree(edited.folder, tmp_path / "copy")
    for name in ("edit_results.jsonl", "edit_results.parquet"):
        (folder / name).unlink()  # as in an adapter that was saved by PEFT's own `save_pretrained`
    done = command("evaluate", "--adapter", folder, "--batch_size", "3")
    assert done.code == 0, done.err
    assert cells(done.out, "reliability") == [["reliability", "0.00", "1.00", "8"]]
    assert load_results(folder).rows == load_results(edited.folder).rows
    ours, theirs = summary(folder), summary(edited.folder)
    assert ours["times"].pop("train") == theirs["times"].pop("train")
    assert {**ours, "times": None} == {**theirs, "times": None}
    assert ours["epoch_losses"] and ours["settings"]


def test_evaluate_in_several_contexts(command, edited):
    done = command("evaluate", "--adapter", edited.folder, "--contexts", "bare", "question", "--output", "scores")
    assert done.code == 0, done.err
    assert "After, by context" in done.out
    before = (edited.folder / "edit_results.json").read_text()
    done = command("evaluate", "--adapter", edited.folder, "--contexts", "question")
    assert done.code == 0, done.err
    assert "The adapter's own results, in the contexts bare, stay as they are, and so does its card" in done.out
    assert (edited.folder / "edit_results.json").read_text() == before
    done = command("evaluate", "--adapter", edited.folder, "--contexts", "bare", "quiz")
    assert done.code == 2
    assert "the contexts are ['bare', 'quiz'], expected some of 'bare', 'question', 'chat', 'prefix'" in done.err


def test_evaluate_on_other_edits_leaves_the_adapter_alone(command, edited, tmp_path):
    folder = shutil.copytree(edited.folder, tmp_path / "copy")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "other.json").write_text(json.dumps([{"prompt": "The capital of Peru is", "target": "Lima"}]))
    for output in ([], ["--output", "scores"]):
        done = command("evaluate", "--adapter", "copy", "--edits", "other.json", *output)
        assert done.code == 0, done.err
        assert cells(done.out, "reliability") == [["reliability", "0.00", "1.00", "1"]]
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["copy", *output[1:]]
    assert summary(tmp_path / "scores")["questions"] == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# ---- ask ----


def test_ask_shows_the_base_model_beside_the_edited_one(command, edited):
    done = command("ask", "--adapter", edited.folder, "The capital of Peru is", "The [bold]capital[/x] of Cuba is ")
    assert done.code == 0, done.err
    assert len(cells(done.out, "prompt", "base", "edited")) == 1
    ((_, base, new),) = cells(done.out, "The capital of Peru is")
    assert base != new == "Lima"
    assert len(cells(done.out, "The [bold]capital[/x] of Cuba is")) == 1


def test_ask_takes_another_base_model_and_length(command, edited, model_folder, tmp_path):
    folder = shutil.copytree(edited.folder, tmp_path / "copy")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone"}))
    done = command("ask", "--adapter", "copy", "--model", model_folder, "The capital of Mongolia is")
    ((_, base, new),) = cells(done.out, "The capital of Mongolia is")
    assert new == "Ulaanbaatar"
    arguments = ["--model", model_folder, "--max_new_tokens", "2", "The capital of Mongolia is"]
    ((_, start, _),) = cells(command("ask", "--adapter", "copy", *arguments).out, "The capital of Mongolia is")
    assert len(start) < len(base)


def test_ask_refuses_an_answer_of_no_length(command, edited):
    done = command("ask", "--adapter", edited.folder, "--max_new_tokens", "0", "The capital of Mongolia is")
    assert done.code == 2 and "`--max_new_tokens` is 0, expected at least 1" in done.err


def test_tables_show_text_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    row = {"edit_id": "1", "metric": "reliability", "prompt": "[red]p[/x]", "answer": "[bold]a[/y]", "before": ""}
    rows = [{**row, "after": "two\nlines [b]", "correct_before": False, "correct_after": False}]
    print_results(EditResults(rows))
    assert cells(capsys.readouterr().out, "[red]p[/x]") == [
        ["[red]p[/x]", "(nothing)", "two lines [b]", "[bold]a[/y]"]
    ]
