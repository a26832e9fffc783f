"""`locft search`: what it writes and says, and what it refuses."""

import json
import shlex

import pytest
from peft import PeftConfig
from trl import TrlParser

from peft_locft import EditConfig, cli
from peft_locft.cli.edit import EditArguments
from peft_locft.cli.search import sampled_texts
from peft_locft.search import search_locations


@pytest.fixture
def search(capsys, monkeypatch, tmp_path, model_folder, edits):
    """Run `locft search` in an empty folder, on a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    edits.save(tmp_path / "edits.jsonl")
    (tmp_path / "texts.txt").write_text("The capital of Peru is Lima.\n\nThe people of Chile speak Spanish.\n")

    def search(*options):
        capsys.readouterr()
        arguments = ["--model", str(model_folder), "--edits", "edits.jsonl", "--output", "places", *options]
        code = cli.run("search", arguments)
        return code, *capsys.readouterr()

    return search


def test_what_it_writes_and_says(search, model_folder, edits, tmp_path):
    options = ["--layers", "1", "-1", "--groups", "up", "down", "--texts", "texts.txt", "--num_train_epochs", "4"]
    code, out, _ = search(*options, "--rungs", "2")
    assert code == 0
    folder = tmp_path / "places"
    files = {"search.jsonl", "search.json", "search.md", "search.png", "config"}
    assert {path.name for path in folder.iterdir()} == files
    found = json.loads((folder / "search.json").read_text())
    results = search_locations(
        str(model_folder),
        edits,
        layers=[1, -1],
        groups=["up", "down"],
        texts=sampled_texts("texts.txt", 32),
        rungs=2,
        args=EditConfig(output_dir=str(tmp_path / "other"), num_train_epochs=4, disable_tqdm=True),
    )
    assert [(row["layer"], row["module"], row["scores"]) for row in found["rows"]] == [
        (row.layer, row.module, row.scores) for row in results.rows
    ]
    best = results.ranked()[0]
    config = PeftConfig.from_pretrained(folder / "config")
    assert (config.layers, set(config.target_modules)) == ([best.layer], {best.module})
    assert "The best 4 of 4 places" in out and "capability" in out
    assert (
        f"Next: locft edit --model {model_folder} --edits edits.jsonl --output OUTPUT --layers {best.layer} "
        f"--target_modules {best.module} --num_train_epochs 4\n" in out
    )
    assert "--on_conflict" not in out and "--recipe" not in out
    # Called again, it is done at once, and says the same.
    lines = (folder / "search.jsonl").read_text()
    code, again, _ = search(*options, "--rungs", "2")
    assert (code, again) == (0, out) and (folder / "search.jsonl").read_text() == lines


def test_that_nothing_was_learned_is_told(search):
    code, out, err = search(
        "--layers", "1", "--groups", "down", "--rungs", "1", "--learning_rate", "1e-9", "--num_train_epochs", "1"
    )
    assert code == 0, err
    assert (
        "The best place learned only 0% of the edits, so that this tells little: give more `--num_train_epochs`" in out
    )


def test_the_next_command_runs(search, capsys, model_folder, tmp_path):
    """With options abbreviated, from a file, of several values and of a recipe."""
    (tmp_path / "search.yaml").write_text("groups: [down]\nrungs: 1\nsample: 6\n")
    (tmp_path / "kept.txt").write_text("The capital of Peru is Lima.\n")
    options = [
        "--config",
        "search.yaml",
        "--layer",
        "1",
        "--recipe",
        "careful",
        "--projector",
        "0.3",
        "--num_train",
        "7",
        "--learning_rate",
        "2e-3",
    ]
    options += ["--preservation_texts", "kept.txt", "--preservation_prompts", "kept.txt", "--on_conf", "first"]
    code, out, err = search(
        *options, "--eval_contexts", "bare", "question", "--optim_args", "x=1", "--disable_tqdm", "true"
    )
    assert code == 0, err
    _, verb, *command = shlex.split(out.partition("Next: ")[2])
    assert verb == "edit"
    parser = TrlParser((EditArguments, EditConfig))
    edit, config = parser.parse_args_and_config([part if part != "OUTPUT" else "out" for part in command])
    assert (edit.layers, edit.target_modules, edit.on_conflict) == ([1], ["mlp.down_proj"], "first")
    assert (config.recipe, config.projector, config.kl_weight, config.contexts) == ("careful", 0.3, 0.5, 12)
    assert (config.num_train_epochs, config.eval_contexts, config.optim_args) == (7, ["bare", "question"], "x=1")
    assert (config.preservation_texts, config.learning_rate) == ("kept.txt", 2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "locaedit"], "`recipe` is 'locaedit', which chooses layers by tracing"),
        (["--output", "texts.txt"], "`--output` is texts.txt, which is a file: give a folder"),
        (["--layers", "9"], "layers [9] are not in the model"),
        (["--groups", "none"], "`groups` is ['none'], expected some of ['layer', 'attention', 'mlp', 'up', 'down']"),
        (["--texts", "gone.txt"], "`--texts` is 'gone.txt', which cannot be read"),
        (["--texts", "empty.txt"], "`--texts` is 'empty.txt', which is empty, expected at least one text"),
        (["--texts", "texts.txt", "--num_texts", "0"], "`--num_texts` is 0, expected at least 1"),
        (["--edits", "gone.jsonl"], "gone.jsonl does not exist"),
        (["--model", "/gone"], "the model folder /gone does not exist"),
        (["--output_dir", "elsewhere"], "`--output` is places and `--output_dir` is elsewhere: give `--output` only"),
        (["--sample", "0"], "`sample` is 0, expected an integer of at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(options, message, search, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    code, out, err = search(*options)
    assert (code, out) == (2, "")
    assert "locft search: error: " in err and message in err
    assert not (tmp_path / "places").exists()


def test_texts_are_spread_over_the_file(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"text {number}" for number in range(10)))
    assert sampled_texts(str(path), 3) == ["text 0", "text 3", "text 6"]
    assert len(sampled_texts(str(path), 32)) == 10
