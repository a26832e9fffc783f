"""Questions in several contexts: what is asked, and how it is scored and shown."""

import copy
import json

import pytest
from preserved import KEPT

from peft_locft import Edit, EditConfig, EditResults, EditSet, EditTrainer, LocFTConfig, evaluate_edits, load_results
from peft_locft.cli.tables import print_results
from peft_locft.edits.contexts import CONTEXTS, check_contexts, in_context
from peft_locft.evaluation import Question, ask, questions_of
from peft_locft.hub import edit_card


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EDIT = Edit("The capital of Peru is", "Lima", id="peru", rephrases=["Peru's capital?"])


@pytest.fixture(scope="module")
def chatty(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_every_question_is_asked_in_every_context(chatty):
    questions = questions_of(EditSet([EDIT]), CONTEXTS, chatty)
    behind = [question.prompt for question in questions if question.context == "prefix"]
    bos = "" if chatty("a")["input_ids"][:1] == [chatty.bos_token_id] else chatty.bos_token or ""
    assert questions == [
        Question("peru", "reliability", "The capital of Peru is", "Lima", "bare"),
        Question("peru", "reliability", "Question: The capital of Peru is\nAnswer:", "Lima", "question"),
        Question("peru", "reliability", f"{bos}<user>The capital of Peru is\n<assistant>", "Lima", "chat"),
        Question("peru", "reliability", behind[0], "Lima", "prefix"),
        Question("peru", "generalization", "Peru's capital?", "Lima", "bare"),
        Question("peru", "generalization", "Question: Peru's capital?\nAnswer:", "Lima", "question"),
        Question("peru", "generalization", f"{bos}<user>Peru's capital?\n<assistant>", "Lima", "chat"),
        Question("peru", "generalization", behind[1], "Lima", "prefix"),
    ]
    assert all(text.endswith(prompt) for text, prompt in zip(behind, (f". {EDIT.prompt}", ". Peru's capital?")))
    assert behind == [in_context(prompt, "prefix") for prompt in (EDIT.prompt, *EDIT.rephrases)]  # always the same


@pytest.mark.parametrize("contexts", [[], ["bare", "bare"], ["quiz"], "bare"], ids=str)
def test_contexts_that_do_not_exist_are_refused(contexts, tmp_path):
    message = f"the contexts are {contexts!r}, expected some of 'bare', 'question', 'chat', 'prefix', each once"
    with pytest.raises(ValueError) as raised:
        check_contexts(contexts)
    assert str(raised.value) == message
    with pytest.raises(ValueError) as raised:
        EditConfig(output_dir=str(tmp_path), eval_contexts=contexts)
    assert str(raised.value) == message


def test_a_chat_needs_a_template(make_model, tokenizer, edits, tmp_path):
    assert tokenizer.chat_template is None
    with pytest.raises(
        ValueError, match="the contexts have 'chat', but the tokenizer has no chat template: leave 'chat'"
    ):
        evaluate_edits(make_model(), tokenizer, edits, contexts=["bare", "chat"])
    with pytest.raises(ValueError, match="the contexts have 'chat'"):  # before anything is trained
        args = EditConfig(output_dir=str(tmp_path), eval_contexts=["bare", "chat"])
        EditTrainer(model=make_model(), args=args, train_dataset=edits, processing_class=tokenizer)


def test_a_template_that_takes_no_turn_of_the_user_alone(make_model, chatty, edits, tmp_path):
    needing = copy.deepcopy(chatty)
    needing.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('System role needed') }}{% endif %}" + TEMPLATE
    )
    message = (
        r"does not take one turn of the user alone \(System role needed\).*: leave the context 'chat' out, or set"
    )
    with pytest.raises(ValueError, match=message):
        check_contexts(["chat"], needing)
    args = EditConfig(output_dir=str(tmp_path), contexts=3, num_train_epochs=4, report_to="none", **KEPT)
    trainer = EditTrainer(make_model(), args, edits, processing_class=needing, peft_config=LocFTConfig(layers=[1]))
    with pytest.warns(UserWarning, match="edits are not trained as turns of a chat: .*System role needed"):
        trainer.train()


@pytest.fixture(scope="module")
def trained(make_model, chatty, edits, tmp_path_factory):
    trainer = EditTrainer(
        model=make_model(),
        args=EditConfig(
            output_dir=str(tmp_path_factory.mktemp("run")),
            num_train_epochs=40,
            eval_contexts=["bare", "chat"],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=edits,
        processing_class=chatty,
        peft_config=LocFTConfig(layers=[1]),
    )
    trainer.train()
    trainer.metrics = trainer.evaluate()
    return trainer


def test_scores_by_context_are_those_of_each_context_alone(trained, edits, chatty):
    results, metrics = trained.results, trained.metrics
    alone = {
        context: evaluate_edits(trained.model, chatty, edits, contexts=[context], show_progress=False)
        for context in ("bare", "chat")
    }
    assert results.by_context() == {
        context: {"before": found.before, "after": found.after} for context, found in alone.items()
    }
    assert metrics["eval_bare_reliability"] == alone["bare"].after["reliability"] == 1.0
    assert metrics["eval_chat_locality"] == alone["chat"].after["locality"]
    # The probes do not fail in both alike: else the mean below would prove nothing.
    assert alone["chat"].after["reliability"] < 1.0
    mean = (alone["bare"].after["reliability"] + alone["chat"].after["reliability"]) / 2
    assert metrics["eval_reliability"] == pytest.approx(mean)
    answers = {row["prompt"]: row["after"] for row in results.rows}
    # As the template has it, with the token that a text begins with, which this tokenizer leaves out.
    prompt = chatty.bos_token + in_context(edits[0].prompt, "chat", "<user>{the prompt}\n<assistant>")
    asked = [Question("x", "reliability", prompt, edits[0].target)]  # whose length is that of what is looked at
    (answer,) = ask(trained.model, chatty, asked)
    assert answers[prompt] == answer.text


def test_a_second_evaluation_in_other_contexts_asks_the_unedited_model_anew(trained, edits):
    first = trained.results.before
    trained.args.eval_contexts = ["question"]
    try:
        metrics = trained.evaluate()
    finally:
        trained.args.eval_contexts = ["bare", "chat"]
    assert {row["context"] for row in trained.results.rows} == {"question"}
    assert "eval_question_reliability" not in metrics  # the same as the whole
    trained.evaluate()
    assert trained.results.before == first


def test_contexts_are_saved_and_shown(trained, edits, tmp_path, capsys, monkeypatch):
    trained.evaluate()
    results = trained.results
    results.save(tmp_path)
    assert load_results(tmp_path).by_context() == results.by_context()
    summary = json.loads((tmp_path / "edit_results.json").read_text())
    assert summary["contexts"] == results.by_context()
    monkeypatch.setenv("COLUMNS", "200")
    print_results(results)
    out = capsys.readouterr().out
    chat = results.by_context()["chat"]["after"]
    assert out.count(edits[0].prompt) == 1
    (line,) = [line for line in out.splitlines() if line.startswith("│ chat")]
    named = [chat[name] for name in ("reliability", "generalization", "locality")]
    assert [cell.strip() for cell in line.split("│")[2:-1]] == [f"{value:.2f}" for value in named]
    card = edit_card("me/x", edits, trained.model.peft_config["default"], results)
    assert f"| chat | {' | '.join(f'{value:.3f}' for value in named)} |" in card


def test_tables_that_were_written_before_there_were_contexts(trained, tmp_path):
    trained.results.save(tmp_path)
    table = tmp_path / "edit_results.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    old = [
        {name: value for name, value in row.items() if name != "context"} for row in rows if row["context"] == "bare"
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in old))
    read = load_results(tmp_path)
    assert list(read.by_context()) == ["bare"]
    assert read.after == EditResults(old).after == trained.results.by_context()["bare"]["after"]
