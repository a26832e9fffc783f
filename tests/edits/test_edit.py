"""One edit: what it accepts, what it keeps, and every fault it names."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from peft_locft.edits import Edit, EditError, Probe


PROMPT, TARGET = "The capital of Kazakhstan is", "Astana"


def faults_of(**changes) -> list[str]:
    with pytest.raises(EditError) as raised:
        Edit(**{"prompt": PROMPT, "target": TARGET, **changes})
    assert str(raised.value) == "; ".join(raised.value.faults)
    return raised.value.faults


def test_defaults_of_a_minimal_edit():
    edit = Edit(PROMPT, TARGET)
    assert (edit.prompt, edit.target, edit.subject, edit.source) == (PROMPT, TARGET, None, None)
    assert edit.rephrases == edit.locality == edit.portability == ()


@pytest.mark.parametrize("target", [" Astana", "Astana ", "\n\tAstana\n"])
def test_white_space_around_the_target_is_dropped(target):
    edit = Edit(PROMPT, target)
    assert edit.target == TARGET
    assert edit.id == Edit(PROMPT, TARGET).id


def test_white_space_within_prompt_and_target_is_kept():
    edit = Edit("  Q: where?\n\nA:", "New\n York")
    assert (edit.prompt, edit.target) == ("  Q: where?\n\nA:", "New\n York")


def test_lists_become_tuples_and_probes_come_in_any_form():
    edit = Edit(
        PROMPT,
        TARGET,
        rephrases=["Kazakhstan's capital is"],
        locality=["France's is", {"prompt": "Italy's is"}, {"prompt": "Spain's is", "answer": " Madrid "}],
        portability=(Probe("The mayor of Kazakhstan's capital sits in", "\nAstana"),),
    )
    assert edit.rephrases == ("Kazakhstan's capital is",)
    assert edit.locality == (Probe("France's is"), Probe("Italy's is", None), Probe("Spain's is", "Madrid"))
    assert edit.portability == (Probe("The mayor of Kazakhstan's capital sits in", "Astana"),)


@pytest.mark.parametrize("name", ["rephrases", "locality", "portability"])
def test_none_stands_for_no_probes(name):
    assert getattr(Edit(PROMPT, TARGET, **{name: None}), name) == ()


def test_id_is_a_hash_that_never_changes():
    # Written out, because ids stand in saved files: another hash would break resuming and auditing.
    assert Edit(PROMPT, TARGET).id == "29aa32a3842a"
    assert Edit(PROMPT, TARGET, rephrases=["Other"], locality=["Other"], source="page").id == "29aa32a3842a"
    assert Edit(PROMPT, TARGET, id="").id == "29aa32a3842a"


def test_id_tells_prompts_and_targets_apart():
    ids = {edit.id for edit in (Edit("a", "b"), Edit("a", "c"), Edit("b", "b"), Edit("a b", "c"), Edit("a", "b c"))}
    assert len(ids) == 5


def test_given_id_is_kept():
    assert Edit(PROMPT, TARGET, id="E7").id == "E7"


@pytest.mark.parametrize("name", [field.name for field in fields(Edit)])
def test_edit_is_immutable(name):
    edit = Edit(PROMPT, TARGET)
    before = getattr(edit, name)
    with pytest.raises(FrozenInstanceError):
        setattr(edit, name, "other")
    assert getattr(edit, name) == before


def test_probe_is_immutable():
    with pytest.raises(FrozenInstanceError):
        Probe("a").answer = "b"  # type: ignore[misc]


def test_edit_does_not_share_the_callers_lists():
    rephrases = ["one"]
    edit = Edit(PROMPT, TARGET, rephrases=rephrases)
    rephrases.append("two")
    assert edit.rephrases == ("one",)


def test_equal_edits_are_one_in_a_set():
    one, same = Edit(PROMPT, TARGET, locality=["x"]), Edit(PROMPT, f" {TARGET}", locality=[Probe("x")])
    assert one == same
    assert {one, same, Edit(PROMPT, TARGET)} == {one, Edit(PROMPT, TARGET)}


def test_replace_checks_again():
    edit = Edit(PROMPT, TARGET)
    assert replace(edit, source="page").source == "page"
    with pytest.raises(EditError, match="`prompt` is empty"):
        replace(edit, prompt="")


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({"prompt": ""}, ["`prompt` is empty, expected some text"]),
        ({"prompt": None}, ["`prompt` is missing"]),
        ({"prompt": 5}, ["`prompt` is a int (5), expected a string"]),
        (
            {"prompt": "It is "},
            ["`prompt` ends in white space ('It is '): remove it, a space is put between prompt and target"],
        ),
        (
            {"prompt": "It is\n"},
            ["`prompt` ends in white space ('It is\\n'): remove it, a space is put between prompt and target"],
        ),
        ({"target": ""}, ["`target` is empty, expected some text"]),
        ({"target": " \n"}, ["`target` is empty, expected some text"]),
        ({"target": None}, ["`target` is missing"]),
        ({"target": ["Astana"]}, ["`target` is a list (['Astana']), expected a string"]),
        ({"target": True}, ["`target` is a bool (True), expected a string"]),
        ({"subject": 1}, ["`subject` is a int (1), expected a string"]),
        ({"id": 7}, ["`id` is a int (7), expected a string"]),
        ({"source": {"url": "x"}}, ["`source` is a dict ({'url': 'x'}), expected a string"]),
        ({"rephrases": "text"}, ["`rephrases` is a str ('text'), expected a list"]),
        ({"rephrases": ["a", ""]}, ["`rephrases[1]` is empty, expected some text"]),
        (
            {"rephrases": ["a", None, 2]},
            ["`rephrases[1]` is missing", "`rephrases[2]` is a int (2), expected a string"],
        ),
        ({"locality": "text"}, ["`locality` is a str ('text'), expected a list"]),
        ({"locality": {"prompt": "a"}}, ["`locality` is a dict ({'prompt': 'a'}), expected a list"]),
        ({"locality": [3]}, ["`locality[0]` is a int (3), expected a string or an object with `prompt` and `answer`"]),
        ({"locality": [""]}, ["`locality[0].prompt` is empty, expected some text"]),
        ({"locality": [Probe("")]}, ["`locality[0].prompt` is empty, expected some text"]),
        ({"locality": [{"answer": "a"}]}, ["`locality[0].prompt` is missing"]),
        ({"locality": [{"prompt": "a", "answer": " "}]}, ["`locality[0].answer` is empty, expected some text"]),
        ({"locality": [{"prompt": "a", "answer": 4}]}, ["`locality[0].answer` is a int (4), expected a string"]),
        (
            {"locality": ["a", {"prompt": "a", "answr": "b", "_": 1}]},
            ["`locality[1]` has unknown keys ['_', 'answr'], expected `prompt` and `answer`"],
        ),
        ({"portability": 1.5}, ["`portability` is a float (1.5), expected a list"]),
        ({"portability": ["a"]}, ["`portability[0]` has no answer: give the answer that follows from the edit"]),
        (
            {"portability": [Probe("a", "b"), Probe("a")]},
            ["`portability[1]` has no answer: give the answer that follows from the edit"],
        ),
    ],
)
def test_fault(changes, faults):
    assert faults_of(**changes) == faults


def test_all_faults_of_an_edit_at_once():
    assert faults_of(
        prompt="A ", target=None, subject=1, rephrases="r", locality=[{}], portability=["p"], id=2, source=3
    ) == [
        "`prompt` ends in white space ('A '): remove it, a space is put between prompt and target",
        "`target` is missing",
        "`subject` is a int (1), expected a string",
        "`id` is a int (2), expected a string",
        "`source` is a int (3), expected a string",
        "`rephrases` is a str ('r'), expected a list",
        "`locality[0].prompt` is missing",
        "`portability[0]` has no answer: give the answer that follows from the edit",
    ]


@pytest.mark.parametrize(("length", "shown"), [(56, f"['{'x' * 56}']"), (57, f"['{'x' * 55}...")])
def test_long_value_is_shortened_in_the_message(length, shown):
    assert faults_of(target=["x" * length]) == [f"`target` is a list ({shown}), expected a string"]


@pytest.mark.parametrize(
    ("changes", "name", "character"),
    [
        ({"prompt": "\ud83d is"}, "prompt", 1),
        ({"target": "a\udc00"}, "target", 2),
        ({"subject": "\ud800"}, "subject", 1),
        ({"id": "ab\ud800"}, "id", 3),
        ({"source": "\ud800"}, "source", 1),
        ({"rephrases": ["a", "\ud800"]}, "rephrases[1]", 1),
        ({"locality": ["\ud800"]}, "locality[0].prompt", 1),
        ({"portability": [Probe("a", "b\ud800")]}, "portability[0].answer", 2),
    ],
)
def test_lone_surrogate_is_a_fault_because_no_file_can_hold_it(changes, name, character):
    (fault,) = faults_of(**changes)
    start, value = fault.split(" (")
    assert start == f"`{name}` has a lone surrogate at character {character}"
    assert "\\ud" in value.lower() and value.endswith("')")
    fault.encode()  # the message itself can be printed


@pytest.mark.parametrize(
    ("name", "value"),
    [("rephrases", "Tell A"), ("locality", Probe("Tell A", "b")), ("portability", Probe("Tell A", "b"))],
)
def test_what_is_trained_on_is_not_scored(name, value):
    assert faults_of(train_rephrases=["Say A", "Tell A"], **{name: [value]}) == [
        f"`train_rephrases[1]` ('Tell A') is one of `{name}` too: what is trained on cannot be scored, leave it out of one of them"
    ]
