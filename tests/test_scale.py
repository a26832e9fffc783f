"""Many edits: memory that does not grow with them, and nothing else that changes."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from datasets import Dataset, Features, List, Value
from peft import LoraConfig

from peft_locft import Edit, EditConfig, EditDataError, EditResults, EditSet, EditTrainer, LocFTConfig, load_results
from peft_locft.edits.rows import CHUNK
from peft_locft.evaluation import Answer, evaluate, evaluate_edits, questions_of
from peft_locft.evaluation.questions import rates
from peft_locft.hub import edit_card
from peft_locft.trainer.checks import check_same_edits
from peft_locft.trainer.data import tokenize_edits


# What the plain lists of objects took was more than 5,000 bytes an edit.
_MOST_BYTES_PER_EDIT = 2000
_MEASURE = f"""
import json, resource, sys
from transformers import AutoTokenizer
from peft_locft import load_edits
from peft_locft.edits import write_atomically
from peft_locft.trainer.data import tokenize_edits

def peak(count):
    with open("edits.jsonl", "w") as file:
        for n in range(count):
            prompt = f"The capital of the country number {{n}} is"
            row = {{"prompt": prompt, "target": f"Town {{n}}", "rephrases": [prompt + " called"], "locality": [prompt[4:]]}}
            file.write(json.dumps(row) + "\\n")
    edits = load_edits("edits.jsonl")
    data = tokenize_edits(edits, tokenizer, 512)
    write_atomically("ledger.jsonl", edits)
    assert len(edits) == len(data) == count
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
few = peak({2 * CHUNK})
print((peak({22 * CHUNK}) - few) / {20 * CHUNK})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in another unit, or not known")
def test_loading_tokens_and_ledger_take_few_bytes_an_edit(model_folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(model_folder)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < _MOST_BYTES_PER_EDIT


def many(count: int) -> EditSet:
    return EditSet(
        Edit(f"The capital of {n} is", f"T{n}", rephrases=[f"Capital of {n}?"], locality=["It is", f"{n} is"])
        for n in range(count)
    )


def test_tokens_are_on_the_disk_and_those_of_each_edit_alone(tokenizer):
    edits = many(CHUNK + 20)
    data = tokenize_edits(edits, tokenizer, 64)
    assert data.cache_files
    ids = List(Value("int32"))
    assert data.features == Features({"index": Value("int64"), "input_ids": ids, "labels": ids, "subject": ids})
    for number, (row, edit) in enumerate(zip(data, edits)):
        prompt = tokenizer(edit.prompt)["input_ids"]
        whole = [*tokenizer(f"{edit.prompt} {edit.target}")["input_ids"], tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        assert row == {"index": number, "input_ids": whole, "labels": labels, "subject": []}


def test_all_edits_that_are_too_long_are_named_however_far_apart(tokenizer):
    edits = list(many(2 * CHUNK + 3))
    for number in (5, CHUNK + 7, 2 * CHUNK + 2):
        edits[number] = Edit(f"{number} " + "word " * 80 + "is", "x", id=f"long {number}")
    with pytest.raises(EditDataError) as error:
        tokenize_edits(EditSet(edits), tokenizer, 64)
    assert [fault.split(":")[0] for fault in error.value.faults] == [
        "edit 6 (long 5)",
        f"edit {CHUNK + 8} (long {CHUNK + 7})",
        f"edit {2 * CHUNK + 3} (long {2 * CHUNK + 2})",
    ]


_OPENED: list[str] | None = None


def note_written(event: str, arguments: tuple) -> None:
    if _OPENED is not None and event == "open" and isinstance(arguments[0], str) and "w" in (arguments[1] or ""):
        _OPENED.append(arguments[0])


@pytest.fixture
def written():
    """The files that are opened for writing, whoever does it."""
    global _OPENED
    if not hasattr(note_written, "is_hooked"):
        sys.addaudithook(note_written)  # it cannot be taken back
        note_written.is_hooked = True
    _OPENED = []
    yield _OPENED
    _OPENED = None


@pytest.mark.parametrize("config", [LocFTConfig(layers=[1]), LoraConfig(target_modules=["down_proj"])])
def test_the_ledger_is_written_once_a_checkpoint(make_model, tokenizer, edits, tmp_path, written, config):
    trainer = EditTrainer(
        model=make_model(),
        args=EditConfig(output_dir=str(tmp_path), num_train_epochs=3, save_total_limit=None, disable_tqdm=True),
        train_dataset=edits,
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == 3
    for checkpoint in checkpoints:
        assert (checkpoint / "edits.jsonl").read_text(encoding="utf-8") == edits.to_jsonl()
        assert "## What it changes" in (checkpoint / "README.md").read_text(encoding="utf-8")
        assert sum(path.startswith(str(checkpoint)) and "edits.jsonl" in path for path in written) == 1
    assert sum("edits.jsonl" in path for path in written) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1],
        lambda lines: [*lines, '{"id": "1", "prompt": "More is", "target": "less"}\n'],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [lines[0].replace("T0", "T1"), *lines[1:]],
        lambda lines: [],
    ],
)
def test_a_checkpoint_of_other_edits_is_refused(tmp_path, change):
    edits = many(6)
    ledger = tmp_path / "edits.jsonl"
    edits.save(ledger)
    check_same_edits(tmp_path, edits)
    lines = ledger.read_text(encoding="utf-8").splitlines(keepends=True)
    ledger.write_text("".join(change(lines)), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        check_same_edits(tmp_path, edits)
    assert str(error.value) == (
        f"the checkpoint {tmp_path} was trained on other edits than the 6 given now (see its edits.jsonl): resume with "
        "the same edits in the same order, or start a new run in another folder"
    )
    ledger.unlink()
    check_same_edits(tmp_path, edits)


def answered(count: int) -> tuple[list, list[Answer], list[Answer]]:
    questions = questions_of(many(count))
    before = [Answer(f"b\u2028{n % 7}", (n % 7, n % 3)) for n in range(len(questions))]
    after = [
        Answer(question.answer if n % 3 and question.answer else "no", (n % 5, n % 3))
        for n, question in enumerate(questions)
    ]
    return questions, before, after


@pytest.mark.parametrize("count", [3, CHUNK])
def test_results_are_those_of_plain_rows(tmp_path, count):
    questions, before, after = answered(count)
    results = EditResults.from_answers(questions, before, after)
    plain = []
    for question, old, new in zip(questions, before, after):
        right = [answer.text == question.answer for answer in (old, new)]
        if question.metric == "locality":
            right = [True, old.tokens == new.tokens]
        row = {"before": old.text, "after": new.text, "correct_before": right[0], "correct_after": right[1]}
        plain.append({**asdict(question), **row})
    assert results.rows == plain and list(results.before_answers) == before
    assert bool(results.to_dataset().cache_files) == (count >= CHUNK)
    metrics = [row["metric"] for row in plain]
    assert results.before == rates(metrics, [row["correct_before"] for row in plain])
    assert results.after == pytest.approx(rates(metrics, [row["correct_after"] for row in plain]))
    assert (json.loads(results.to_json())["edits"], json.loads(results.to_json())["questions"]) == (count, 4 * count)

    results.save(tmp_path)
    lines = (tmp_path / "edit_results.jsonl").read_text(encoding="utf-8")
    assert lines == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain)
    assert Dataset.from_parquet(str(tmp_path / "edit_results.parquet"), cache_dir=str(tmp_path)).to_list() == plain
    loaded = load_results(tmp_path)
    assert loaded.rows == results.rows and loaded.after == results.after
    assert EditResults(plain).rows == results.rows and EditResults([]).after == dict.fromkeys(results.after)


def test_edits_that_are_evaluated_in_parts_are_answered_as_at_once(make_model, tokenizer, edits, monkeypatch):
    trainer = EditTrainer(
        model=make_model(),
        args=EditConfig(output_dir="unused", num_train_epochs=10, save_strategy="no", disable_tqdm=True),
        train_dataset=edits,
        processing_class=tokenizer,
        peft_config=LocFTConfig(layers=[1]),
    )
    trainer.train()
    model = trainer.model
    at_once = evaluate_edits(model, tokenizer, edits, show_progress=False)
    monkeypatch.setattr(evaluate, "_EDITS_AT_ONCE", 3)
    in_parts = evaluate_edits(model, tokenizer, edits, show_progress=False)
    assert any(row["before"] != row["after"] for row in at_once.rows)
    assert in_parts.rows == at_once.rows and in_parts.before_answers == at_once.before_answers
    assert sorted(in_parts.times) == ["evaluate_after", "evaluate_before"]
    # What is known already is not asked again.
    known = [Answer(f"known {n}", (n,)) for n in range(len(at_once.rows))]
    again = evaluate_edits(model, tokenizer, edits, before=known, show_progress=False)
    assert [row["before"] for row in again.rows] == [answer.text for answer in known]
    assert [row["after"] for row in again.rows] == [row["after"] for row in at_once.rows]


def test_the_card_does_not_grow_with_the_edits():
    few, more = (
        edit_card("x", many(count), LocFTConfig(layers=[1]), EditResults.from_answers(*answered(count)))
        for count in (20, 2000)
    )
    assert len(more) - len(few) < 50
    assert "1990 more are in [edits.jsonl]" in more and "| b 0 |" in more
