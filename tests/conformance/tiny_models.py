"""Tiny decoders with a tokenizer, in folders, in the place of those that PEFT's tests take from the Hub."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)


_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4}
# PEFT's tests read the architecture off the name, so the names are those of the Hub.
CONFIGS = {
    "tiny-random-OPTForCausalLM": OPTConfig(
        hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16, vocab_size=256
    ),
    "tiny-random-GPT2LMHeadModel": GPT2Config(**_GPT, vocab_size=256),
    "tiny-random-GPTJForCausalLM": GPTJConfig(**_GPT, rotary_dim=4, vocab_size=256),
    "tiny-random-LlamaForCausalLM": LlamaConfig(**_SIZES, vocab_size=256),
    "tiny-dummy-qwen2": Qwen2Config(**_SIZES, vocab_size=256),
    "tiny-random-Gemma3ForCausalLM": Gemma3TextConfig(**_SIZES, vocab_size=256),
    "tiny-random-MistralForCausalLM": MistralConfig(**_SIZES, vocab_size=256),
}


def build(folder: Path) -> dict[str, str]:
    """Make the models, once.

    Args:
        folder (`Path`):
            Where to.

    Returns:
        `dict[str, str]`: The folder of each by its name.
    """
    for name, config in CONFIGS.items():
        if not (folder / name / "config.json").is_file():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
            vocabulary = {character: index for index, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
            core = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
            core.pre_tokenizer = pre_tokenizers.ByteLevel()
            PreTrainedTokenizerFast(tokenizer_object=core, eos_token="a", pad_token="b").save_pretrained(folder / name)
    return {name: str(folder / name) for name in CONFIGS}
