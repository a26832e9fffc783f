"""A prompt and its subject, as tokens."""

import pytest
from plain_tracing import SUBJECT


@pytest.fixture(scope="session")
def fact(tokenizer):
    """The tokens of the prompt, and where its subject begins and ends among them: by the text in front of that."""
    begin = len(tokenizer("What is the capital of")["input_ids"])
    end = len(tokenizer(f"What is the capital of {SUBJECT}")["input_ids"])
    return tokenizer(f"What is the capital of {SUBJECT}? It is called")["input_ids"], begin, end
