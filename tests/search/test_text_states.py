"""Texts that are read from the edited layer on: the same perplexity as of the whole model, with less to compute."""

from functools import partial

import pytest
import torch
from peft import get_peft_model

from peft_locft import LocFTConfig
from peft_locft.evaluation.capability import perplexity
from peft_locft.search.text_states import TextStates


TEXTS = ["The capital of Peru is Lima.", "The people of Chile speak Spanish and not much else.", "Lima " * 90]
MEMORY = 2**20


def edited(model, layer, size=0.1):
    """An adapter of one layer that says something else."""
    model = get_peft_model(model, LocFTConfig(layers=[layer], target_modules=["layer"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(0)), alpha=size)
    return model


def count_passes(module):
    passes = []
    handle = module.register_forward_hook(lambda *_: passes.append(1))
    return passes, handle


@pytest.fixture
def read(tokenizer):
    def read(states, model):
        return states.read(model, partial(perplexity, model, tokenizer, TEXTS, batch_size=2))

    return read


def whole(model, tokenizer):
    return perplexity(model, tokenizer, TEXTS, batch_size=2)


def lowest_mlp_passes(model, measure):
    passes, handle = count_passes(next(module for name, module in model.named_modules() if name.endswith("0.mlp")))
    measured = measure()
    handle.remove()
    return measured, len(passes)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3", "gpt2", "gpt_neox", "phi3"])
def test_edited_models_have_their_own_perplexity(architecture, make_model, tokenizer, read):
    model, states = make_model(architecture), TextStates([0, 1, 2], MEMORY)
    before, batches = lowest_mlp_passes(model, partial(whole, model, tokenizer))
    for number, layer in enumerate((2, 1, 0, 2)):
        place = edited(model, layer, size=0.1 * (number + 1))
        found, passes = lowest_mlp_passes(place, partial(read, states, place))
        assert found == pytest.approx(whole(place, tokenizer), rel=1e-6)
        assert found != pytest.approx(before, rel=1e-3)
        # All texts are read once to keep the states; after that, the lowest layer only has work where it is edited.
        assert passes == (batches if number == 0 or layer == 0 else 0)
        model = place.unload()
    assert whole(model, tokenizer) == before


def test_states_that_need_more_memory_are_not_kept(make_model, tokenizer, read):
    states, place = TextStates([1, 2], 1000), edited(make_model(), 2)
    for _ in range(2):
        assert read(states, place) == pytest.approx(whole(place, tokenizer), rel=1e-6)
    _, passes = lowest_mlp_passes(place, partial(read, states, place))
    assert passes > 0


def test_a_layer_that_was_not_kept_is_read_whole(make_model, tokenizer, read):
    model, states = make_model(), TextStates([2], MEMORY)
    for layer in (2, 1):
        place = edited(model, layer)
        assert read(states, place) == pytest.approx(whole(place, tokenizer), rel=1e-6)
        model = place.unload()


def test_layers_that_say_more_to_each_other_are_read_whole(make_model, tokenizer, read, monkeypatch):
    model, states = make_model(), TextStates([1, 2], MEMORY)
    first, last = model.model.layers[0], model.model.layers[2]
    first_forward, last_forward, said = first.forward, last.forward, []

    def tell(*args, **kwargs):
        said.append(first_forward(*args, **kwargs))
        return said[-1]

    # The last layer adds what the first one said, which a model that is cut does not compute.
    monkeypatch.setattr(first, "forward", tell)
    monkeypatch.setattr(last, "forward", lambda *args, **kwargs: last_forward(*args, **kwargs) + said.pop())
    place = edited(model, 2)
    assert read(states, place) == pytest.approx(whole(place, tokenizer), rel=1e-6)


def test_layers_that_change_what_enters_them_in_place(make_model, tokenizer, read, monkeypatch):
    model, states = make_model(), TextStates([1, 2], MEMORY)
    for layer in model.model.layers:
        own = layer.forward
        monkeypatch.setattr(
            layer, "forward", lambda hidden, *args, own=own, **kwargs: own(hidden.mul_(0.5), *args, **kwargs)
        )
    for layer in (2, 1, 2, 1):
        place = edited(model, layer)
        for _ in range(2):
            found, passes = lowest_mlp_passes(place, partial(read, states, place))
            assert found == pytest.approx(whole(place, tokenizer), rel=1e-6)
        assert passes == 0  # they are kept all the same
        model = place.unload()
