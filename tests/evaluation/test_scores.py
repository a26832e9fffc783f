"""Questions, judgements and results."""

import json

import pytest
from datasets import Dataset

from peft_locft import (
    Edit,
    EditConfig,
    EditResults,
    EditSet,
    EditTrainer,
    LocFTConfig,
    evaluate_edits,
    load_results,
    plot_results,
)
from peft_locft.evaluation import Answer, Question, ask, questions_of
from peft_locft.evaluation.questions import is_correct, rates
from peft_locft.trainer import trainer as trainer_module


EDIT = Edit(
    "The capital of Peru is",
    "Lima",
    id="peru",
    rephrases=["What is the capital of Peru?"],
    locality=[{"prompt": "The capital of Chile is", "answer": "Santiago"}, "People in Peru"],
    portability=[{"prompt": "The mayor of Peru's capital works in", "answer": "Lima"}],
)


def test_the_questions_of_an_edit():
    assert questions_of(EditSet([EDIT])) == [
        Question("peru", "reliability", "The capital of Peru is", "Lima"),
        Question("peru", "generalization", "What is the capital of Peru?", "Lima"),
        Question("peru", "locality", "The capital of Chile is", "Santiago"),
        Question("peru", "locality", "People in Peru", None),
        Question("peru", "portability", "The mayor of Peru's capital works in", "Lima"),
    ]


@pytest.mark.parametrize(
    ("text", "right"),
    [("Lima", True), ("Lima.", False), ("Lima is", False), ("lima", False), ("", False), ("The Lima", False)],
)
def test_an_answer_is_right_when_it_is_the_target_and_nothing_else(text, right):
    answer = Answer(text, (1, 2))
    assert is_correct(Question("x", "reliability", "p", "Lima"), answer, answer) is right


def test_white_space_inside_an_answer_does_not_count():
    answer = Answer("New \n York", (1,))
    assert is_correct(Question("x", "generalization", "p", "New York"), answer, answer)


def test_locality_is_judged_by_tokens_against_the_unedited_model_not_by_the_known_answer():
    question = Question("x", "locality", "p", "Santiago")
    wrong_but_kept = Answer("Bogota", (7, 8))
    assert is_correct(question, wrong_but_kept, Answer("Bogota", (7, 8)))
    assert not is_correct(question, Answer("Santiago", (3,)), wrong_but_kept)


def test_rates_are_fractions_and_none_without_questions():
    assert rates(["reliability", "reliability", "locality"], [True, False, True]) == {
        "reliability": 0.5,
        "generalization": None,
        "locality": 1.0,
        "portability": None,
    }


def test_how_far_a_model_is_asked(make_model, tokenizer):
    questions = questions_of(EditSet([EDIT]))
    answers = ask(make_model(), tokenizer, questions)
    lengths = {question.prompt: len(answer.tokens) for question, answer in zip(questions, answers)}
    eos = tokenizer.eos_token_id
    assert not any(eos in answer.tokens for answer in answers)  # or else the lengths below would not be the limits
    assert lengths["The capital of Chile is"] == len(tokenizer(" Santiago")["input_ids"])
    assert lengths["People in Peru"] == 8
    assert lengths["The capital of Peru is"] == max(len(tokenizer(" Lima")["input_ids"]) + 1, 8)


@pytest.fixture
def trained(make_model, tokenizer, edits, tmp_path):
    trainer = EditTrainer(
        model=make_model(),
        args=EditConfig(output_dir=str(tmp_path / "run"), num_train_epochs=40, save_strategy="no", disable_tqdm=True),
        train_dataset=edits,
        processing_class=tokenizer,
        peft_config=LocFTConfig(layers=[1]),
    )
    trainer.train()
    return trainer


def test_evaluate_reports_after_and_before_and_every_answer(trained, edits, tokenizer):
    metrics = trained.evaluate()
    rows = trained.results.rows
    assert len(rows) == 3 * len(edits)
    share = sum(row["after"] == row["answer"] for row in rows if row["metric"] == "reliability") / len(edits)
    assert metrics["eval_reliability"] == share == 1.0
    assert metrics["eval_before_reliability"] == 0.0 and metrics["eval_before_locality"] == 1.0
    assert "eval_portability" not in metrics
    assert 0 <= metrics["eval_generalization"] <= 1 and 0 <= metrics["eval_locality"] <= 1
    base = trained.model.unload()
    untouched = ask(base, tokenizer, questions_of(edits))
    assert [row["before"] for row in rows] == [answer.text for answer in untouched]
    assert trained.state.log_history[-1]["eval_reliability"] == 1.0


def test_evaluate_takes_other_edits_and_several_sets(trained, edits):
    metrics = trained.evaluate({"first": edits[:2], "rest": edits[2:]})
    assert metrics["eval_first_reliability"] == metrics["eval_rest_reliability"] == 1.0
    unknown = trained.evaluate([{"prompt": "The capital of Fiji is", "target": "Suva"}])
    assert unknown["eval_reliability"] == 0.0 and "eval_locality" not in unknown
    assert [row["after"] for row in trained.results.rows] != ["Suva"]
    trained.save_model()
    with pytest.raises(FileNotFoundError):  # results on other edits are not the adapter's own
        load_results(trained.args.output_dir)
    trained.evaluate(edits)
    trained.save_model()
    assert load_results(trained.args.output_dir).after["reliability"] == 1.0


@pytest.mark.parametrize("asked", [3, None])
def test_evaluation_while_training(make_model, tokenizer, edits, tmp_path, monkeypatch, asked):
    scored = []
    monkeypatch.setattr(
        trainer_module,
        "evaluate_edits",
        lambda *args, **kw: scored.append(len(args[2])) or evaluate_edits(*args, **kw),
    )
    trainer = EditTrainer(
        model=make_model(),
        args=EditConfig(
            output_dir=str(tmp_path), num_train_epochs=2, eval_strategy="epoch", save_strategy="no", disable_tqdm=True
        ),
        train_dataset=edits,
        eval_dataset=edits[:asked] if asked else None,
        processing_class=tokenizer,
    )
    trainer.train()
    assert sum("eval_reliability" in entry for entry in trainer.state.log_history) == 2
    assert scored == [asked or len(edits)] * 2


def test_results_are_saved_and_read(trained, tmp_path):
    trained.evaluate()
    trained.save_model(str(tmp_path / "saved"))
    read = load_results(tmp_path / "saved")
    assert read == EditResults(
        trained.results.rows,
        trained.results.settings,
        {name: round(seconds, 2) for name, seconds in trained.results.times.items()},
        trained.results.epoch_losses,
    )
    summary = json.loads((tmp_path / "saved" / "edit_results.json").read_text())
    assert summary["after"]["reliability"] == 1.0 and summary["before"]["reliability"] == 0.0
    assert set(summary["before"]) == set(summary["after"]) >= {"reliability", "generalization", "locality"}
    assert summary["settings"]["layers"] == [1] and summary["settings"]["target_modules"] == ["mlp.down_proj"]
    assert summary["settings"]["epochs"] == len(summary["epoch_losses"]) == 40
    assert {"train", "evaluate_before", "evaluate_after"} <= set(summary["times"])
    table = Dataset.from_parquet(str(tmp_path / "saved" / "edit_results.parquet"), keep_in_memory=True)
    assert table.to_list() == trained.results.rows
    with pytest.raises(FileNotFoundError, match="has no edit_results.json: it holds no results of an evaluation"):
        load_results(tmp_path)


def test_the_picture_is_drawn(trained, tmp_path):
    trained.evaluate()
    plot_results(trained.results, tmp_path / "picture.png", stop_loss=0.01)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
