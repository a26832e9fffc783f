"""What is refused: one message on standard error, exit code 2, no traceback, and nothing written."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest


PERU = {"prompt": "The capital of Peru is", "target": "Lima"}
CUBA = {"prompt": "The capital of Cuba is", "target": "Havana"}


def state(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file and folder, when it was changed, and a hash of its content."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }


def check(done, verb: str, *expected: str) -> None:
    assert done.code == 2, done
    assert f"locft {verb}: error: " in done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    for text in expected:
        assert text in done.err, done.err


FAULTY_EDITS = {
    "missing": (None, ["faulty.jsonl does not exist"]),
    "not JSON": ('{"prompt": "a", "target": "b"}\n{"prompt": "c", \n', ["faulty.jsonl: 1 fault", "line 2: not JSON"]),
    "no edits": ("\n", ["there are no edits"]),
    "several faults": (
        '{"prompt": "a ", "target": "b"}\n{"prompt": "c", "targt": "d"}\n{"prompt": "", "target": "e"}\n',
        [
            "line 1: `prompt` ends in white space",
            "line 2: it has the unknown column `targt`",
            "line 3: `prompt` is empt",
        ],
    ),
    "conflict": (
        "\n".join(map(json.dumps, [PERU, CUBA, {**PERU, "target": "Quito"}])),
        ["line 3 is in conflict with line 1", "'Quito' here and 'Lima' there"],
    ),
    "too long": (json.dumps({**PERU, "target": "xyz " * 50}), ["it has", "expected at most the 64"]),
}


@pytest.mark.parametrize("kind", FAULTY_EDITS)
def test_faulty_edits(kind, command, model_folder, tmp_path):
    text, expected = FAULTY_EDITS[kind]
    if text is not None:
        (tmp_path / "faulty.jsonl").write_text(text)
    before = state(tmp_path)
    check(command("edit", "--model", model_folder, "--edits", "faulty.jsonl", "--output", "out"), "edit", *expected)
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--layers", "3"], ["layers [3] are not in the model", "the 3 layers 0 to 2", "nearest are [2]"]),
        (["--layers", "one"], ["argument --layers: invalid int value: 'one'"]),
        (["--target_modules", "mlp.down_prj"], ["'mlp.down_prj'", "the nearest names are ['mlp.down_proj'"]),
        (["--layers", "1", "--target_modules", "lm_head"], ["'lm_head'", "outside of"]),
        (["--learning_rte", "1"], ["--learning_rte"]),
        (["--learning_rate", "-1"], ["`learning_rate` is -1.0, expected more than 0"]),
        (["--per_device_train_batch_size", "1"], ["a batch of one edit"]),
        (["--output_dir", "other"], ["`--output` is out and `--output_dir` is other"]),
        (["--on_conflict", "newest"], ["`on_conflict` is 'newest', expected 'raise', 'first' or 'last'"]),
        (["--resume_from_checkpoint", "true"], ["no complete checkpoint in out"]),
        (["--resume_from_checkpoint", "checkpoint-9"], ["the checkpoint checkpoint-9 does not exist"]),
        (["--config", "gone.yaml"], ["gone.yaml"]),
        (["--config", "unknown.yaml"], ["--learning_rte"]),
        (["--config", "list.yaml"], ["list.yaml must contain a YAML mapping"]),
        (["--config", "broken.yaml"], ["broken.yaml", "line 2"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_faulty_options(options, expected, command, edited, model_folder, tmp_path):
    for name, text in {"unknown": "learning_rte: 1", "list": "- 1", "broken": "a: 1\n b: [\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    before = state(tmp_path)
    arguments = ["--model", model_folder, "--edits", edited.edits, "--output", "out"]
    check(command("edit", *arguments, *options), "edit", *expected)
    assert state(tmp_path) == before


@pytest.mark.parametrize("missing", ["--model", "--edits", "--output"])
def test_required_options(missing, command, tmp_path):
    options = {"--model": "m", "--edits": "e.jsonl", "--output": "o"}
    given = [word for name, value in options.items() if name != missing for word in (name, value)]
    check(command("edit", *given), "edit", f"the following arguments are required: {missing}")
    assert list(tmp_path.iterdir()) == []


def test_a_model_folder_that_is_not_there(command, edited, tmp_path):
    gone = tmp_path / "models" / "gone"
    done = command("edit", "--model", gone, "--edits", edited.edits, "--output", "out")
    check(done, "edit", f"the model folder {gone} does not exist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "adapter_config.json", "edits.jsonl", "edit_results.json", "checkpoint-4"])
def test_an_output_folder_that_holds_another_run(name, command, edited, model_folder, tmp_path):
    """A whole run, and each part that alone says that there was one."""
    if name:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_text("{}")
    else:
        shutil.copytree(edited.folder, tmp_path / "out")
    before = state(tmp_path)
    done = command("edit", "--model", model_folder, "--edits", edited.edits, "--output", "out")
    check(done, "edit", "the output folder out holds another run", name)
    assert state(tmp_path) == before


def test_an_output_folder_that_is_a_file(command, edited, model_folder, tmp_path):
    (tmp_path / "out").write_text("mine")
    before = state(tmp_path)
    done = command("edit", "--model", model_folder, "--edits", edited.edits, "--output", "out")
    check(done, "edit", "`--output` is out, which is a file: give a folder")
    assert state(tmp_path) == before


@pytest.fixture
def adapters(edited, tmp_path) -> Path:
    """Adapters that each lack something."""
    for name in ("no-ledger", "no-base", "bad-ledger", "no-weights"):
        shutil.copytree(edited.folder, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "no-ledger" / "edits.jsonl").unlink()
    (tmp_path / "bad-ledger" / "edits.jsonl").write_text("{")
    config = json.loads((tmp_path / "no-base" / "adapter_config.json").read_text())
    (tmp_path / "no-base" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/gone/tiny-llama"})
    )
    return tmp_path


@pytest.mark.parametrize(
    "name, expected",
    [
        ("gone/gone/gone", ["gone/gone/gone is no folder here", "edits.jsonl"]),
        ("no-ledger", ["no-ledger/edits.jsonl does not exist"]),
        ("bad-ledger", ["bad-ledger/edits.jsonl: 1 fault", "line 1: not JSON"]),
        ("no-base", ["the adapter no-base", "/gone/tiny-llama, which does not exist here", "`model`"]),
    ],
)
def test_evaluate_refuses_an_adapter_that_lacks_something(name, expected, command, adapters):
    before = state(adapters)
    check(command("evaluate", "--adapter", name), "evaluate", *expected)
    assert state(adapters) == before


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--output", "edits.jsonl"], "`--output` is edits.jsonl, which is a file: give a folder"),
        (["--batch_size", "0"], "`--batch_size` is 0, expected at least 1"),
    ],
)
def test_evaluate_refuses_before_anything_is_asked(options, expected, command, edited, tmp_path):
    (tmp_path / "edits.jsonl").write_text("mine")
    before = state(tmp_path)
    check(command("evaluate", "--adapter", edited.folder, *options), "evaluate", expected)
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    "name, expected",
    [
        ("gone/gone/gone", ["'adapter_config.json' at 'gone/gone/gone'"]),
        ("no-base", ["/gone/tiny-llama, which does not exist here"]),
    ],
)
def test_ask_refuses_an_adapter_that_lacks_something(name, expected, command, adapters):
    check(command("ask", "--adapter", name, "The capital of Peru is"), "ask", *expected)


@pytest.mark.parametrize("prompts", [[], [""], ["The capital of Peru is", " \n"]])
def test_ask_refuses_an_empty_prompt(prompts, command, edited):
    check(command("ask", "--adapter", edited.folder, *prompts), "ask", "there is nothing to ask")


@pytest.mark.parametrize("verb", ["evaluate", "ask"])
def test_unknown_options_and_missing_ones(verb, command, edited):
    check(command(verb, "--adapter", edited.folder, "--max_tokns", "3", "Peru"), verb, "--max_tokns")
    check(command(verb), verb, "the following arguments are required: --adapter")


def test_a_fresh_process_shows_no_traceback_either(process, script, model_folder, tmp_path):
    arguments = ["--model", model_folder, "--edits", "gone.jsonl", "--output", "out"]
    check(process(script, "edit", *arguments, cwd=tmp_path), "edit", "gone.jsonl does not exist")
    assert list(tmp_path.iterdir()) == []
