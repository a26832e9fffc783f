"""Text and questions to preserve a model on, said by the model itself, so that nothing has to be downloaded.

That a model can be made to say what it was trained on, from its first tokens alone, is known from data-free distillation
(LLM-QAT, arXiv 2305.17888, section 3.1) and from Magpie (arXiv 2406.08464), which has a chat model say its users' part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..edits.tokens import encode_prompts
from ..evaluation.generation import eos_token_ids, plain_generation


# What English questions begin with. The model says the rest.
_OPENINGS = (
    *("What", "What is the", "What was the", "Which", "Which of the", "In which", "Who", "Who is the", "Who was the"),
    *("Where", "Where was", "Where is the", "When", "When did", "When was the", "How", "How many", "How long"),
    *("Why", "Is", "Was", "Does", "Did", "The name of the", "In what year", "What kind of", "What does", "Can you"),
)
# What English sentences begin with.
_BEGINNINGS = (
    *("The", "In", "A", "It is", "When", "He", "She", "They", "This", "On the", "After", "There", "For", "As", "At"),
    *("We", "One of", "Many", "During", "By", "I", "You can", "If", "To", "With", "From", "An", "His", "Her", "Some"),
)
# What makes it likely that a question comes next, on any subject.
_QUIZ = """A quiz, with one question to a line:
Which river flows through Vienna?
Who painted the Mona Lisa?
What is the smallest prime number?
"""
_QUESTION_TOKENS = 32
_BATCH = 64


def sample_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0
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

    Returns:
        `list[str]`: The questions, at most `count`: what has no question mark and what came before is left out.
    """
    openings = [_OPENINGS[number % len(_OPENINGS)] for number in range(count)]
    said = _sample(model, tokenizer, [_QUIZ + opening for opening in openings], _QUESTION_TOKENS, seed)
    lines = [f"{opening}{text}".lstrip().split("\n")[0] for opening, text in zip(openings, said)]
    asked = [line[: line.index("?") + 1] for line in lines if "?" in line]
    return list(dict.fromkeys(" ".join(question.split()) for question in asked))


def sample_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int = 0
) -> list[str]:
    """Let a model talk, from the first words of an English sentence on.

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

    Returns:
        `list[str]`: The texts.
    """
    beginnings = [_BEGINNINGS[number % len(_BEGINNINGS)] for number in range(count)]
    return [
        f"{beginning}{text}"
        for beginning, text in zip(beginnings, _sample(model, tokenizer, beginnings, length, seed))
    ]


@torch.no_grad()
def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, openings: Sequence[str], length: int, seed: int
) -> list[str]:
    """Return what the model says behind each opening."""
    ends = sorted(eos_token_ids(model, tokenizer))
    settings = GenerationConfig(
        do_sample=True,
        top_k=50,  # by mass, a large vocabulary would have to be sorted for each token
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
    with plain_generation(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for numbers in by_length.values():
            for begin in range(0, len(numbers), _BATCH):
                chosen = numbers[begin : begin + _BATCH]
                ids = torch.tensor([encoded[number] for number in chosen], device=model.device)
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
                for number, tokens in zip(chosen, out[:, ids.shape[1] :].tolist()):
                    said[number] = tokenizer.decode(tokens, skip_special_tokens=True)
    return said
