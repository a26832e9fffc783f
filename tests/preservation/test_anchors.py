"""What the unedited model says, and how far an edited one has moved from it."""

import re

import pytest
import torch
from torch.nn import functional as F

from peft_locft.evaluation import generate_greedy
from peft_locft.preservation import anchors as anchors_file
from peft_locft.preservation import (
    divergence,
    load_anchors,
    make_anchors,
    sample_questions,
    sample_statements,
    sample_texts,
    samples,
    save_anchors,
)


PROMPTS = ["The capital of Peru is", "Oslo", "What is the capital of Kenya?"]
TEXTS = ["The capital of Peru is Lima. What is the capital of Norway? Oslo"]


def test_a_question_is_said_with_its_greedy_answer_and_a_text_whole(make_model, tokenizer):
    model = make_model()
    found = make_anchors(model, tokenizer, PROMPTS, TEXTS, answer_length=4, text_length=6)
    answers = generate_greedy(model, tokenizer, PROMPTS, [4] * 3)
    for prompt, answer, anchor in zip(PROMPTS, answers, found):
        ids = tokenizer(prompt)["input_ids"]
        assert anchor.input_ids == ids + answer
        assert anchor.first == len(ids) - 1
        assert len(anchor.tokens) == len(answer)
    assert found[3].input_ids == tokenizer(TEXTS[0])["input_ids"][:6]
    assert (found[3].first, len(found[3].tokens)) == (0, 5)


def test_the_kept_probabilities_are_the_models(make_model, tokenizer):
    model = make_model()
    for anchor in make_anchors(model, tokenizer, PROMPTS, TEXTS, answer_length=4, text_length=6):
        with torch.no_grad():
            logits = model(torch.tensor([anchor.input_ids])).logits[0, anchor.first : -1]
        probable = logits.log_softmax(-1).topk(anchor.tokens.shape[1])
        assert torch.equal(probable.indices.int(), anchor.tokens)
        assert torch.allclose(probable.values, anchor.log_probs.float(), atol=1e-2)


def test_what_is_written_is_read_back_to_the_bit(make_model, tokenizer, tmp_path):
    anchors = make_anchors(make_model(), tokenizer, PROMPTS, TEXTS, answer_length=4, text_length=6)
    path = tmp_path / "folder" / "anchors.safetensors"
    assert load_anchors(path, "one") is None
    save_anchors(anchors, path, "one")
    assert load_anchors(path, "another") is None
    found = load_anchors(path, "one")
    assert len(found) == len(anchors) == 4
    for mine, theirs in zip(found, anchors):
        assert (mine.input_ids, mine.first) == (theirs.input_ids, theirs.first)
        assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.log_probs, theirs.log_probs)
        assert (mine.tokens.dtype, mine.log_probs.dtype) == (theirs.tokens.dtype, theirs.log_probs.dtype)


ONE = torch.zeros(5, dtype=torch.long)  # five positions of one sequence


def test_every_sequence_counts_the_same():
    torch.manual_seed(0)
    old, new = torch.randn(5, 7).log_softmax(-1), torch.randn(5, 7)
    values, tokens = old.topk(6)
    each = F.kl_div(new.log_softmax(-1), old, log_target=True, reduction="none").sum(-1)
    found = divergence(new, tokens, values, torch.tensor([4, 9, 9, 4, 9]))
    assert torch.allclose(found, (each[[0, 3]].mean() + each[[1, 2, 4]].mean()) / 2, atol=1e-5)


def test_the_divergence_is_kl_where_everything_is_kept():
    torch.manual_seed(0)
    old, new = torch.randn(5, 7).log_softmax(-1), torch.randn(5, 7)
    values, tokens = old.topk(6)  # the seventh is all the others
    whole = F.kl_div(new.log_softmax(-1), old, log_target=True, reduction="batchmean")
    assert torch.allclose(divergence(new, tokens, values, ONE), whole, atol=1e-5)


def test_the_divergence_of_joined_outcomes_is_between_zero_and_the_whole_one():
    torch.manual_seed(0)
    old, new = torch.randn(5, 200).log_softmax(-1), torch.randn(5, 200, requires_grad=True)
    values, tokens = old.topk(20)
    joined = divergence(new, tokens, values, ONE)
    assert 0 < joined < F.kl_div(new.log_softmax(-1), old, log_target=True, reduction="batchmean")
    joined.backward()
    assert new.grad.abs().sum() > 0
    assert divergence(old, tokens, values, ONE).abs() < 1e-5


def test_samples_are_those_of_the_seed_and_leave_the_model_as_it_was(make_model, tokenizer):
    model = make_model().train()
    state = torch.get_rng_state()
    texts = sample_texts(model, tokenizer, 3, 12, seed=5)
    assert texts == sample_texts(model, tokenizer, 3, 12, seed=5) != sample_texts(model, tokenizer, 3, 12, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_texts_begin_with_words_of_the_vocabulary(make_model, tokenizer):
    words = {tokenizer.decode([number]).strip() for number in range(len(tokenizer))}
    beginnings = {word[:1].upper() + word[1:] for word in words} | words
    texts = sample_texts(make_model(), tokenizer, 12, 1, seed=0)
    for text, form in zip(texts, ["{}", "The {}", "{} is", "{} was", "In {}", "{} and"] * 2):
        assert any(text.startswith(form.format(word)) for word in beginnings if len(word) > 2)
    assert len({text.split()[0] for text in texts}) > 4


def test_a_text_of_a_real_model_begins_with_a_whole_word(smollm):
    texts = sample_texts(*smollm, 12, 1, seed=0)
    assert len(set(texts)) == 12
    assert all(re.match("(The |In )?[A-Za-z][a-z]{2,}", text) for text in texts)


def test_questions_end_at_their_question_mark(smollm):
    questions = sample_questions(*smollm, 24, seed=0)
    assert 12 <= len(questions) == len(set(questions))
    assert all(question.endswith("?") and question.count("?") == 1 for question in questions)
    assert any(question.startswith("What") for question in questions)


def test_statements_are_left_to_be_ended(smollm):
    statements = sample_statements(*smollm, 24, seed=0)
    assert 8 <= len(statements) == len(set(statements)) <= 24
    assert all(len(statement.split()) >= 3 and statement[-1] not in "!?" for statement in statements)
    assert any(statement.startswith("The ") for statement in statements)


def test_the_end_of_a_statement_is_left_to_be_said(make_model, tokenizer, monkeypatch):
    said = [" is in Peru. It is old.", " is in\nPeru.", ".", " lives in the U.S. of America!", " has a long red tail."]
    monkeypatch.setattr(samples, "_random_words", lambda *args: ["Lima"] * 5)
    monkeypatch.setattr(samples, "_SUBJECTS", ["{0}"])
    monkeypatch.setattr(samples, "_sample", lambda *args: said)
    ends = set()
    for seed in range(20):
        first, *rest = sample_statements(make_model(), tokenizer, 5, seed)
        assert first == "Lima is in"
        assert len(rest) == 2 and "Lima lives in the U.S. of America".startswith(rest[0] + " ")
        assert "Lima has a long red tail".startswith(rest[1] + " ") and len(rest[1].split()) >= 3
        ends.add(rest[1])
    assert len(ends) == 3


def test_a_large_batch_of_anchors_is_that_of_small_ones(make_model, tokenizer, monkeypatch):
    model = make_model()
    large = make_anchors(model, tokenizer, PROMPTS, TEXTS, answer_length=3, text_length=8)
    monkeypatch.setattr(anchors_file, "_BATCH", 1)
    for one, other in zip(large, make_anchors(model, tokenizer, PROMPTS, TEXTS, answer_length=3, text_length=8)):
        assert one.input_ids == other.input_ids
        assert torch.allclose(one.log_probs.float(), other.log_probs.float(), atol=1e-2)


@pytest.mark.parametrize("kept", [1, 64])
def test_a_model_that_has_not_moved_has_no_divergence(make_model, tokenizer, monkeypatch, kept):
    monkeypatch.setattr(anchors_file, "_KEPT", kept)
    model = make_model()
    anchor = make_anchors(model, tokenizer, PROMPTS[:1], [], answer_length=4, text_length=6)[0]
    with torch.no_grad():
        logits = model(torch.tensor([anchor.input_ids])).logits[0, anchor.first : -1]
    assert divergence(logits, anchor.tokens, anchor.log_probs, torch.zeros(len(logits))).abs() < 1e-3
