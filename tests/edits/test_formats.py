"""Every known format becomes the same kind of edit."""

import warnings

import pytest

from peft_locft.edits import Edit, EditDataError, Probe, load_edits


def load_one(record: dict) -> Edit:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (edit,) = load_edits([record])
    return edit


def faults_of(record) -> list[str]:
    with pytest.raises(EditDataError) as raised:
        load_edits([record])
    return raised.value.faults


def test_own_format():
    record = {
        "id": "kz",
        "prompt": "The capital of Kazakhstan is",
        "target": "Astana",
        "subject": "Kazakhstan",
        "rephrases": ["Kazakhstan's capital is"],
        "locality": ["The capital of Mali is", {"prompt": "The capital of France is", "answer": "Paris"}],
        "portability": [{"prompt": "Kazakhstan's parliament sits in", "answer": "Astana"}],
        "source": "https://example.org",
    }
    assert load_one(record) == Edit(**record)


def test_own_format_with_missing_values_of_pandas():
    nan = float("nan")
    record = {"prompt": "A is", "target": "b", "subject": nan, "rephrases": nan, "locality": None, "id": nan}
    assert load_one(record) == Edit("A is", "b")


@pytest.mark.parametrize("completion", [" Astana", "Astana"])
def test_trl_drops_the_leading_space_of_the_completion(completion):
    edit = load_one({"prompt": "The capital is", "completion": completion, "source": "TRL"})
    assert edit == Edit("The capital is", "Astana", source="TRL")


@pytest.mark.parametrize("name", ["prompt", "completion"])
def test_trl_conversation_is_refused(name):
    record = {"prompt": "A is", "completion": " b", name: [{"role": "user", "content": "A is"}]}
    assert faults_of(record) == [
        f"record 1: `{name}` is a conversation, expected plain text: give the text of its one message"
    ]


ZSRE = {
    "subject": "Charity Creek",
    "src": "Which river system contains Charity Creek?",
    "pred": "Parramatta River",
    "rephrase": "What river system is Charity Creek in?",
    "alt": "Chichester River",
    "answers": ["Parramatta River"],
    "loc": "nq question: how many series of diary of a wimpy kid are there",
    "loc_ans": "12",
    "cond": "Parramatta River >> Chichester River",
}


def test_zsre():
    assert load_one(ZSRE) == Edit(
        ZSRE["src"],
        "Chichester River",
        subject="Charity Creek",
        rephrases=[ZSRE["rephrase"]],
        locality=[Probe(ZSRE["loc"], "12")],
    )


@pytest.mark.parametrize("empty", [None, "", []])
def test_zsre_without_probes(empty):
    record = {**ZSRE, "rephrase": empty, "loc": empty, "loc_ans": empty}
    assert load_one(record) == Edit(ZSRE["src"], ZSRE["alt"], subject="Charity Creek")


def test_zsre_locality_without_an_answer_keeps_its_prompt():
    assert load_one({**ZSRE, "loc_ans": ""}).locality == (Probe(ZSRE["loc"]),)


def test_counterfact_flat():
    record = {
        "case_id": 1884,
        "prompt": "Reedy Glacier is in",
        "target_new": "Asia",
        "subject": "Reedy Glacier",
        "ground_truth": "Antarctica",
        "rephrase_prompt": "Reedy Glacier is located in the continent",
        "locality_prompt": "Mount Erebus, in",
        "locality_ground_truth": "Antarctica",
    }
    assert load_one(record) == Edit(
        "Reedy Glacier is in",
        "Asia",
        subject="Reedy Glacier",
        rephrases=["Reedy Glacier is located in the continent"],
        locality=[Probe("Mount Erebus, in", "Antarctica")],
        id="1884",
    )


REWRITE = {
    "prompt": "The mother tongue of {} is",
    "relation_id": "P103",
    "target_new": {"str": "English", "id": "Q1860"},
    "target_true": {"str": "French", "id": "Q150"},
    "subject": "Danielle Darrieux",
}


@pytest.mark.parametrize("rewrite", [REWRITE, [REWRITE]])
def test_counterfact_nested(rewrite):
    record = {
        "case_id": 0,
        "requested_rewrite": rewrite,
        "paraphrase_prompts": ["Danielle Darrieux, a native"],
        "neighborhood_prompts": ["Léon Blum is a native speaker of", "Montesquieu spoke"],
        "attribute_prompts": ["J.R.R. Tolkien is a native speaker of"],
        "generation_prompts": ["Danielle Darrieux was born in"],
    }
    assert load_one(record) == Edit(
        "The mother tongue of Danielle Darrieux is",
        "English",
        subject="Danielle Darrieux",
        rephrases=["Danielle Darrieux, a native"],
        locality=[Probe("Léon Blum is a native speaker of"), Probe("Montesquieu spoke")],
        id="0",
    )


def test_counterfact_needs_no_more_than_the_rewrite():
    rewrite = {"prompt": "The mother tongue of {} is", "target_new": "English", "subject": "Danielle Darrieux"}
    edit = load_one({"requested_rewrite": rewrite})
    assert edit == Edit("The mother tongue of Danielle Darrieux is", "English", subject="Danielle Darrieux")


@pytest.mark.parametrize(
    "rewrite", ["text", None, [], [REWRITE, REWRITE], {k: v for k, v in REWRITE.items() if k != "subject"}]
)
def test_counterfact_without_a_rewrite_is_refused(rewrite):
    assert faults_of({"requested_rewrite": rewrite}) == [
        "record 1: `requested_rewrite` is expected to be an object with `prompt`, `subject` and `target_new`"
    ]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"prompt": None}, "`prompt` is missing"),
        ({"target_new": {"id": "Q1"}}, "`target` is missing"),
        ({"target_new": {"str": 5}}, "`target` is a int (5), expected a string"),
        ({"subject": 4}, "`subject` is a int (4), expected a string"),
    ],
)
def test_counterfact_with_faulty_values(change, fault):
    assert faults_of({"requested_rewrite": {**REWRITE, **change}}) == [f"record 1: {fault}"]


WIKIBIG = {
    "tag": "new",
    "subject": "Taichung",
    "update": "What country is Taichung part of?",
    "rephrase": "To which country does Taichung belong?",
    "ans": "Taiwan",
    "object": "Taiwan",
    "loc": "Who wrote Hamlet?",
    "loc_ans": "Shakespeare",
    "mhop": "What is the currency of Taichung's country?",
    "mhop_ans": "New Taiwan dollar",
    "personas": "Arr, what land be Taichung in?",
}


def test_wikibigedit_personas_are_rephrases_and_mhop_is_portability():
    assert load_one({**WIKIBIG, "personas_2": "Pray, whither belongeth Taichung?", "personas_3": None}) == Edit(
        WIKIBIG["update"],
        "Taiwan",
        subject="Taichung",
        rephrases=[WIKIBIG["rephrase"], WIKIBIG["personas"], "Pray, whither belongeth Taichung?"],
        locality=[Probe("Who wrote Hamlet?", "Shakespeare")],
        portability=[Probe(WIKIBIG["mhop"], "New Taiwan dollar")],
    )


def test_wikibigedit_without_probes():
    names = ("rephrase", "loc", "loc_ans", "mhop", "mhop_ans", "personas")
    record = {**WIKIBIG, **dict.fromkeys(names)}
    assert load_one(record) == Edit(WIKIBIG["update"], "Taiwan", subject="Taichung")


def test_wikibigedit_mhop_without_an_answer_is_a_fault():
    assert faults_of({**WIKIBIG, "mhop_ans": None}) == [
        "record 1: `portability[0]` has no answer: give the answer that follows from the edit"
    ]


KNOWEDIT = {
    "subject": "Leo Arons",
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Berlin",
    "ground_truth": ["Munich"],
    "portability": {
        "Subject_Aliasing": [{"prompt": "The place of death of Martin Arons is", "ground_truth": "Berlin"}],
        "Reasoning": [
            {"prompt": "The river at Leo Arons's place of death is", "ground_truth": [["Spree", "River Spree"]]},
            {"prompt": "No one knows", "ground_truth": [[""]]},
            {"prompt": "Nothing is given", "ground_truth": []},
        ],
        "Logical_Generalization": None,
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The gender of Leo Arons is", "ground_truth": [["male", "man"], ["masculine"]]},
            {"prompt": "The field of Leo Arons is", "ground_truth": []},
        ],
        "Forgetfulness": {"prompt": "Leo Arons was born in", "ground_truth": "1860"},
    },
}


def test_knowedit_flattens_its_groups():
    edit = load_one(KNOWEDIT)
    assert (edit.prompt, edit.target, edit.subject) == (KNOWEDIT["prompt"], "Berlin", "Leo Arons")
    assert edit.portability == (
        Probe("The place of death of Martin Arons is", "Berlin"),
        Probe("The river at Leo Arons's place of death is", "Spree"),
    )
    assert edit.locality == (
        Probe("The gender of Leo Arons is", "male"),
        Probe("The field of Leo Arons is", None),
        Probe("Leo Arons was born in", "1860"),
    )


def test_easyedit_lists_of_prompts_and_answers_go_in_step():
    record = {
        "prompt": "A is",
        "target_new": "b",
        "locality": {"neighborhood": {"prompt": ["C is", "E is"], "ground_truth": ["d", ["f", "F"]]}},
        "portability_prompt": ["G is", "I is"],
        "portability_ground_truth": ["h", "j"],
    }
    edit = load_one(record)
    assert edit.locality == (Probe("C is", "d"), Probe("E is", "f"))
    assert edit.portability == (Probe("G is", "h"), Probe("I is", "j"))


def test_easyedit_alternative_answers_of_one_prompt():
    record = {"prompt": "A is", "target_new": "b", "locality_prompt": "C is", "locality_ground_truth": ["d", "D"]}
    assert load_one(record).locality == (Probe("C is", "d"),)


@pytest.mark.parametrize("name", ["rephrase_prompt", "rephrase"])
@pytest.mark.parametrize("value", ["A equals", ["A equals"]])
def test_easyedit_rephrase(name, value):
    assert load_one({"prompt": "A is", "target_new": ["b"], name: value}) == Edit("A is", "b", rephrases=["A equals"])


@pytest.mark.parametrize("name", ["locality", "portability"])
@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ([{"prompt": "a"}], "its probes are a list, expected an object with groups of probes"),
        ("text", "its probes are a str, expected an object with groups of probes"),
        (
            {"New Question": "Where?"},
            "a probe is 'Where?', expected an object with `prompt` and `ground_truth`",
        ),
    ],
)
def test_easyedit_probes_of_another_form_are_refused_and_not_lost(name, value, fault):
    assert faults_of({"prompt": "A is", "target_new": "b", name: value}) == [f"record 1: {fault}"]


def test_knowedit_wikibio():
    record = {
        "text": "This is a Wikipedia passage about john russell reynolds.",
        "labels": "Sir John Russell Reynolds was a British neurologist.",
        "concept": "john russell reynolds",
        "locality": {"Relation_Specificity": [{"prompt": "His gender is", "ground_truth": ["male"]}]},
    }
    assert load_one(record) == Edit(
        record["text"], record["labels"], subject="john russell reynolds", locality=[Probe("His gender is", "male")]
    )


@pytest.mark.parametrize(
    "record",
    [
        {"src": "A is", "alt": "b"},
        {"prompt": "A is", "target_new": "b"},
        {"requested_rewrite": {"prompt": "{} is", "subject": "A", "target_new": "b"}},
        {"update": "A is", "ans": "b"},
        {"text": "A is", "labels": "b"},
        {"prompt": "A is", "completion": "b"},
    ],
    ids=lambda record: " ".join(record),
)
def test_every_format_may_have_training_rephrases(record):
    (edit,) = load_edits([record | {"train_rephrases": ["Tell A:"]}])
    assert (edit.prompt, edit.target, edit.train_rephrases) == ("A is", "b", ("Tell A:",))
    (edit,) = load_edits([record | {"train_rephrases": None}])
    assert edit.train_rephrases == ()
