"""Many facts: averages by role, what is left out, the file and the picture, and the proposed layers."""

import copy
import json

import pytest
import torch
from tokenizers import normalizers

from peft_locft import Edit, EditSet
from peft_locft.location import (
    TracingResults,
    layers_from_tracing,
    load_tracing,
    plot_tracing,
    trace,
    trace_edits,
)
from peft_locft.location.facts import ROLES, read_fact, roles_of
from peft_locft.location.restoring import Runs


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def facts():
    return EditSet(
        [
            Edit("The capital of Kazakhstan is", "Astana", subject="Kazakhstan"),
            Edit("What is the capital of Nepal? It is called", "Kathmandu", subject="Nepal"),
            Edit("The capital of Ulaanbaatarland", "Ulaanbaatar", subject="Ulaanbaatarland"),
        ]
    )


def results(mlp: list[list[float]]) -> TracingResults:
    return TracingResults({"mlp": torch.tensor(mlp, dtype=torch.float64)}, {}, [], {})


def rows_for(line: list[float]) -> list[list[float]]:
    """A table in which the last subject token has these effects, and other tokens higher ones elsewhere."""
    return [line if role == "last subject token" else [9.0, *[0.0] * (len(line) - 1)] for role in ROLES]


@pytest.mark.parametrize(
    ("length", "begin", "end", "expected"),
    [
        (9, 1, 5, "- first middle middle last subsequent further further final"),
        (5, 1, 3, "- first last subsequent final"),
        (4, 0, 3, "first middle last final"),
        (3, 1, 2, "- last final"),
        (3, 1, 3, "- first last"),
        (1, 0, 1, "last"),
    ],
)
def test_each_token_has_one_role(length, begin, end, expected):
    short = dict(zip(("first", "middle", "last", "subsequent", "further", "final"), ROLES))
    assert roles_of(length, begin, end) == [short.get(word) for word in expected.split()]


@pytest.mark.parametrize(
    ("prompt", "subject", "text"),
    [
        ("The capital of Kazakhstan is", "Kazakhstan", " Kazakhstan"),
        ("Kazakhstan is", "Kazakhstan", "Kazakhstan"),
        ("The capital of Kazakhstan is", " Kazakhstan ", " Kazakhstan"),
        ("Peru, Peru and Peru", "Peru", "Peru"),
        ("The food of Côte d’Ivoire is", "Côte d’Ivoire", " Côte d’Ivoire"),
        ("Is it (Kenya)?", "Kenya", "Kenya"),
    ],
)
def test_the_subject_is_found_by_its_characters(prompt, subject, text, tokenizer):
    fact = read_fact(tokenizer, prompt, subject)
    assert tokenizer.decode(fact.tokens[fact.begin : fact.end]) == text
    assert fact.tokens == tokenizer(prompt)["input_ids"]


def test_a_subject_is_not_looked_for_inside_other_words(tokenizer):
    fact = read_fact(tokenizer, "Annual sales of Ann are", "Ann")
    assert tokenizer.decode(fact.tokens[: fact.begin]).strip() == "Annual sales of"
    assert tokenizer.decode(fact.tokens[fact.end :]).strip() == "are"


def test_averages_are_those_of_the_single_traces_by_role(make_model, tokenizer, facts):
    model = make_model()
    found = trace_edits(model, tokenizer, facts, copies=3, window=2, show_progress=False)
    noise = found.settings["noise"]
    singles = [
        trace(model, edit.prompt, edit.subject, tokenizer=tokenizer, copies=3, window=2, noise=noise) for edit in facts
    ]
    assert found.num_facts == 3 and found.left_out == {}
    for i, role in enumerate(ROLES):
        where = [(single, token) for single in singles for token, name in enumerate(single.roles) if name == role]
        assert found.tokens[role] == len(where)
        for kind in ("states", "mlp", "attention"):
            expected = torch.stack([single.effects[kind][token] for single, token in where]).double().mean(0)
            torch.testing.assert_close(found.effects[kind][i], expected, rtol=0, atol=1e-9)
            assert torch.equal(found.effects_of(kind, role), found.effects[kind][i])
    assert found.clean_probability == pytest.approx(sum(single.clean_probability for single in singles) / 3)
    assert found.corrupted_probability == pytest.approx(sum(single.corrupted_probability for single in singles) / 3)
    assert [row["answer"] for row in found.rows] == [single.answer for single in singles]


def test_what_is_not_asked_for_is_not_traced(make_model, tokenizer, facts, monkeypatch, tmp_path):
    model, rows = make_model(), []
    options = {"copies": 3, "window": 2, "show_progress": False}
    full = trace_edits(model, tokenizer, facts, **options)
    plain = Runs.restored_probabilities

    def counted(self, token, cells, *args):
        rows.append((token - self.fact.end + 1, {cell.kind for cell in cells}))
        return plain(self, token, cells, *args)

    monkeypatch.setattr(Runs, "restored_probabilities", counted)
    found = trace_edits(model, tokenizer, facts, kinds=["mlp"], roles=["last subject token"], **options)
    assert all(where == (0, {"mlp"}) for where in rows) and len(rows) >= len(facts)
    assert list(found.effects) == ["mlp"] and found.rows == full.rows
    expected = full.effects_of("mlp", "last subject token")
    torch.testing.assert_close(found.effects_of("mlp", "last subject token"), expected, rtol=0, atol=1e-6)
    assert found.effects_of("mlp", "last token").isnan().all()
    assert layers_from_tracing(found, 1) == layers_from_tracing(full, 1)
    found.save(tmp_path)
    assert load_tracing(tmp_path).tokens == {role: 3 * (role == "last subject token") for role in ROLES}
    rare = trace_edits(model, tokenizer, facts[:1], roles=["middle subject tokens"], **options)
    with pytest.raises(ValueError, match="no MLP was traced at the last subject token: leave `roles` out, or name it"):
        layers_from_tracing(rare)
    rare.save(tmp_path)
    assert rare.effects["mlp"].isnan().all() and load_tracing(tmp_path).num_facts == 1


def test_facts_may_be_a_file(make_model, tokenizer, facts, tmp_path):
    EditSet(facts).save(tmp_path / "facts.jsonl")
    options = {"copies": 2, "show_progress": False}
    found = trace_edits(make_model(), tokenizer, tmp_path / "facts.jsonl", **options)
    assert found.rows == trace_edits(make_model(), tokenizer, facts, **options).rows


def test_the_noise_is_that_of_all_subjects(make_model, tokenizer, facts):
    model = make_model()
    found = trace_edits(model, tokenizer, facts, copies=2, show_progress=False)
    subjects = [tokenizer(f" {edit.subject}")["input_ids"] for edit in facts]
    embedded = model.get_input_embeddings().weight[[token for subject in subjects for token in subject]]
    assert found.settings["noise"] == pytest.approx(3 * embedded.std().item())


def test_what_cannot_be_traced_is_left_out_and_counted(make_model, tokenizer, facts):
    model, ids = make_model(), tokenizer(facts[0].prompt)["input_ids"]
    with torch.no_grad():  # exchange two tokens in the head, so that the model knows that fact
        said = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        swapped = [said, tokenizer(f" {facts[0].target}")["input_ids"][0]]
        model.lm_head.weight[swapped] = model.lm_head.weight[swapped[::-1]]
    edits = [
        facts[0],
        Edit("The capital of Peru is", "Lima", id="none"),
        Edit("The capital of Peru is", "Lima", subject=" ", id="blank"),
        Edit("The capital of Peru is", "Lima", subject="peru", id="elsewhere"),
        Edit("The capital of Cuba is", "Havana", subject="Cuba", id="unknown"),
        Edit("Where is \u200b?", "Havana", subject="\u200b", id="dropped"),
        Edit(f"{'The capital of ' * 40}Cuba is", "Havana", subject="Cuba", id="long"),
    ]
    model.config.max_position_embeddings = 100
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    found = trace_edits(model, tokenizer, edits, answers="target", copies=2, show_progress=False)
    reasons = {row["id"]: row["left_out"] for row in found.rows}
    assert reasons == {
        facts[0].id: None,
        "none": "no subject",
        "blank": "no subject",
        "elsewhere": "subject not in the prompt",
        "unknown": "answer not known to the model",
        "dropped": "no token of the prompt stands for the subject",
        "long": "prompt longer than the model's context",
    }
    assert found.left_out == {
        "no subject": 2,
        "subject not in the prompt": 1,
        "answer not known to the model": 1,
        "no token of the prompt stands for the subject": 1,
        "prompt longer than the model's context": 1,
    }
    assert (found.num_facts, found.rows[1]["clean"]) == (1, None)


def test_a_fact_that_noise_makes_no_less_probable_is_left_out(make_model, tokenizer, facts):
    with pytest.raises(ValueError) as caught:
        # So little noise that it changes no number.
        trace_edits(make_model(), tokenizer, facts, noise=1e-30, copies=2, show_progress=False)
    assert str(caught.value) == (
        "none of the 3 facts can be traced: 3 have the reason 'noise does not lower the answer's probability'. Give "
        "facts whose subject stands in the prompt, and which the model knows, or more `noise`"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": "mine"}, "`answers` is 'mine', expected 'model' or 'target'"),
        ({"kinds": ["mlps"]}, "`kinds` is ['mlps'], expected one or more of ['states', 'mlp', 'attention'] in a list"),
        ({"roles": "last token"}, "`roles` is 'last token', expected one or more of ['first subject token', "),
        ({"roles": []}, "`roles` is [], expected one or more of"),
        ({"edits": []}, "none of the 0 facts can be traced: got no fact"),
        ({"noise": float("nan")}, "`noise` is nan, expected a standard deviation above 0"),
    ],
    ids=["answers", "no such kind", "roles in no list", "no roles", "no facts", "noise"],
)
def test_what_is_refused(changes, message, make_model, tokenizer, facts):
    with pytest.raises(ValueError) as caught:
        trace_edits(make_model(), tokenizer, **{"edits": facts, "show_progress": False, **changes})
    assert message in str(caught.value)


def test_results_are_saved_and_read_and_drawn(make_model, tokenizer, tmp_path):
    edits = [
        Edit("The capital of Kazakhstan is", "Astana", subject="Kazakhstan"),  # no token behind, none in the middle
        Edit("The capital of Peru is", "Lima", subject="Chile"),
    ]
    found = trace_edits(make_model(), tokenizer, edits, copies=2, show_progress=False)
    found.save(tmp_path / "out")
    again = load_tracing(tmp_path / "out")
    for kind, values in found.effects.items():
        torch.testing.assert_close(again.effects[kind], values, rtol=1e-5, atol=1e-9, equal_nan=True)
    assert again.effects["mlp"][ROLES.index("further tokens")].isnan().all()
    assert (again.rows, again.tokens, again.settings) == (found.rows, found.tokens, found.settings)
    summary = json.loads((tmp_path / "out/tracing.json").read_text())
    assert (summary["facts"], summary["left_out"]) == (1, {"subject not in the prompt": 1})
    assert summary["effects"]["mlp"]["further tokens"] is None
    assert layers_from_tracing(again) == [0, 1, 2]
    plot_tracing(again, tmp_path / "tracing.png")
    assert (tmp_path / "tracing.png").read_bytes().startswith(PNG)


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tracing.json: it holds no results of causal tracing"):
        load_tracing(tmp_path)


def test_peaks_skip_roles_without_tokens():
    table = [[0.1, 0.2, 0.1] for _ in ROLES]
    table[1] = [float("nan")] * 3
    table[2] = [0.1, 0.1, 0.7]
    assert results(table).peaks["mlp"] == ("last subject token", 2, 0.7)


def test_a_kind_or_role_that_is_not_there_is_named(make_model):
    found = results(rows_for([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"`kind` is 'state', expected one of \['mlp'\]"):
        found.effects_of("state", "last token")
    with pytest.raises(ValueError, match="`role` is 'subject', expected one of"):
        found.effects_of("mlp", "subject")


@pytest.mark.parametrize(
    ("line", "num_layers", "expected"),
    [
        ([0.0, 0.1, 0.3, 0.5, 0.4, 0.2, 0.0, 0.0], None, [1, 2, 3, 4, 5]),
        ([0.0, 0.1, 0.3, 0.5, 0.4, 0.2, 0.0, 0.0], 1, [3]),
        ([0.0, 0.1, 0.3, 0.5, 0.4, 0.2, 0.0, 0.0], 2, [3, 4]),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.2, 0.3], 3, [5, 6, 7]),
        ([0.3, 0.1], None, [0, 1]),
    ],
)
def test_the_proposed_layers_are_neighbours_around_the_peak(line, num_layers, expected):
    assert layers_from_tracing(results(rows_for(line)), num_layers) == expected


@pytest.mark.parametrize("num_layers", [0, 4])
def test_no_more_layers_are_proposed_than_there_are(num_layers):
    with pytest.raises(ValueError, match=f"`num_layers` is {num_layers}, expected 1 to 3, the number of the model's"):
        layers_from_tracing(results(rows_for([0.1, 0.2, 0.1])), num_layers)


def test_without_mlps_no_layers_are_proposed():
    with pytest.raises(ValueError, match=r"no MLP was traced, only \['states'\]: leave `kinds` out, or name"):
        layers_from_tracing(TracingResults({"states": torch.zeros(6, 3)}, {}, [], {}))
