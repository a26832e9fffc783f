"""States of one forward pass: those that each place would compute for itself, and nothing else changes."""

import pytest
import torch
from peft import get_peft_model

from peft_locft import EditConfig, EditTrainer, LocFTConfig
from peft_locft.trainer.data import tokenize_edits
from peft_locft.trainer.prefix_cache import build_prefix_cache, shared_prefix_states
from peft_locft.trainer.state_store import FOLDER_NAME, StateStore


@pytest.fixture
def dataset(edits, tokenizer):
    return tokenize_edits(edits, tokenizer, None)


@pytest.fixture
def args(tmp_path):
    def args(**settings):
        return EditConfig(output_dir=str(tmp_path / "run"), disable_tqdm=True, report_to="none", **settings)

    return args


def adapted(model, layer):
    return get_peft_model(model, LocFTConfig(layers=[layer], target_modules=["layer"])).eval()


def states_of(cache, edit):
    length = int(cache.starts[edit + 1] - cache.starts[edit])
    return cache.states_at(torch.full((1, length), edit), torch.arange(length)[None])


def count_passes(model):
    passes = []
    model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("memory", [4, 0], ids=["in memory", "in a file"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "gpt_neox", "opt"])
def test_they_are_those_of_a_cache_of_its_own(architecture, memory, make_model, dataset, args, tmp_path):
    model, args = make_model(architecture), args(prefix_cache_memory=memory)
    passes, found = count_passes(model), {}
    with shared_prefix_states([0, 1, 2]):
        for layer in (2, 1, 0):
            place = adapted(model, layer)
            cache = build_prefix_cache(place, dataset, args, 0)
            if layer:
                assert len(cache.prefix.below) == layer and len(passes) == 1
                found[layer] = [states_of(cache, edit) for edit in range(len(dataset))]
                cache.store.delete()  # as the trainer does; the next place still has its states
            else:
                assert cache is None
            place.unload()
        assert (tmp_path / "run" / FOLDER_NAME).exists() == (memory == 0)
    assert not (tmp_path / "run" / FOLDER_NAME).exists()
    for layer, shared in found.items():
        place = adapted(model, layer)
        own = build_prefix_cache(place, dataset, args, 0)
        for edit, states in enumerate(shared):
            torch.testing.assert_close(states, states_of(own, edit), rtol=1e-5, atol=1e-5)
        own.store.delete()
        place.unload()
    assert len(passes) == 3


def test_they_are_those_of_the_unedited_model(make_model, dataset, args):
    place = adapted(make_model(), 1)
    with torch.no_grad():
        for parameter in place.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    with shared_prefix_states([1, 2]):
        build_prefix_cache(place, dataset, args(), 0)
        model = place.unload()
        shared = build_prefix_cache(adapted(model, 2), dataset, args(), 0)
    own = build_prefix_cache(adapted(make_model(), 2), dataset, args(), 0)
    torch.testing.assert_close(states_of(shared, 3), states_of(own, 3), rtol=1e-5, atol=1e-5)


def test_other_edits_another_dtype_or_another_model_have_their_own(make_model, dataset, args):
    place, tokens = adapted(make_model(), 1), sum(map(len, dataset["input_ids"]))
    with shared_prefix_states([1, 2]):
        assert build_prefix_cache(place, dataset, args(), 0).store.shape[0] == 2 * tokens
        assert build_prefix_cache(place, dataset.select(range(4)), args(), 0).store.shape[0] < tokens
        assert build_prefix_cache(place, dataset, args(), 0, torch.bfloat16).store.shape[0] == tokens
        assert build_prefix_cache(adapted(make_model(), 1), dataset, args(), 0).store.shape[0] == tokens
    assert build_prefix_cache(place, dataset, args(), 0).store.shape[0] == tokens


def test_a_file_of_other_layers_is_not_taken_for_theirs(make_model, dataset, args, tmp_path, monkeypatch):
    model, args = make_model(num_hidden_layers=4), args(prefix_cache_memory=0)
    monkeypatch.setattr(StateStore, "delete", lambda store: None)
    with shared_prefix_states([1, 3]):  # as if the process were killed in here
        place = adapted(model, 3)
        build_prefix_cache(place, dataset, args, 0)
        place.unload()
    monkeypatch.undo()
    assert (tmp_path / "run" / FOLDER_NAME).exists()
    with shared_prefix_states([2, 3]):
        place = adapted(model, 3)
        build_prefix_cache(place, dataset, args, 0)
        place.unload()
        place = adapted(model, 2)
        states = states_of(build_prefix_cache(place, dataset, args, 0), 0)
    own = build_prefix_cache(place, dataset, EditConfig(output_dir=str(tmp_path / "own")), 0)
    torch.testing.assert_close(states, states_of(own, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*further forms of edits")  # the tiny model takes few tokens
@pytest.mark.parametrize("settings", [{}, {"contexts": 2}], ids=["bare", "several forms"])
def test_training_is_the_same(settings, edits, tokenizer, make_model, args):
    args = args(save_strategy="no", num_train_epochs=3, learning_rate=5e-3, **settings)

    def train(model, layer):
        config = LocFTConfig(layers=[layer], target_modules=["layer"])
        trainer = EditTrainer(model, args, edits, processing_class=tokenizer, peft_config=config)
        trainer.train()
        losses = [entry["epoch_loss"] for entry in trainer.state.log_history if "epoch_loss" in entry]
        trainer.model.unload()
        return losses

    model = make_model()
    with shared_prefix_states([1, 2]):
        shared = [train(model, layer) for layer in (2, 1)]
    own = [train(make_model(), layer) for layer in (2, 1)]
    for mine, theirs in zip(shared, own):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_where_there_is_no_cache_there_are_no_shared_states(make_model, dataset, args):
    model = make_model()
    passes = count_passes(model)
    with shared_prefix_states([1]), pytest.warns(UserWarning, match="NEFTune"):
        assert build_prefix_cache(adapted(model, 1), dataset, args(neftune_noise_alpha=5.0), 0) is None
    assert not passes


def test_a_model_that_cannot_be_cut_says_so(make_model, dataset, args):
    model = make_model()
    place = adapted(model, 1)
    model.config.num_hidden_layers = 1  # so that a forward pass does not reach the layer
    with shared_prefix_states([1, 2]):
        with pytest.warns(UserWarning, match="this model's layers cannot be cut .* did not reach LlamaDecoderLayer"):
            assert build_prefix_cache(place, dataset, args(), 0) is None
    assert model(torch.tensor([[5, 3]])).logits.shape[1] == 2  # nothing of the attempt is left
