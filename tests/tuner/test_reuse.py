"""One config for several models, and other things that were once found by using the adapters in odd ways."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Phi3Config

from peft_locft import BaseMismatchWarning, LocFTConfig
from peft_locft.tuner import LocFTLinear


IDS = torch.tensor([[5, 3, 7, 2], [1, 8, 4, 6]])


def test_a_config_means_the_same_in_each_model_that_it_is_used_for(make_model):
    config = LocFTConfig(layers=[-1])
    assert get_peft_model(make_model(num_hidden_layers=3), config).targeted_module_names == [
        "model.layers.2.mlp.down_proj"
    ]
    assert get_peft_model(make_model(num_hidden_layers=5), config).targeted_module_names == [
        "model.layers.4.mlp.down_proj"
    ]
    assert get_peft_model(make_model("gpt2"), config).targeted_module_names == ["transformer.h.2.mlp.c_proj"]
    config = LocFTConfig(target_modules=r".*\.[12]\.mlp\.up_proj")
    for layers in (2, 3):
        names = get_peft_model(make_model(num_hidden_layers=layers), config).targeted_module_names
        assert names == [f"model.layers.{layer}.mlp.up_proj" for layer in range(1, layers)]


def test_what_is_asked_for_afterwards_counts(make_model):
    config = LocFTConfig(layers=[-1])
    get_peft_model(make_model(), config)
    config.set_layers([0])
    assert get_peft_model(make_model(), config).targeted_module_names == ["model.layers.0.mlp.down_proj"]


def test_a_config_used_again_on_the_merged_model_is_no_mismatch(make_model):
    config = LocFTConfig(layers=[1], init_weights=False, strict=True)
    merged = get_peft_model(make_model(), config).merge_and_unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        again = get_peft_model(merged, config)
    first = get_peft_model(make_model(), LocFTConfig(layers=[1]))
    prints = [model.peft_config["default"].base_fingerprint for model in (again, first)]
    assert prints[0].keys() == prints[1].keys() and prints[0] != prints[1]


def test_merging_an_adapter_that_does_not_exist_is_refused(make_adapted):
    model = make_adapted()
    expected = model(IDS).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError) as raised:
            merge(adapter_names=["typo"])
        assert str(raised.value) == "adapters ['typo'] do not exist, expected some of ['default']"
    assert torch.equal(model(IDS).logits, expected)


def test_safe_merge_judges_the_sum_and_not_its_parts():
    layer = LocFTLinear(nn.Linear(5, 3, dtype=torch.float16), "a", LocFTConfig())
    layer.update_layer("b", LocFTConfig())
    before = layer.weight.detach().clone()
    layer.locft_delta["a"].weight.data.fill_(7e4)
    layer.locft_delta["b"].weight.data.fill_(-7e4)
    layer.merge(safe_merge=True, adapter_names=["a", "b"])
    torch.testing.assert_close(layer.weight.data, before, atol=1e-2, rtol=0)


def test_safe_merge_tells_when_the_base_weight_is_broken():
    layer = LocFTLinear(nn.Linear(5, 3), "a", LocFTConfig())
    layer.base_layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError) as raised:
        layer.merge(safe_merge=True)
    assert str(raised.value) == "NaNs detected in the base weight 'weight', before anything is merged into it"


@pytest.mark.parametrize("combination", ["magnitude_prune", "ties"])
def test_each_expert_is_pruned_by_itself(combination):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=4)
    settings = {"target_modules": ["mlp.experts.1.down_proj"], "init_weights": False}
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LocFTConfig(**settings))
    model.add_weighted_adapter(["default"], [1.0], "pruned", combination_type=combination, density=0.25)
    layer = model.base_model.model.model.layers[0].mlp.experts
    full, pruned = (layer.expert_delta(name, "down_proj", 1) for name in ("default", "pruned"))
    assert (full != 0).all() and abs((pruned != 0).float().mean().item() - 0.25) < 0.01


@pytest.mark.parametrize("place", [{"layers": [1]}, {"target_modules": ["self_attn.q_proj"]}])
def test_a_mixed_batch_goes_through_a_model_that_flattens_it(place, make_model):
    model = get_peft_model(make_model("opt"), LocFTConfig(**place, init_weights=False)).eval()
    model.add_adapter("other", LocFTConfig(**place, init_weights=False))
    mixed = model(IDS, adapter_names=["other", "__base__"]).logits
    model.set_adapter("other")
    torch.testing.assert_close(mixed[0], model(IDS).logits[0])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(IDS).logits[1])
    # Four tokens for two rows would fit the two layers of a flattened batch, so the batch itself is looked at.
    with pytest.raises(ValueError, match="^Length of `adapter_names` should be .* but got 4 and 2 respectively.$"):
        model(IDS, adapter_names=["other"] * 4)


def test_ends_of_names_that_several_stacks_of_layers_have_are_refused(make_model):
    # As in Phi-4-multimodal, whose own config is that of its text model.
    config = Phi3Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config)
    model.model.extra = nn.Module()
    model.model.extra.layers = nn.ModuleList(nn.ModuleDict({"down_proj": nn.Linear(2, 2)}) for _ in range(2))
    with pytest.raises(ValueError) as raised:
        get_peft_model(model, LocFTConfig(layers=[1], target_modules=["down_proj"]))
    assert str(raised.value) == (
        "`target_modules` has 'down_proj', which means modules in several lists of layers, ['model.extra.layers', "
        "'model.layers']: say which, by full names or by an expression such as 'model\\\\.extra\\\\.layers.*' and what "
        "follows"
    )
    names = get_peft_model(model, LocFTConfig(target_modules=r"model\.layers\.1\..*down_proj")).targeted_module_names
    assert names == ["model.layers.1.mlp.down_proj"]
