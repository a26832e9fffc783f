"""Text and questions to preserve a model on, said by the model itself, so that nothing has to be downloaded.

That a model can be made to say what it was trained on, from a random first token on, is known from data-free distillation
(LLM-QAT, arXiv 2305.17888, section 3.1), and from Magpie (arXiv 2406.08464), which has a chat model say its users' part.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..edits.tokens import encode_prompts
from ..evaluation.generation import eos_token_ids, plain_generation


# What English questions begin with. The model says the rest.
_OPENINGS = (
    *("What", "What is the", "What was the", "Which", "Which of the", "In which", "Who", "Who is the", "Who was the"),
    *("Where", "Where was", "Where is the", "When", "When did", "When was the", "How", "How many", "How long"),
    *("Why", "Is", "Was", "Does", "Did", "The name of the", "In what year", "What kind of", "What does", "Can you"),
)
# What texts begin with, around a random word of the vocabulary. From the same few beginnings, a chat model says much the
# same, and perplexity on other text rises more (docs/log.md).
_BEGINNINGS = ("{0}", "The {1}", "{0} is", "{0} was", "In {1}", "{0} and")
_WORD, _NAME = re.compile("[A-Za-z][a-z]{2,}"), re.compile("[A-Z][a-z]{2,}")
# What makes it likely that a question comes next, on any subject.
_QUIZ = """A quiz, with one question to a line:
Which river flows through Vienna?
Who painted the Mona Lisa?
What is the smallest prime number?
"""
# What statements begin with, some of them with a word of the vocabulary that is written as a name.
_SUBJECTS = (
    *("{0}", "The {0}", "{0} is", "{0} was", "The", "In"),
    *("{0},", "The first", "{0} has", "{0}'s", "The name of {0}"),
)
_FACTS = """Facts, with one to a line:
The Danube flows through Vienna.
The Mona Lisa was painted by Leonardo da Vinci.
The language of Brazil is Portuguese.
"""
_SENTENCE = re.compile(r"(.*?\w\w)[.!](?:\s|$)")
# How many words of a statement are left to be said, at most; and how many it begins with, at least.
_LEFT, _BEGUN = 3, 3
_LINE_TOKENS = 32
# A question or statement is to be one that makes sense; a text, as varied as what people write, which is not made of the
# most probable tokens only.
_LINE_TOP_K, _TEXT_TOP_K = 50, 0
_BATCH = 64


def sample_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0, show_progress: bool = False
) -> list[str]:
    """Let a model go on with a quiz: each question begins with an English question word, and ends at its question mark.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, as it stands.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        count (`int`):
            How many to ask for.
        seed (`int`, *optional*, defaults to `0`):
            The seed of the sampling.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `list[str]`: The questions, at most `count`: what has no question mark and what came before is left out.
    """
    openings = [_OPENINGS[number % len(_OPENINGS)] for number in range(count)]
    lines = _lines(model, tokenizer, _QUIZ, openings, seed, "questions" if show_progress else None)
    asked = [line[: line.index("?") + 1] for line in lines if "?" in line]
    return list(dict.fromkeys(" ".join(question.split()) for question in asked))


def sample_statements(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0, show_progress: bool = False
) -> list[str]:
    """Let a model go on with a list of facts, and leave the last one to three words of each sentence to be said: "Rocks are
    made of".

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, as it stands.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        count (`int`):
            How many to ask for.
        seed (`int`, *optional*, defaults to `0`):
            The seed of the sampling.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `list[str]`: The beginnings of sentences, at most `count`: what is no sentence, or too short, and what came before is
        left out.
    """
    names = _random_words(tokenizer, count, seed, _NAME)
    openings = [_SUBJECTS[number % len(_SUBJECTS)].format(name) for number, name in enumerate(names)]
    choice = random.Random(seed)
    begun = []
    for line in _lines(model, tokenizer, _FACTS, openings, seed, "statements" if show_progress else None):
        sentence = _SENTENCE.match(line)
        words = sentence[1].split() if sentence else []
        if len(words) > _BEGUN:
            begun.append(" ".join(words[: -choice.randint(1, min(_LEFT, len(words) - _BEGUN))]))
    return list(dict.fromkeys(begun))


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    seed: int = 0,
    show_progress: bool = False,
) -> list[str]:
    """Let a model talk, from random words of its vocabulary on.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, as it stands.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        count (`int`):
            How many texts.
        length (`int`):
            Their length, in tokens. The model may end one earlier.
        seed (`int`, *optional*, defaults to `0`):
            The seed of the sampling.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `list[str]`: The texts.
    """
    words = _random_words(tokenizer, count, seed)
    beginnings = [
        _BEGINNINGS[number % len(_BEGINNINGS)].format(word[0].upper() + word[1:], word)
        for number, word in enumerate(words)
    ]
    said = _sample(model, tokenizer, beginnings, length, _TEXT_TOP_K, seed, "texts" if show_progress else None)
    return [f"{beginning}{text}" for beginning, text in zip(beginnings, said)]


def _random_words(tokenizer: PreTrainedTokenizerBase, count: int, seed: int, kind: re.Pattern = _WORD) -> list[str]:
    """Return words, each of which is one token that begins with a space; the same ones again if there are few."""
    numbers = list(range(len(tokenizer)))
    random.Random(seed).shuffle(numbers)
    words: list[str] = []
    for number in numbers:
        token = tokenizer.convert_ids_to_tokens(number) or ""
        # As byte-level tokenizers write a space, and as SentencePiece does.
        if token.startswith(("Ġ", "▁")) and kind.fullmatch(word := tokenizer.decode([number]).strip()):
            words.append(word)
        if len(words) == count:
            break
    words = words or ["World"]
    return [words[number % len(words)] for number in range(count)]


def _lines(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    listed: str,
    openings: Sequence[str],
    seed: int,
    kind: str | None,
) -> list[str]:
    """Return how a model goes on with a list, in one line from each opening on."""
    prompts = [listed + opening for opening in openings]
    said = _sample(model, tokenizer, prompts, _LINE_TOKENS, _LINE_TOP_K, seed, kind)
    return [f"{opening}{text}".split("\n")[0] for opening, text in zip(openings, said)]


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    openings: Sequence[str],
    length: int,
    top_k: int,
    seed: int,
    kind: str | None,
) -> list[str]:
    """Return what the model says behind each opening. A progress bar tells of what `kind` that is."""
    ends = sorted(eos_token_ids(model, tokenizer))
    settings = GenerationConfig(
        do_sample=True,
        top_k=top_k,  # 0: all tokens
        max_new_tokens=length,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    encoded = encode_prompts(tokenizer, openings)
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(number)  # one length to a batch, so that there is no padding
    said = [""] * len(openings)
    devices = [model.device] if model.device.type == "cuda" else []
    # The model's own settings are for chatting: they may forbid repetition, or hardly leave a choice.
    progress = tqdm(total=len(openings), desc=f"Making up {kind}", disable=kind is None)
    with plain_generation(model), torch.random.fork_rng(devices=devices), progress:
        torch.manual_seed(seed)
        for numbers in by_length.values():
            for begin in range(0, len(numbers), _BATCH):
                chosen = numbers[begin : begin + _BATCH]
                ids = torch.tensor([encoded[number] for number in chosen], device=model.device)
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
                for number, tokens in zip(chosen, out.tolist()):
                    # Not the new tokens alone: Llama-2's tokenizer, and others of SentencePiece, leave out a leading space.
                    begun = tokenizer.decode(encoded[number], skip_special_tokens=True)
                    said[number] = tokenizer.decode(tokens, skip_special_tokens=True)[len(begun) :]
                progress.update(len(chosen))
    return said
