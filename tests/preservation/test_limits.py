"""Limits on the change of a weight, and what of an adapter is that change."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from projected import randomise

from peft_locft import EditConfig, EditTrainer, LocFTConfig
from peft_locft.preservation import LimitCallback, check_norms, squared_norm, trained_deltas


CONFIGS = {
    "locft": LocFTConfig(layers=[1], target_modules=["mlp.down_proj", "mlp.up_proj"]),
    "lora": LoraConfig(r=4, lora_alpha=12, target_modules=["down_proj", "up_proj"], layers_to_transform=[1]),
}


@pytest.fixture(params=CONFIGS)
def peft_model(request, make_model):
    model = get_peft_model(make_model(), CONFIGS[request.param])
    randomise(model)
    return model


def change(model, name):
    """What merging adds to the base weight."""
    layer = model.get_base_model().get_submodule(name)
    before = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    after = layer.get_base_layer().weight.detach().clone()
    layer.unmerge()
    return after - before


def test_a_delta_is_what_merging_adds(peft_model):
    deltas = trained_deltas(peft_model, "l2_weight")
    assert [delta.name.rsplit(".", 1)[-1] for delta in deltas] == ["up_proj", "down_proj"]
    for delta in deltas:
        assert torch.allclose(delta.weight(), change(peft_model, delta.name), atol=1e-5)


def test_the_l2_term_is_the_mean_relative_square(peft_model):
    deltas = trained_deltas(peft_model, "l2_weight")
    by_hand = [
        change(peft_model, delta.name).square().sum() / delta.layer.get_base_layer().weight.square().sum()
        for delta in deltas
    ]
    found = squared_norm(deltas)
    assert torch.allclose(found, torch.stack(by_hand).mean(), rtol=1e-3)
    found.backward()
    assert all(delta.entrance().weight.grad.abs().sum() > 0 for delta in deltas)


@pytest.mark.parametrize("projected", [False, True])
def test_no_number_of_the_change_exceeds_its_limit(peft_model, projected):
    deltas = trained_deltas(peft_model, "max_delta")
    for delta in deltas:
        if projected:
            delta.projector = torch.eye(delta.entrance().weight.shape[1]) * 0.5
    largest = min(float(delta.weight().abs().max()) for delta in deltas)
    LimitCallback(deltas, largest * 2e3, 0.0).on_optimizer_step(None, None, None)
    assert max(float(delta.weight().abs().max()) for delta in deltas) > largest
    LimitCallback(deltas, largest / 2, 0.0).on_optimizer_step(None, None, None)
    for delta in deltas:
        assert float(delta.weight().abs().max()) == pytest.approx(largest / 2, rel=1e-4)


def test_a_dense_delta_is_clamped_number_by_number(make_model):
    model = get_peft_model(make_model(), CONFIGS["locft"])
    delta = trained_deltas(model, "max_delta")[0]
    weight = delta.factor().weight.data
    weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
    expected = weight.clamp(-0.25, 0.25)
    LimitCallback([delta], 0.25, 0.0).on_optimizer_step(None, None, None)
    assert torch.equal(weight, expected)


def test_the_change_grows_no_further_than_its_limit(peft_model):
    deltas = trained_deltas(peft_model, "max_growth")
    before = [delta.weight().detach().clone() for delta in deltas]
    LimitCallback(deltas, 0.0, 0.01).on_optimizer_step(None, None, None)
    for delta, old in zip(deltas, before):
        norm = float(delta.layer.get_base_layer().weight.norm())
        assert float(delta.weight().norm()) == pytest.approx(0.01 * norm, rel=1e-4)
        direction = delta.weight() / delta.weight().norm()
        assert torch.allclose(direction, old / old.norm(), atol=1e-5)
    LimitCallback(deltas, 0.0, 5.0).on_optimizer_step(None, None, None)  # far above: nothing is scaled up
    assert float(deltas[0].weight().norm()) == pytest.approx(
        0.01 * float(deltas[0].layer.get_base_layer().weight.norm()), rel=1e-4
    )


def test_a_weight_that_is_all_zero_has_no_relative_size(peft_model):
    deltas = trained_deltas(peft_model, "l2_weight")
    check_norms(deltas)
    del deltas[0].base_norm  # which is computed once
    torch.nn.init.zeros_(deltas[0].layer.get_base_layer().weight)
    with pytest.raises(ValueError, match="the weight of model.layers.1.mlp.up_proj is all zero, expected one that a"):
        check_norms(deltas)


@pytest.mark.parametrize("term", ["l2_weight", "max_growth"])
def test_a_weight_that_is_all_zero_is_told_before_training(make_model, tokenizer, edits, tmp_path, term):
    model = make_model()
    torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    args = EditConfig(output_dir=str(tmp_path), report_to="none", disable_tqdm=True, **{term: 0.5})
    trainer = EditTrainer(model, args, edits, processing_class=tokenizer, peft_config=LocFTConfig(layers=[1]))
    with pytest.raises(ValueError, match="the weight of model.layers.1.mlp.down_proj is all zero"):
        trainer.train()
