"""What would not be decoded exactly is left to `generate`."""

import pytest
import torch
from decoding_cases import LIMITS, PROMPTS, alone, drafts_by_kind, no_fallback
from transformers import (
    GPT2LMHeadModel,
)

from peft_locft.evaluation import decoding, generate_greedy, generation
from peft_locft.evaluation.decoding import decodes_exactly, longest_sequence


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
