"""Decoding against the model's own `generate`, called for one prompt at a time without padding."""

import random
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GPT2LMHeadModel,
    MambaConfig,
    MixtralConfig,
)

from peft_locft import Edit, EditSet, LocFTConfig
from peft_locft.evaluation import ask, decoding, evaluate_edits, generate_greedy, generation, questions_of
from peft_locft.evaluation.decoding import decodes_exactly, longest_sequence, read_guess
from peft_locft.evaluation.questions import drafts_of


PROMPTS = [
    "The capital of Peru is",
    "What is the capital of Kazakhstan?",
    "Oslo",
    "The capital of Nepal is Kathmandu. What",
    "Kenya",
    "Cuba Chile Lima",
    "is is is",
    "What is the capital of Norway? Oslo. What is",
]
LIMITS = [5, 9, 1, 7, 12, 2, 8, 3]
_SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
FURTHER = {
    "mixtral": (
        MixtralConfig,
        {**_SIZES, "intermediate_size": 128, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
    "falcon": (FalconConfig, {**_SIZES, "alibi": False}),
    "falcon_alibi": (FalconConfig, {**_SIZES, "alibi": True, "multi_query": False}),
    "bloom": (BloomConfig, {"hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "mamba": (MambaConfig, {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 8}),
}
OWN = ["llama", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_neox", "opt", "phi3", "mistral"]
# All but Mamba, whose state is of no single token.
DECODED = [*OWN, "mixtral", "falcon", "falcon_alibi", "bloom", "gemma3_multimodal"]


@pytest.fixture(scope="module")
def build(make_model, tokenizer):
    """Build a tiny model, of more architectures than the other tests need."""

    def make(architecture="llama", **changes):
        if architecture in OWN:
            changes = {"sliding_window": 64, **changes} if architecture == "gemma3" else changes
            return make_model(architecture, **changes)
        torch.manual_seed(0)
        ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": None}
        if architecture == "gemma3_multimodal":
            text = make_model("gemma3", sliding_window=64).config.to_dict()
            vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            config = Gemma3Config(
                text_config=text,
                vision_config={**vision, "image_size": 28, "patch_size": 14},
                mm_tokens_per_image=4,
                image_token_index=len(tokenizer) - 1,
                initializer_range=0.2,
            )
            return Gemma3ForConditionalGeneration(config).eval()
        config_class, sizes = FURTHER[architecture]
        config = config_class(vocab_size=len(tokenizer), initializer_range=0.2, **{**sizes, **ids, **changes})
        return AutoModelForCausalLM.from_config(config).eval()

    return make


@torch.no_grad()
def alone(model, tokenizer, prompt, limit, stops=None):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, base.generation_config = base.generation_config, GenerationConfig()
    settings = GenerationConfig(
        max_new_tokens=limit, do_sample=False, pad_token_id=0, eos_token_id=stops or [tokenizer.eos_token_id]
    )
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    base.generation_config = own
    return output[0, ids.shape[1] :].tolist()


@contextmanager
def forwards(model):
    """Record the shape of the tokens of each forward pass."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


@contextmanager
def no_fallback(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(generation, "_generate", lambda *_: pytest.fail("`generate` was used"))
        yield


def other(token, vocab):
    return (token + 1) % vocab


def drafts_by_kind(tokenizer, answers):
    """Every way in which a draft may be right or wrong."""
    vocab, eos = len(tokenizer), tokenizer.eos_token_id
    return {
        "none": [None] * len(answers),
        "empty": [[] for _ in answers],
        "right": answers,
        "right, with EOS behind it": [[*tokens, eos] for tokens in answers],
        "wrong at first": [[other(tokens[0], vocab), *tokens[1:]] for tokens in answers],
        "wrong in the middle": [
            [other(token, vocab) if i == len(tokens) // 2 else token for i, token in enumerate(tokens)]
            for tokens in answers
        ],
        "too short": [tokens[: len(tokens) // 2] for tokens in answers],
        "too long": [[*tokens, 7, 8, 9, 10, 11] for tokens in answers],
        "EOS in the middle": [[*tokens[:2], eos, *tokens[2:]] for tokens in answers],
        "EOS alone": [[eos] for _ in answers],
    }


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


def test_mamba_is_left_to_generate(build, tokenizer, monkeypatch):
    model = build("mamba")
    used = []
    monkeypatch.setattr(decoding, "start", lambda *_: pytest.fail("Mamba was decoded"))
    own = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: used.append(1) or own(**kwargs))
    monkeypatch.setattr(generation, "start", lambda *_: pytest.fail("Mamba was decoded"))
    answers = generate_greedy(model, tokenizer, PROMPTS, LIMITS, batch_size=1, drafts=[[1, 2]] * 8)
    assert len(used) == 8
    assert answers == [alone(model, tokenizer, prompt, limit) for prompt, limit in zip(PROMPTS, LIMITS)]


class CountsByCache(GPT2LMHeadModel):
    """A model that takes no positions and counts them by the size of its cache, padding included."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        kwargs.pop("position_ids", None)
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )


class ReadsBothWays(GPT2LMHeadModel):
    """A model in which a prompt is read in both directions."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        if (size := input_ids.shape[1]) > 1:
            attention_mask = torch.zeros(1, 1, size, size)
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )


class TakesNoLogitsToKeep(GPT2LMHeadModel):
    """A model that computes all logits."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, position_ids=None, **kwargs):
        assert "logits_to_keep" not in kwargs
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            **kwargs,
        )


@pytest.mark.parametrize(
    ("model_class", "exact"), [(CountsByCache, False), (ReadsBothWays, False), (TakesNoLogitsToKeep, True)]
)
def test_a_model_is_tried_before_it_is_decoded(build, tokenizer, model_class, exact, monkeypatch):
    model = model_class(build("gpt2").config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    text = tokenizer("The capital of Peru is Lima")["input_ids"]
    assert decodes_exactly(model, text) is exact
    expected = [alone(model, tokenizer, prompt, limit) for prompt, limit in zip(PROMPTS, LIMITS)]
    assert generate_greedy(model, tokenizer, PROMPTS, LIMITS, batch_size=1, drafts=expected) == expected
    if exact:
        with no_fallback(monkeypatch):
            for drafts in drafts_by_kind(tokenizer, expected).values():
                assert generate_greedy(model, tokenizer, PROMPTS, LIMITS, drafts=drafts, batch_size=3) == expected


def test_what_exceeds_the_sliding_window_is_left_to_generate(build, tokenizer, monkeypatch):
    model = build("gemma3", sliding_window=14)
    assert longest_sequence(model) == 14
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    fits = [length + limit <= 14 for length, limit in zip(lengths, LIMITS)]
    assert 0 < sum(fits) < 8
    expected = [alone(model, tokenizer, prompt, limit) for prompt, limit in zip(PROMPTS, LIMITS)]
    left = []
    own = generation._generate
    monkeypatch.setattr(
        generation,
        "_generate",
        lambda model, tokenizer, rows, stops: left.extend(rows) or own(model, tokenizer, rows, stops),
    )
    for batch_size in (1, 3):
        left.clear()
        assert generate_greedy(model, tokenizer, PROMPTS, LIMITS, batch_size=batch_size, drafts=expected) == expected
        assert len(left) == 8 - sum(fits)


def test_a_window_that_is_just_filled(build, tokenizer, monkeypatch):
    prompt = PROMPTS[0]
    length = len(tokenizer(prompt)["input_ids"])
    model = build("gemma3", sliding_window=length + 9)
    prompts = [prompt, "Oslo", "Cuba Chile Lima"]
    limits = [9, 9, 4]
    expected = [alone(model, tokenizer, p, n) for p, n in zip(prompts, limits)]
    with no_fallback(monkeypatch):
        for drafts in drafts_by_kind(tokenizer, expected).values():
            assert generate_greedy(model, tokenizer, prompts, limits, drafts=drafts) == expected


def test_the_longest_sequence(build):
    assert longest_sequence(build("llama")) == 64
    assert longest_sequence(build("bloom")) is None
    assert longest_sequence(build("mistral", sliding_window=20)) == 20
    assert longest_sequence(build("phi3", original_max_position_embeddings=32)) == 32


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
