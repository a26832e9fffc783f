"""`locft export`: what it writes and says in each form, and what it refuses."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_locft import LocFTConfig, evaluate_edits, load_adapter, load_edits
from peft_locft.cli.export import _merge


def cells(out: str, word: str) -> list[str]:
    rows = [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in out.splitlines()]
    return next(row for row in rows if word in row)


def summary(folder) -> dict:
    return json.loads((folder / "edit_results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("form", "options"), [("locft", ["--dtype", "bfloat16"]), ("lora", ["--rank", "64"])])
def test_an_adapter_is_written_with_ledger_card_and_scores(form, options, command, edited, edits, tmp_path):
    done = command("export", "--adapter", edited.folder, "--output", "out", "--format", form, *options)
    assert done.code == 0, done.err
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "edits.jsonl", "README.md"} < files
    assert {"edit_results.json", "edit_results.jsonl"} < files
    assert load_edits(tmp_path / "out") == edits
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["peft_type"] == form.upper()
    results = summary(tmp_path / "out")
    assert results["settings"] == {
        "exported from": str(edited.folder),
        "format": form,
        "rank": None if form == "locft" else "64",
        "dtype": "bfloat16" if form == "locft" else None,
    }
    model, tokenizer = load_adapter(str(tmp_path / "out"))
    again = evaluate_edits(model, tokenizer, edits)
    assert again.after["reliability"] == results["after"]["reliability"] == 1.0
    assert results["before"]["reliability"] == 0.0
    assert cells(done.out, "reliability") == ["reliability", "0.00", "1.00", "1.00", "+0.00"]
    assert cells(done.out, "difference") == ["score", "base", "adapter", "export", "difference"]
    assert "It was not evaluated" not in (tmp_path / "out/README.md").read_text()
    noun = "adapter has" if form == "locft" else "LoRA has"
    assert f"The {noun} 0.0 MiB" in done.out and "of the deltas' energy. It is in out." in done.out
    assert (", rank 64," in done.out) == (form == "lora")


def test_bfloat16_halves_the_file(command, edited, tmp_path):
    command("export", "--adapter", edited.folder, "--output", "out", "--dtype", "bfloat16", "--score", "false")
    ((name, small),) = load_file(tmp_path / "out/adapter_model.safetensors").items()
    assert torch.equal(small, load_file(edited.folder / "adapter_model.safetensors")[name].to(torch.bfloat16))


def test_a_low_rank_loses_and_the_table_says_so(command, edited, tmp_path):
    done = command("export", "--adapter", edited.folder, "--output", "out", "--rank", "1")
    assert done.code == 0, done.err
    after = summary(tmp_path / "out")["after"]["reliability"]
    assert after < 1
    assert cells(done.out, "reliability") == ["reliability", "0.00", "1.00", f"{after:.2f}", f"{after - 1:+.2f}"]
    assert {key.split(".")[-2] for key in load_file(tmp_path / "out/adapter_model.safetensors")} == {
        "locft_A",
        "locft_B",
    }


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_merged_model_loads_without_peft_and_answers_as_the_adapter(dtype, command, edited, edits, tmp_path):
    options = ["--dtype", dtype] if dtype else []
    done = command("export", "--adapter", edited.folder, "--output", "out", "--format", "merged", *options)
    assert done.code == 0, done.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not isinstance(merged, PeftModel)
    assert merged.dtype == getattr(torch, dtype or "float32")
    adapter, tokenizer = load_adapter(str(edited.folder))
    answers = evaluate_edits(adapter, tokenizer, edits)
    expected = adapter.merge_and_unload().to(merged.dtype).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in merged.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    results = evaluate_edits(merged, tokenizer, edits, before=answers.before_answers)
    assert results.after["reliability"] == summary(tmp_path / "out")["after"]["reliability"] == 1.0
    assert load_edits(tmp_path / "out") == edits
    assert cells(done.out, "reliability")[:4] == ["reliability", "0.00", "1.00", "1.00"]
    assert "The merged model keeps " in done.out and "It is in out." in done.out


@pytest.mark.parametrize("form", ["locft", "merged"])
def test_without_scores_nothing_is_generated(form, command, edited, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_locft.cli.export.evaluate_edits", None)
    options = ["--format", form, *(["--rank", "0.5"] if form == "locft" else [])]
    done = command("export", "--adapter", edited.folder, "--output", "out", "--score", "false", *options)
    assert done.code == 0, done.err
    assert not (tmp_path / "out/edit_results.json").exists()
    assert "Scores" not in done.out
    if form == "locft":
        assert "It was not evaluated." in (tmp_path / "out/README.md").read_text()
        assert (tmp_path / "out/edits.jsonl").read_text() == (edited.folder / "edits.jsonl").read_text()


NO_RANK = "expected a positive integer, or a share of energy such as 0.95"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "gguf"], "`--format` is 'gguf', expected one of ['locft', 'lora', 'merged']"),
        (["--dtype", "int8"], "`--dtype` is 'int8', expected one of ['float32', 'float16', 'bfloat16']"),
        (
            ["--format", "lora"],
            "a LoRA needs a rank: give `--rank 64`, or a share of energy such as `--rank 0.95`",
        ),
        (
            ["--format", "merged", "--rank", "4"],
            "`--rank` is 4 and `--format` is merged, which has no rank: leave `--rank` out",
        ),
        ([], "nothing would get smaller: give `--rank`, `--dtype`, or both"),
        (["--rank", "many"], "`--rank` is 'many', expected an integer, or a share of energy such as 0.95"),
        (["--rank", "²"], "`--rank` is '²', expected an integer, or a share of energy such as 0.95"),
        *((["--rank", rank], f"`--rank` is {rank!r}, {NO_RANK}") for rank in ("0", "-1", "1.5", "nan", "inf", "0.0")),
    ],
)
def test_faulty_options_are_refused_before_anything_is_loaded(
    options, message, command, edited, tmp_path, monkeypatch
):
    monkeypatch.setattr("peft_locft.cli.export.load_adapter", None)
    done = command("export", "--adapter", edited.folder, "--output", "out", *options)
    assert done == (2, "", f"locft export: error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_holds_something_is_left_alone(command, edited, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.safetensors").write_text("mine")
    arguments = ["--adapter", edited.folder, "--format", "merged"]
    done = command("export", *arguments, "--output", "file")
    assert done == (2, "", "locft export: error: the output folder file is a file: choose another one\n")
    done = command("export", *arguments, "--output", "out")
    assert done == (2, "", "locft export: error: the output folder out is not empty: choose a new one\n")
    assert (tmp_path / "out/model.safetensors").read_text() == (tmp_path / "file").read_text() == "mine"


def test_merging_into_another_dtype_rounds_once(make_model, tokenizer, tmp_path):
    # Merged in the base model's bfloat16 first, most of a delta this small would be gone.
    model = get_peft_model(make_model().to(torch.bfloat16), LocFTConfig(layers=[1])).eval()
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.locft_delta["default"].weight.data.fill_(1e-4)
    expected = layer.weight.detach().float() + 1e-4
    merged, said = _merge(model, tokenizer, str(tmp_path / "merged"), torch.float32)
    assert torch.equal(merged.model.layers[1].mlp.down_proj.weight.data, expected)
    assert "keeps 100.00% of the delta's energy" in said
