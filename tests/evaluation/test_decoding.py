"""Decoding against the model's own `generate`, called for one prompt at a time without padding."""

import random

import pytest
import torch
from decoding_cases import (
    DECODED,
    LIMITS,
    PROMPTS,
    alone,
    drafts_by_kind,
    forwards,
    no_fallback,
    other,
)
from peft import LoraConfig, get_peft_model

from peft_locft import Edit, EditSet, LocFTConfig
from peft_locft.evaluation import ask, evaluate_edits, generate_greedy, generation, questions_of
from peft_locft.evaluation.decoding import read_guess
from peft_locft.evaluation.questions import drafts_of


@pytest.mark.parametrize("architecture", DECODED)
def test_equals_generate_on_every_architecture_with_every_kind_of_draft(build, tokenizer, architecture, monkeypatch):
    model = build(architecture)
    expected = [alone(model, tokenizer, prompt, limit) for prompt, limit in zip(PROMPTS, LIMITS)]
    assert len({tuple(tokens) for tokens in expected}) > 4  # or else equality would say little
    with no_fallback(monkeypatch):
        for kind, drafts in drafts_by_kind(tokenizer, expected).items():
            for batch_size in (1, 3, 8):
                answers = generate_greedy(model, tokenizer, PROMPTS, LIMITS, batch_size=batch_size, drafts=drafts)
                assert answers == expected, (kind, batch_size)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "bloom"])
def test_answers_that_end_before_the_limit(build, tokenizer, architecture, monkeypatch):
    model = build(architecture)
    free = [alone(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    # Tokens that some answers come to at once, some later and some never.
    stops = [free[0][2], free[1][5], free[3][0], tokenizer.eos_token_id]
    model.generation_config.eos_token_id = stops
    expected = [alone(model, tokenizer, prompt, 12, stops) for prompt in PROMPTS]
    lengths = sorted(map(len, expected))
    assert lengths[0] == 1 and any(1 < length < 12 for length in lengths) and expected != free
    drafts = drafts_by_kind(tokenizer, expected)
    drafts |= {"beyond the end": free, "another end": [[*tokens[:3], stops[0]] for tokens in free]}
    with no_fallback(monkeypatch):
        for kind, some in drafts.items():
            for batch_size in (1, 3, 8):
                answers = generate_greedy(model, tokenizer, PROMPTS, [12] * 8, batch_size=batch_size, drafts=some)
                assert answers == expected, (kind, batch_size)


@pytest.mark.parametrize("seed", range(12))
def test_random_prompts_limits_drafts_and_ends(build, tokenizer, seed, monkeypatch):
    rng = random.Random(seed)
    model = build(rng.choice(["llama", "gpt2", "gemma3", "qwen3", "falcon_alibi"]))
    vocab = len(tokenizer)
    words = " ".join(PROMPTS).split()
    prompts = [" ".join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(20)]
    limits = [rng.randint(0, 14) for _ in prompts]
    stops = [tokenizer.eos_token_id, *rng.sample(range(vocab), 20)]
    model.generation_config.eos_token_id = stops
    expected = [alone(model, tokenizer, p, n, stops) if n else [] for p, n in zip(prompts, limits)]
    drafts = [
        rng.choice([None, tokens[: rng.randint(0, len(tokens))] + rng.choices(range(vocab), k=rng.randint(0, 4))])
        for tokens in expected
    ]
    monkeypatch.setattr(generation, "_OPEN_TOKENS", rng.choice([1, 30, 4096]))
    with no_fallback(monkeypatch):
        answers = generate_greedy(model, tokenizer, prompts, limits, batch_size=rng.randint(1, 9), drafts=drafts)
    assert answers == expected


def test_a_batch_of_right_drafts_costs_one_forward_pass_and_no_token_too_many(build, tokenizer):
    model = build()
    expected = generate_greedy(model, tokenizer, PROMPTS, LIMITS)
    with forwards(model) as shapes:
        assert generate_greedy(model, tokenizer, PROMPTS, LIMITS, drafts=expected, batch_size=8) == expected
    # The last token of an answer need not be read.
    width = max(len(tokenizer(prompt)["input_ids"]) + len(tokens) - 1 for prompt, tokens in zip(PROMPTS, expected))
    assert shapes == [(8, width)]


def test_only_the_wanted_logits_are_computed(build, tokenizer):
    model = build()
    expected = generate_greedy(model, tokenizer, PROMPTS, LIMITS)
    rows = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].numel() // 64))
    generate_greedy(model, tokenizer, PROMPTS, LIMITS, drafts=expected, batch_size=8)
    hook.remove()
    assert rows == [sum(map(len, expected))]


def test_long_drafts_are_read_in_smaller_batches(build, tokenizer):
    model = build()
    limits = [20] * 8
    expected = generate_greedy(model, tokenizer, PROMPTS, limits)
    assert all(len(tokens) == 20 for tokens in expected)
    with forwards(model) as shapes:
        assert generate_greedy(model, tokenizer, PROMPTS, limits, batch_size=8, drafts=expected) == expected
    assert [rows for rows, _ in shapes] == [3, 3, 2]  # 20 rows of logits each, of 64 at once


def test_finished_rows_leave_and_those_that_are_left_go_on_together(build, tokenizer, monkeypatch):
    model = build()
    limits = [1, 2, 3, 4, 5, 6, 7, 8]
    expected = [alone(model, tokenizer, prompt, limit) for prompt, limit in zip(PROMPTS, limits)]
    assert list(map(len, expected)) == limits
    generate_greedy(model, tokenizer, PROMPTS[:1], [1])  # by now the model has been tried
    with forwards(model) as shapes:
        assert generate_greedy(model, tokenizer, PROMPTS, limits, batch_size=8) == expected
    assert [rows for rows, _ in shapes] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert {width for _, width in shapes[1:]} == {1}
    # In batches of four: two are read before the first step, unless the caches are large.
    with forwards(model) as shapes:
        assert generate_greedy(model, tokenizer, PROMPTS, limits, batch_size=4) == expected
    assert [rows for rows, _ in shapes] == [4, 4, 7, 6, 5, 4, 3, 2, 1]
    monkeypatch.setattr(generation, "_OPEN_TOKENS", 1)
    with forwards(model) as shapes:
        assert generate_greedy(model, tokenizer, PROMPTS, limits, batch_size=4) == expected
    steps = [rows for rows, width in shapes if width == 1]
    assert len(shapes) - len(steps) == 2 and sum(steps) == sum(limits) - 8
    assert max(steps) < 7 and [rows for rows, _ in shapes] != [4, 4, 7, 6, 5, 4, 3, 2, 1]


def test_the_rest_of_the_answer_costs_one_pass_a_token(build, tokenizer):
    model = build()
    (tokens,) = generate_greedy(model, tokenizer, PROMPTS[:1], [8])
    wrong = [*tokens[:3], other(tokens[3], len(tokenizer)), *tokens[4:]]
    with forwards(model) as shapes:
        assert generate_greedy(model, tokenizer, PROMPTS[:1], [8], drafts=[wrong]) == [tokens]
    # Three tokens of the draft are right and the model's own comes behind them: four are left.
    assert [width for _, width in shapes][1:] == [1] * 4


@pytest.mark.parametrize("peft_config", [LocFTConfig(layers=[1]), LoraConfig(target_modules="all-linear")])
def test_with_an_adapter_on_off_and_merged(build, tokenizer, peft_config, monkeypatch):
    peft_config.task_type = "CAUSAL_LM"
    model = get_peft_model(build(), peft_config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)

    def check(model):
        expected = [alone(model, tokenizer, prompt, limit) for prompt, limit in zip(PROMPTS, LIMITS)]
        for drafts in drafts_by_kind(tokenizer, expected).values():
            assert generate_greedy(model, tokenizer, PROMPTS, LIMITS, batch_size=3, drafts=drafts) == expected
        return expected

    with no_fallback(monkeypatch):
        edited = check(model)
        with model.disable_adapter():
            assert check(model) != edited
        assert check(model.merge_and_unload()) == edited


def test_in_bfloat16_a_batch_of_one_equals_generate(build, tokenizer, monkeypatch):
    model = build().to(torch.bfloat16)
    expected = [alone(model, tokenizer, prompt, limit) for prompt, limit in zip(PROMPTS, LIMITS)]
    with no_fallback(monkeypatch):
        assert generate_greedy(model, tokenizer, PROMPTS, LIMITS, batch_size=1) == expected


def test_more_prompts_than_a_chunk_and_the_progress_bar(build, tokenizer, monkeypatch, capsys):
    model = build()
    monkeypatch.setattr(generation, "_CHUNK_BATCHES", 2)
    sizes = []
    own = generation.encode_prompts
    monkeypatch.setattr(
        generation, "encode_prompts", lambda tokenizer, texts: sizes.append(len(texts)) or own(tokenizer, texts)
    )
    expected = [alone(model, tokenizer, prompt, limit) for prompt, limit in zip(PROMPTS, LIMITS)]
    answers = generate_greedy(
        model, tokenizer, PROMPTS * 3, LIMITS * 3, batch_size=3, description="Asking", drafts=[None, [3], [4]] * 8
    )
    assert answers == expected * 3
    assert max(sizes) == 6
    assert "Asking: 100%" in capsys.readouterr().err


def test_what_has_to_be_read_of_a_draft():
    assert read_guess(None, 5, {0}) == []
    assert read_guess((1, 2, 3), 5, {0}) == [1, 2, 3]
    assert read_guess([1, 2, 3], 3, {0}) == [1, 2]
    assert read_guess([1, 2, 0], 9, {0}) == [1, 2]
    assert read_guess([1, 0, 2], 9, {0}) == [1]
    assert read_guess([0], 9, {0}) == []


def test_limits_and_drafts_have_to_be_as_many_as_prompts(build, tokenizer):
    with pytest.raises(ValueError, match="got 1 `drafts` for 2 prompts: give one for each"):
        generate_greedy(build(), tokenizer, PROMPTS[:2], [1, 2], drafts=[None])
    with pytest.raises(ValueError, match="got 1 `max_new_tokens` for 2 prompts: give one for each"):
        generate_greedy(build(), tokenizer, PROMPTS[:2], [1])
    with pytest.raises(ValueError, match="got 2 `drafts` for 0 questions: give one for each"):
        ask(build(), tokenizer, [], drafts=[None, None])
    assert generate_greedy(build(), tokenizer, [], []) == [] == ask(build(), tokenizer, [])


EDITS = EditSet(
    [
        Edit(
            "The capital of Peru is", "Lima", rephrases=["What is the capital of Peru?"], locality=["People in Peru"]
        ),
        Edit(
            "The capital of Cuba is",
            "Havana",
            locality=["People in Peru", {"prompt": "The capital of Peru is", "answer": "Lima"}],
            portability=[{"prompt": "What is the capital of Peru?", "answer": "Lima"}],
        ),
    ]
)


def test_the_drafts_of_questions(build, tokenizer):
    questions = questions_of(EDITS)
    unedited = ask(build(), tokenizer, questions)
    drafts = drafts_of(tokenizer, questions, unedited)
    eos = tokenizer.eos_token_id
    for question, draft, old in zip(questions, drafts, unedited):
        if question.metric == "locality":
            assert draft == old.tokens
        else:
            assert draft == [*tokenizer(f" {question.answer}")["input_ids"], eos]


def test_questions_that_come_twice_are_asked_once_with_their_draft(build, tokenizer):
    model = build()
    questions = questions_of(EDITS)
    expected = ask(model, tokenizer, questions)
    for question, answer in zip(questions, expected):
        assert list(answer.tokens) == alone(model, tokenizer, question.prompt, len(answer.tokens))
    with forwards(model) as shapes:
        drafts = [None] * 2 + [answer.tokens for answer in expected[2:]]
        assert ask(model, tokenizer, questions, drafts=drafts) == expected
    # "People in Peru" comes twice; the target as a locality question is another question than as an edit, because it is
    # asked for less; and rephrase and portability question are one, with the draft of the later one.
    assert shapes[0][0] == len(questions) - 2
    assert {rows for rows, _ in shapes[1:]} == {1}


def test_evaluation_with_drafts_finds_what_asking_without_them_finds(build, tokenizer):
    model = get_peft_model(build(), LocFTConfig(layers=[1], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    results = evaluate_edits(model, tokenizer, EDITS, show_progress=False)
    after = ask(model, tokenizer, questions_of(EDITS))
    assert [row["after"] for row in results.rows] == [answer.text for answer in after]
    with model.disable_adapter():
        assert results.before_answers == ask(model, tokenizer, questions_of(EDITS))
    assert results.before_answers != after


def test_what_is_kept_of_locality_is_read_in_one_pass(build, tokenizer):
    # The adapter changes nothing, so that the stored answers are right.
    model = get_peft_model(build(), LocFTConfig(layers=[1], task_type="CAUSAL_LM"))
    edits = EditSet([Edit("The capital of Peru is", "Lima", locality=["People in Peru", "Kenya", "Oslo"])])
    questions = [question for question in questions_of(edits) if question.metric == "locality"]
    before = ask(model, tokenizer, questions_of(edits))
    with forwards(model) as shapes:
        results = evaluate_edits(model, tokenizer, edits, before=before, show_progress=False)
    assert shapes[0][0] == 1 + len(questions)
    assert {rows for rows, _ in shapes[1:]} == {1}  # the edit itself, which is not learned
    assert results.after["locality"] == 1


def test_the_real_model_equals_generate(smollm, monkeypatch):
    model, tokenizer = smollm
    countries = ["France", "Peru", "Japan", "Kenya", "Norway", "Egypt", "Canada", "India", "Spain", "Cuba"]
    prompts = [f"The capital of {country} is" for country in countries]
    prompts += [f"Question: which language do most people speak in {country}? Answer:" for country in countries]
    limits = [4 + i % 7 for i in range(20)]
    expected = [alone(model, tokenizer, prompt, limit) for prompt, limit in zip(prompts, limits)]
    rng = random.Random(0)
    drafts = [tokens[: rng.randint(0, len(tokens))] + [rng.randrange(40000)] for tokens in expected]
    with no_fallback(monkeypatch):
        assert generate_greedy(model, tokenizer, prompts, limits) == expected
        assert generate_greedy(model, tokenizer, prompts, limits, batch_size=7, drafts=drafts) == expected
        assert generate_greedy(model, tokenizer, prompts, limits, batch_size=8, drafts=expected) == expected
