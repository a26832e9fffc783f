"""Deltas that are trained behind projectors."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from projected import TEXTS, logits, randomise
from transformers import GPT2Config, GPT2LMHeadModel

from peft_locft import LocFTConfig
from peft_locft.preservation import InputStatistics, Projection, input_statistics, trained_deltas
from peft_locft.preservation.projector import soft_projector


@pytest.fixture
def statistics(peft_model, tokenizer):
    names = [delta.name for delta in trained_deltas(peft_model, "projector")]
    with peft_model.disable_adapter():
        return input_statistics(peft_model.get_base_model(), tokenizer, TEXTS, names)


def test_statistics_are_the_mean_of_the_inputs_outer_products(make_model, tokenizer):
    model, name = make_model(), "model.layers.1.mlp.down_proj"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for text in TEXTS:  # one by one, without padding
        logits(model, tokenizer, text)
    handle.remove()
    inputs = torch.cat(seen)
    found = input_statistics(model, tokenizer, TEXTS, [name])
    assert found.tokens == len(inputs)
    assert torch.allclose(found[name], inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-4)


def test_layers_behind_the_last_watched_one_are_not_run(make_model, tokenizer):
    model, ran = make_model(), []
    before = logits(model, tokenizer, TEXTS[0])
    layers = model.model.layers
    assert len(layers) > 2
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    input_statistics(model, tokenizer, TEXTS, names)
    assert set(ran) == {0, 1}
    assert torch.equal(logits(model, tokenizer, TEXTS[0]), before)  # which runs them all
    assert set(ran) == set(range(len(layers)))


def test_statistics_travel_through_a_file(statistics, tmp_path):
    statistics.save(tmp_path)
    again = InputStatistics.load(tmp_path)
    assert again.tokens == statistics.tokens and set(again) == set(statistics)
    assert all(torch.equal(again[name], statistics[name]) for name in again)


def test_the_projector_is_the_formula():
    x = torch.randn(50, 8, dtype=torch.float64) * torch.arange(1, 9)
    moment = x.T @ x / 50
    projector, inverse = soft_projector(moment.float(), 0.5)
    usual = x.square().mean(0).sort().values[3]  # the median of an even number is the lower one
    expected = torch.linalg.inv(moment / (0.5 * usual) + torch.eye(8))
    assert torch.allclose(projector.double(), expected / (x @ expected).square().sum(1).mean().sqrt(), atol=1e-5)
    assert torch.allclose(projector @ inverse, torch.eye(8), atol=1e-4)


def test_a_massive_activation_leaves_no_other_direction_unprotected():
    moment = torch.linspace(0.5, 2, 64).diag()
    massive = moment.clone()
    massive[5, 5] = 1e6  # the mean eigenvalue is 15,000 times as large
    (before, _), (behind, _) = soft_projector(moment, 0.1), soft_projector(massive, 0.1)
    assert behind[5, 5] < 1e-5
    others = [place for place in range(64) if place != 5]
    assert torch.allclose(behind[others][:, others], before[others][:, others], rtol=0.1)


def test_inputs_that_are_mostly_zero_have_a_projector_too():
    moment = torch.zeros(8, 8)
    moment[:3, :3] = torch.eye(3)
    projector, _ = soft_projector(moment, 0.1)
    assert (projector.diagonal()[3:] > 3 * projector.diagonal()[0]).all()


def test_a_change_of_one_size_disturbs_ordinary_text_equally_in_every_module(peft_model, statistics):
    uneven = {name: moment * 100**place for place, (name, moment) in enumerate(statistics.items())}
    deltas = trained_deltas(peft_model, "projector")
    Projection(deltas, InputStatistics(uneven, statistics.tokens), 0.1)
    disturbed = [(delta.projector @ uneven[delta.name] @ delta.projector).trace() for delta in deltas]
    assert torch.allclose(torch.stack(disturbed), disturbed[0], rtol=1e-2)


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_a_change_disturbs_ordinary_text_in_proportion_to_what_the_modules_say(make_model, tokenizer, scale):
    model = make_model()
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]
    for name in names:
        model.get_submodule(name).weight.data *= scale
    statistics = input_statistics(model, tokenizer, TEXTS, names)
    said = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, args, output: said.append(output.square()))
        for name in names
    ]
    for text in TEXTS:
        logits(model, tokenizer, text)
    for handle in handles:
        handle.remove()
    usual = torch.stack([torch.cat([part[0] for part in said[place::2]]).mean() for place in (0, 1)]).mean().sqrt()
    deltas = trained_deltas(
        get_peft_model(model, LocFTConfig(layers=[1, 2], target_modules=["mlp.down_proj"])), "projector"
    )
    Projection(deltas, statistics, 0.1)
    torch.manual_seed(3)
    for delta in deltas:
        change = torch.randn(4000, len(delta.projector)).sign() @ delta.projector  # rows of 4000 changes at random
        disturbed = (change @ statistics[delta.name] * change).sum(1).mean().sqrt()
        assert disturbed.item() == pytest.approx(3.3 * usual.item(), rel=0.05)


def test_a_massive_activation_does_not_make_the_projectors_larger(make_model):
    model = get_peft_model(make_model(), LocFTConfig(layers=[1], target_modules=["mlp.down_proj"]))
    (delta,) = trained_deltas(model, "projector")
    moment = torch.linspace(0.5, 2, delta.entrance().in_features).diag()
    massive = moment.clone()
    massive[5, 5] = 1e6

    def size(some):
        Projection([delta], InputStatistics({delta.name: some}, 1), 0.1)
        return delta.projector.norm().item()

    assert size(massive) == pytest.approx(size(moment), rel=0.25)
    model.get_base_model().get_submodule(delta.name).get_base_layer().weight.data.zero_()
    assert 0 < size(moment) < float("inf")


def test_starting_and_folding_change_nothing_that_was_there(peft_model, statistics, tokenizer):
    randomise(peft_model)
    before = logits(peft_model, tokenizer)
    projection = Projection(trained_deltas(peft_model, "projector"), statistics, 1.0)
    with projection.applied():
        assert torch.allclose(logits(peft_model, tokenizer), before, atol=1e-3)
    assert torch.allclose(logits(peft_model, tokenizer), before, atol=1e-3)


def test_what_is_saved_is_what_is_computed_and_training_goes_on_from_where_it_was(
    peft_model, statistics, tokenizer, tmp_path
):
    deltas = trained_deltas(peft_model, "projector")
    projection = Projection(deltas, statistics, 0.3)
    randomise(peft_model)
    trained = [delta.entrance().weight.clone() for delta in deltas]
    with projection.applied():
        during = logits(peft_model, tokenizer)
        with projection.folded(tmp_path):
            assert not torch.equal(deltas[0].entrance().weight, trained[0])
        assert all(torch.equal(delta.entrance().weight, weight) for delta, weight in zip(deltas, trained))
        randomise_again = [weight + 1 for weight in trained]
        for delta, weight in zip(deltas, randomise_again):
            delta.entrance().weight.data = weight
        projection.load(tmp_path)
        assert all(torch.equal(delta.entrance().weight, weight) for delta, weight in zip(deltas, trained))
    assert torch.allclose(logits(peft_model, tokenizer), during, atol=1e-4)


def test_ordinary_inputs_are_moved_less_than_others(peft_model, statistics):
    deltas = trained_deltas(peft_model, "projector")
    Projection(deltas, statistics, 0.1)
    for delta in deltas:
        moment = statistics[delta.name]
        values, vectors = torch.linalg.eigh(moment)
        usual, unusual = (delta.projector @ vectors[:, place] for place in (-1, 0))
        assert usual.norm() < 0.1 * unusual.norm()


def test_a_new_adapter_is_behind_its_projector_from_the_start(peft_model, statistics):
    # LoRA's A is random from the start: it may not keep the directions of ordinary text.
    deltas = trained_deltas(peft_model, "projector")
    Projection(deltas, statistics, 0.1)
    for delta in deltas:
        torch.manual_seed(2)
        delta.factor().weight.data = torch.randn_like(delta.factor().weight)
        values, vectors = torch.linalg.eigh(statistics[delta.name])
        change = delta.weight()
        assert (change @ vectors[:, -1]).norm() < 0.2 * (change @ vectors[:, 0]).norm()


@pytest.mark.parametrize("rows", [1, 200])
def test_few_rows_and_many_are_projected_alike(peft_model, statistics, rows):
    randomise(peft_model)
    deltas = trained_deltas(peft_model, "projector")
    projection = Projection(deltas, statistics, 0.5)
    entrance = deltas[0].entrance()
    x = torch.randn(rows, entrance.weight.shape[1])
    with projection.applied(), torch.autocast("cpu", torch.bfloat16):
        found = entrance(x)
    expected = x.double() @ (entrance.weight.double().T)  # folded
    assert torch.allclose(found.double(), expected, atol=1e-4 * float(expected.abs().max()) + 1e-4)


def test_a_checkpoint_of_other_projectors_is_refused(peft_model, statistics, tmp_path, monkeypatch):
    deltas = trained_deltas(peft_model, "projector")
    projection = Projection(deltas, statistics, 0.5)
    with pytest.raises(
        ValueError, match="was trained behind no projector: resume with the `projector`, `output_projector`"
    ):
        projection.check(tmp_path)
    with projection.folded(tmp_path):
        pass
    projection.check(tmp_path)
    with pytest.raises(ValueError, match="was trained behind other projectors"):
        Projection(deltas, statistics, 0.6).check(tmp_path)
    others = InputStatistics({name: moment * 2 + 1 for name, moment in statistics.items()}, 1)
    with pytest.raises(ValueError, match="was trained behind other projectors"):
        Projection(deltas, others, 0.5).check(tmp_path)
    monkeypatch.setattr("peft_locft.preservation.projector._DISTURBANCE", 1.0)  # of another release
    with pytest.raises(ValueError, match="was trained behind other projectors"):
        Projection(deltas, statistics, 0.5).check(tmp_path)


def test_missing_statistics_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="has no input_statistics.safetensors, expected that of a run with `projector`"
    ):
        InputStatistics.load(tmp_path)


def test_the_heads_inputs_can_be_watched_too(make_model, tokenizer):
    found = input_statistics(make_model(), tokenizer, TEXTS, ["lm_head", "model.layers.1.mlp.down_proj"])
    assert found["lm_head"].shape == (64, 64)


def test_statistics_of_another_width_are_refused(peft_model, statistics):
    deltas = trained_deltas(peft_model, "projector")
    name = deltas[0].name
    with pytest.raises(ValueError, match=rf"have one of shape \(3, 3\) for {name}, expected a second moment of shape"):
        Projection(deltas, InputStatistics({**statistics, name: torch.eye(3)}, 5), 1.0)
    with pytest.raises(ValueError, match=f"have none for {name}"):
        Projection(deltas, InputStatistics({}, 5), 1.0)
    with pytest.raises(ValueError, match=rf"have one of shape .*, all of it zero, for {name}"):
        Projection(deltas, InputStatistics({**statistics, name: torch.zeros_like(statistics[name])}, 5), 1.0)


def test_no_text_is_an_error(make_model, tokenizer):
    with pytest.raises(ValueError, match="got 1 texts with no token in them, expected ordinary text"):
        input_statistics(make_model(), tokenizer, [""], ["model.layers.1.mlp.down_proj"])


def test_a_method_whose_change_is_not_known_is_refused(make_model):
    dora = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["down_proj"], use_dora=True))
    with pytest.raises(
        ValueError, match="`projector` is on and .* is trained, expected only linear layers with LocFT"
    ):
        trained_deltas(dora, "projector")


def test_weights_that_lie_the_other_way_have_projectors_too(tokenizer):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64))
    name = "transformer.h.1.mlp.c_proj"  # a `Conv1D`, of shape (128, 32)
    statistics = input_statistics(gpt2, tokenizer, TEXTS, [name])
    weight = gpt2.get_submodule(name).weight.detach().clone()
    usual = torch.trace(weight.T @ statistics[name] @ weight) / 32
    model = get_peft_model(gpt2, LocFTConfig(layers=[1], target_modules=["mlp.c_proj"]))
    (delta,) = trained_deltas(model, "projector")
    Projection([delta], statistics, 0.1)
    disturbed = torch.trace(delta.projector @ statistics[name] @ delta.projector)
    assert disturbed.sqrt() == pytest.approx(3.3 * usual.sqrt().item(), rel=0.05)
