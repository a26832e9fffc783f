"""Text and questions to preserve a model on, said by the model itself, so that nothing has to be downloaded.

That a model can be made to say what it was trained on, from its first tokens alone, is known from data-free distillation
(LLM-QAT, arXiv 2305.17888, section 3.1) and from Magpie (arXiv 2406.08464), which has a chat model say its users' part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..edits.tokens import encode_prompts


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
    texts = _sample(model, tokenizer, [_QUIZ + opening for opening in openings], _QUESTION_TOKENS, seed)
    texts = [text[len(_QUIZ) :].strip() for text in texts]
    asked = [text[: text.index("?") + 1] for text in texts if "?" in text.split("\n")[0]]
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
    return _sample(model, tokenizer, beginnings, length, seed)


@torch.no_grad()
def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, openings: Sequence[str], length: int, seed: int
) -> list[str]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    end = [base.generation_config.eos_token_id, tokenizer.eos_token_id]
    ends = sorted({token for one in end for token in (one if isinstance(one, list) else [one]) if token is not None})
    # The model's own settings are for chatting: they may forbid repetition, or hardly leave a choice.
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
    texts = [""] * len(openings)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for numbers in by_length.values():
                for begin in range(0, len(numbers), _BATCH):
                    chosen = numbers[begin : begin + _BATCH]
                    ids = torch.tensor([encoded[number] for number in chosen], device=model.device)
                    out = model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
                    )
                    for number, said in zip(chosen, out.tolist()):
                        texts[number] = tokenizer.decode(said, skip_special_tokens=True)
    finally:
        model.train(was_training)
    return texts
