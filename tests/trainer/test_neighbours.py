"""The edits' own sentences about others."""

import pytest

from peft_locft import Edit, EditSet
from peft_locft.trainer.neighbours import neighbours


TEXTS = [
    "Later Ada Lovelace came, with Anna of the Rhine and Charles Babbage.",
    "Peru Lima is no name here. it was Bo Li.",
]
NAMES = ["Ada Lovelace", "Anna of the Rhine", "Charles Babbage", "Bo Li"]


def test_names_stand_where_subjects_stood():
    edits = EditSet(
        [
            Edit("The king of Peru is", "Bob", subject="Peru"),
            Edit("Norway's money is called", "yen", subject="Norway"),
            Edit("What is the capital of Cuba?", "Oslo", subject="Cuba"),
            Edit("The capital of Spain is", "Lima"),
            Edit("In Rome, they speak", "Thai", subject="Madrid"),
        ]
    )
    found = neighbours(edits, TEXTS, 40, seed=0)
    assert set(found) == {
        form.format(name) for form in ("The king of {} is", "{}'s money is called") for name in NAMES
    }
    assert len(found) == 8
    assert found == neighbours(edits, TEXTS, 40, seed=0) != neighbours(edits, TEXTS, 40, seed=1)


def test_each_edit_has_its_turn():
    edits = EditSet(
        Edit(f"The {thing} of Peru is", "Bob", subject="Peru") for thing in ("king", "sea", "money", "lord")
    )
    found = neighbours(edits, TEXTS, 4, seed=0)
    assert sorted(prompt.split()[1] for prompt in found) == ["king", "lord", "money", "sea"]


@pytest.mark.parametrize("place", ["rephrases", "train_rephrases", "locality", "portability", "prompt"])
def test_what_is_trained_or_asked_is_not_among_them(place):
    other = "The king of Bo Li is"
    probes = [{"prompt": other, "answer": "Bob"}]
    fields = {"rephrases": [other], "train_rephrases": [other], "locality": probes, "portability": probes}
    edits = [Edit("The king of Peru is", "Bob", subject="Peru", **{place: fields[place]} if place in fields else {})]
    if place == "prompt":
        edits.append(Edit(other, "Eve"))
    found = neighbours(EditSet(edits), TEXTS, 40, seed=0)
    assert set(found) == {f"The king of {name} is" for name in NAMES[:3]}


def test_another_edits_subject_is_no_other():
    edits = EditSet(
        [Edit("The king of Peru is", "Bob", subject="Peru"), Edit("Who rules Bo Li?", "Eve", subject="Bo Li")]
    )
    assert set(neighbours(edits, TEXTS, 40, seed=0)) == {f"The king of {name} is" for name in NAMES[:3]}


def test_without_names_or_sentences_there_are_none():
    sentences = EditSet([Edit("The king of Peru is", "Bob", subject="Peru")])
    questions = EditSet([Edit("Who is the king of Peru?", "Bob", subject="Peru")])
    assert neighbours(sentences, ["No name at all."], 4, seed=0) == []
    assert neighbours(questions, TEXTS, 4, seed=0) == []
