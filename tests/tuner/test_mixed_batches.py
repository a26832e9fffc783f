"""Batches in which each row has its own adapter: the same as one run for each adapter."""

import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig

from peft_locft import LocFTConfig
from peft_locft.tuner import LocFTLayer


IDS = torch.arange(5, 5 + 4 * 6).view(4, 6)
NAMES = ["far", "__base__", "default", "far"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def two(make_model):
    """A tiny model with adapters on different layers: `default` in layer 1, `far` in layers 1 and 2."""

    def two(architecture: str = "llama", dtype: torch.dtype = torch.float32, **settings):
        torch.manual_seed(2)
        config = {"layers": [1], "init_weights": False, **settings}
        model = get_peft_model(make_model(architecture).to(dtype), LocFTConfig(**config))
        model.add_adapter("far", LocFTConfig(layers=[1, 2], init_weights=False))
        return model.eval()

    return two


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def alone(model, name: str, run):
    """Run with one adapter for all rows."""
    if name == "__base__":
        with model.disable_adapter():
            return run()
    model.set_adapter(name)
    try:
        return run()
    finally:
        model.set_adapter("default")


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "gpt_neox", "phi3"])
def test_each_row_equals_the_run_of_its_own_adapter(architecture, dtype, two):
    model = two(architecture, dtype)
    mixed = model(IDS, adapter_names=NAMES).logits
    assert mixed.dtype is dtype
    single = [alone(model, name, lambda: model(IDS).logits)[row] for row, name in enumerate(NAMES)]
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(mixed, torch.stack(single), atol=tolerance, rtol=tolerance)
    others = [alone(model, "default", lambda: model(IDS).logits)[row] for row in (0, 1)]
    assert all((mixed[row] - others[row]).abs().max() > 3 * tolerance for row in (0, 1))
    assert hooks(model) == 0


def test_an_embedding_serves_several_adapters(two):
    model = two(layers=None, target_modules=["embed_tokens"])
    mixed = model(IDS, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(
            mixed[row], alone(model, name, lambda: model(IDS).logits)[row], atol=1e-4, rtol=1e-4
        )
    assert (mixed[2] - alone(model, "__base__", lambda: model(IDS).logits)[2]).abs().max() > 1e-2


def test_a_module_saved_as_a_full_copy_is_used_for_its_own_rows(two):
    model = two(modules_to_save=["lm_head"])
    head = model.get_submodule("base_model.model.lm_head")
    head.modules_to_save["default"].weight.data.mul_(-1)
    mixed = model(IDS, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(
            mixed[row], alone(model, name, lambda: model(IDS).logits)[row], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("through_config", [False, True])
def test_generation_equals_the_run_of_each_adapter(beams, through_config, two):
    model = two()
    how = {**GREEDY, "num_beams": beams}
    how = {"generation_config": GenerationConfig(**how)} if through_config else how
    mixed = model.generate(input_ids=IDS, adapter_names=NAMES, **how)
    single = [alone(model, name, lambda: model.generate(input_ids=IDS, **how))[row] for row, name in enumerate(NAMES)]
    assert [row.tolist() for row in mixed] == [row.tolist() for row in single]
    assert len({tuple(row[6:].tolist()) for row in mixed}) > 1
    assert hooks(model) == 0


def test_sampling_several_sequences_for_each_row_uses_its_adapter(two):
    model = two()
    how = {"max_new_tokens": 4, "do_sample": True, "top_k": 1, "num_return_sequences": 2, "pad_token_id": 0}
    mixed = model.generate(input_ids=IDS, adapter_names=NAMES, **how)
    single = [
        alone(model, name, lambda: model.generate(input_ids=IDS, **GREEDY | {"max_new_tokens": 4}))[row]
        for row, name in enumerate(NAMES)
    ]
    assert mixed.tolist() == [row.tolist() for row in single for _ in range(2)]


@pytest.mark.parametrize("names", [["far"], ["far"] * 5, []])
def test_a_wrong_number_of_names_is_refused(names, two):
    model = two()
    with pytest.raises(ValueError) as raised:
        model(IDS, adapter_names=names)
    assert str(raised.value) == (
        "Length of `adapter_names` should be the same as the number of inputs, but got "
        f"{len(names)} and 4 respectively."
    )
    assert hooks(model) == 0


def test_names_of_no_adapter_are_refused(two):
    model = two()
    with pytest.raises(ValueError) as raised:
        model(IDS, adapter_names=["far", "zoo", "__base__", "ape"])
    assert str(raised.value) == "Trying to infer with non-existing adapter(s): ape, zoo"
    assert hooks(model) == 0


def test_training_mode_is_refused(two):
    model = two().train()
    with pytest.raises(ValueError) as raised:
        model(IDS, adapter_names=NAMES)
    assert str(raised.value) == "Cannot pass `adapter_names` when the model is in training mode."
    assert hooks(model) == 0


@pytest.mark.parametrize("settings", [{}, {"layers": None, "target_modules": ["embed_tokens"]}])
def test_merged_adapters_are_refused_until_they_are_unmerged(settings, two):
    model = two(**settings)
    expected = model(IDS, adapter_names=NAMES).logits
    model.merge_adapter()
    with pytest.raises(ValueError) as raised:
        model(IDS, adapter_names=NAMES)
    assert str(raised.value) == (
        "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
    )
    model.unmerge_adapter()
    assert torch.equal(model(IDS, adapter_names=NAMES).logits, expected)


def test_hooks_are_removed_when_the_forward_pass_fails(two):
    model = two()
    before = model(IDS).logits
    last = [module for module in model.modules() if isinstance(module, LocFTLayer)][-1]
    forward = last.base_layer.forward

    def fail(*args, **kwargs):
        assert hooks(model) > 0
        raise RuntimeError("the base layer failed")

    last.base_layer.forward = fail
    with pytest.raises(RuntimeError, match="^the base layer failed$"):
        model(IDS, adapter_names=NAMES)
    last.base_layer.forward = forward
    assert hooks(model) == 0
    assert torch.equal(model(IDS).logits, before)
