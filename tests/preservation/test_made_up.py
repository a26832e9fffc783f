"""What a model makes up itself, with tokenizers of every kind."""

import copy

import pytest
import torch
from tokenizers import decoders

from peft_locft.preservation.samples import sample_questions, sample_texts


@pytest.mark.parametrize("sample", [sample_questions, lambda *args: sample_texts(*args, length=8)])
def test_the_words_said_keep_their_space_where_a_decoder_strips_the_first(make_model, tokenizer, monkeypatch, sample):
    # As Llama-2's does, and others of SentencePiece.
    stripping = copy.deepcopy(tokenizer)
    stripping.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    said = tokenizer(" the capital of Peru?", add_special_tokens=False)["input_ids"]
    assert stripping.decode(said) == "the capital of Peru?"
    model = make_model()
    monkeypatch.setattr(
        model,
        "generate",
        lambda input_ids, **settings: torch.cat([input_ids, torch.tensor([said] * len(input_ids))], dim=1),
    )
    texts = sample(model, stripping, 4)
    assert texts and all(text.endswith(" the capital of Peru?") for text in texts)
    assert texts == sample(model, tokenizer, 4)
