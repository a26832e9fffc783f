"""Prompts, models and drafts on which decoding is tried."""

from contextlib import contextmanager

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    MambaConfig,
    MixtralConfig,
)

from peft_locft.evaluation import generation


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
