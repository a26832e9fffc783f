"""Arithmetic between adapters: sums, differences, TIES and DARE, equal to PEFT's own helpers on the deltas."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import merge_utils
from transformers import MixtralConfig, MixtralForCausalLM

from peft_locft import LocFTConfig
from peft_locft.tuner import LocFTLayer


IDS = torch.arange(24).view(2, 12)
HELPERS = {
    "linear": lambda deltas, weights, density: merge_utils.task_arithmetic(deltas, weights),
    "ties": merge_utils.ties,
    "dare_linear": merge_utils.dare_linear,
    "dare_ties": merge_utils.dare_ties,
    "magnitude_prune": merge_utils.magnitude_prune,
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def base_logits(model) -> torch.Tensor:
    with model.disable_adapter():
        return logits(model)


def layers_of(model) -> list[LocFTLayer]:
    return [module for module in model.modules() if isinstance(module, LocFTLayer)]


def delta_of(layer: LocFTLayer, name: str, parameter: str = "weight") -> torch.Tensor:
    return layer.get_delta_weight(name, parameter).detach()


@pytest.fixture
def pair(make_model):
    """A tiny model with the random adapters `default` and `other`."""

    def pair(architecture: str = "llama", other: dict | None = None, model=None, **settings) -> PeftModel:
        torch.manual_seed(2)
        settings = settings or {"layers": [1]}
        model = make_model(architecture) if model is None else model
        model = get_peft_model(model, LocFTConfig(init_weights=False, **settings))
        model.add_adapter("other", LocFTConfig(init_weights=False, **(other or settings)))
        return model.eval()

    return pair


@pytest.fixture
def mixtral():
    """A tiny mixture of four experts, whose weights are fused."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config).eval()


def test_several_active_adapters_add_up(pair):
    model = pair()
    (layer,) = layers_of(model)
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(3))
    summed = delta_of(layer, "default") + delta_of(layer, "other")
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ summed.T, atol=1e-5, rtol=1e-5)
    together = logits(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), together, atol=1e-4, rtol=1e-4)
    assert (together - base_logits(model)).abs().max() > 1e-2


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("kind", HELPERS)
def test_each_combination_equals_pefts_helper_on_the_deltas(kind, sign, pair):
    model = pair()
    (layer,) = layers_of(model)
    deltas, weights = [delta_of(layer, name) for name in ("default", "other")], torch.tensor([0.7, -0.4])
    density = None if kind == "linear" else 0.3
    signs = {"majority_sign_method": sign} if "ties" in kind else {}
    state = torch.get_rng_state()
    expected = HELPERS[kind](deltas, weights, density, **signs)
    # Making the new adapter draws random numbers too, so the seed is set where the combination begins.
    make = model.base_model.inject_adapter

    def make_and_seed(*args, **kwargs):
        make(*args, **kwargs)
        torch.set_rng_state(state)

    model.base_model.inject_adapter = make_and_seed
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "new", kind, density, majority_sign_method=sign)
    assert torch.equal(delta_of(layer, "new"), expected)
    if kind != "linear":
        plain = merge_utils.task_arithmetic(deltas, weights)
        assert not torch.allclose(expected, plain)


def test_ties_elects_signs_as_it_is_told(pair):
    model = pair()
    (layer,) = layers_of(model)
    for name in ("first", "second"):
        model.add_adapter(name, LocFTConfig(layers=[1], init_weights=False))
    names = ["default", "other", "first"]
    for method in ("total", "frequency"):
        model.add_weighted_adapter(names, [1.0, 1.0, 1.0], method, "ties", 0.9, majority_sign_method=method)
    assert not torch.equal(delta_of(layer, "total"), delta_of(layer, "frequency"))


def test_an_adapter_minus_itself_is_the_base_bit_for_bit(pair):
    model = pair()
    model.add_weighted_adapter(["default", "default"], [1.0, -1.0], "nothing")
    model.set_adapter("nothing")
    (layer,) = layers_of(model)
    assert torch.equal(delta_of(layer, "nothing"), torch.zeros(64, 128))
    assert torch.equal(logits(model), base_logits(model))


def test_a_negative_weight_takes_an_adapter_out_again(pair):
    model = pair()
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    model.add_weighted_adapter(["both", "other"], [1.0, -1.0], "back")
    (layer,) = layers_of(model)
    torch.testing.assert_close(delta_of(layer, "back"), delta_of(layer, "default"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_of_different_layers_and_modules_unite(architecture, pair):
    modules = ("mlp.down_proj", "self_attn.o_proj") if architecture == "llama" else ("mlp.c_proj", "attn.c_attn")
    model = pair(
        architecture,
        layers=[0, 1],
        target_modules=[modules[0]],
        other={"layers": [1, 2], "target_modules": list(modules)},
    )
    model.add_weighted_adapter(["default", "other"], [2.0, -0.5], "new")
    layers = layers_of(model)
    edits = [(bool(layer.edited("default")), bool(layer.edited("other"))) for layer in layers]
    assert sorted(edits) == [(False, True)] * 3 + [(True, False), (True, True)]
    for layer in layers:
        expected = 2.0 * delta_of(layer, "default") - 0.5 * delta_of(layer, "other")
        torch.testing.assert_close(delta_of(layer, "new"), expected, atol=1e-6, rtol=1e-6)
        assert layer.edited("new") == ("weight",)
    assert len(model.peft_config["new"].target_modules) == 5 and model.peft_config["new"].layers is None


def test_conv1d_keeps_its_orientation(pair):
    model = pair("gpt2", layers=[1], target_modules=["mlp.c_proj"])
    model.add_weighted_adapter(["default"], [3.0], "new")
    (layer,) = layers_of(model)
    assert delta_of(layer, "new").shape == layer.base_layer.weight.shape == (256, 64)
    assert torch.equal(delta_of(layer, "new"), 3.0 * delta_of(layer, "default"))


def test_embeddings_combine(pair):
    model = pair(target_modules=["embed_tokens"])
    model.add_weighted_adapter(["default", "other"], [0.5, 0.25], "new")
    (layer,) = layers_of(model)
    expected = 0.5 * delta_of(layer, "default") + 0.25 * delta_of(layer, "other")
    torch.testing.assert_close(delta_of(layer, "new"), expected, atol=1e-6, rtol=1e-6)
    model.set_adapter("new")
    assert (logits(model) - base_logits(model)).abs().max() > 1e-2


def test_adapters_of_different_experts_unite(pair, mixtral, tmp_path):
    model = pair(
        model=mixtral,
        layers=[1],
        target_modules=["mlp.experts.0.down_proj"],
        other={"layers": [0, 1], "target_modules": ["mlp.experts.2.down_proj", "mlp.experts.3.gate_up_proj"]},
    )
    model.add_weighted_adapter(["default", "other"], [1.0, -2.0], "new")
    for layer in layers_of(model):
        for parameter in ("down_proj", "gate_up_proj"):
            expected = delta_of(layer, "default", parameter) - 2.0 * delta_of(layer, "other", parameter)
            torch.testing.assert_close(delta_of(layer, "new", parameter), expected, atol=1e-6, rtol=1e-6)
    first, second = layers_of(model)
    assert second.locft_experts["new"]["down_proj"] == (0, 2) and first.edited("default") == ()
    model.set_adapter("new")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    reloaded = PeftModel.from_pretrained(model.unload(), tmp_path / "new").eval()
    assert torch.equal(logits(reloaded), expected)


def test_a_compressed_adapter_combines_with_a_dense_one(pair, make_model, tmp_path):
    model = pair()
    ranks = {"model.layers.1.mlp.down_proj": 3}
    model.add_adapter("compressed", LocFTConfig(layers=[1], init_weights=False, rank_pattern=ranks))
    (layer,) = layers_of(model)
    assert layer.locft_A["compressed"].weight.shape == (3, 128)
    model.add_weighted_adapter(["compressed", "other"], [1.0, 0.5], "new")
    assert "new" in layer.locft_delta and model.peft_config["new"].rank_pattern == {}
    expected = delta_of(layer, "compressed") + 0.5 * delta_of(layer, "other")
    torch.testing.assert_close(delta_of(layer, "new"), expected, atol=1e-6, rtol=1e-6)
    assert torch.linalg.matrix_rank(delta_of(layer, "compressed")) == 3
    model.set_adapter("new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    reloaded = PeftModel.from_pretrained(make_model(), tmp_path / "new").eval()
    assert torch.equal(logits(reloaded), logits(model))


def test_the_new_adapter_is_frozen_and_not_active(pair):
    model = pair()
    before = logits(model)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "new")
    assert model.active_adapters == ["default"]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    assert torch.equal(logits(model), before)


def test_the_new_adapter_is_saved_loaded_and_merged_like_any_other(pair, make_model, tmp_path):
    model = pair(layers=[0], target_modules=["mlp.down_proj"], other={"layers": [2]})
    model.peft_config["default"].set_companions({"edits.jsonl": "{}\n"})
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "new")
    assert model.peft_config["new"].companions() == {}
    model.set_adapter("new")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    reloaded = PeftModel.from_pretrained(make_model(), tmp_path / "new").eval()
    assert torch.equal(logits(reloaded), expected)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("error::peft_locft.BaseMismatchWarning")
def test_an_adapter_made_while_others_are_merged_knows_the_base_without_them(pair, make_model, tmp_path):
    model = pair()
    fingerprint = model.peft_config["default"].base_fingerprint
    model.merge_adapter()
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "new")
    model.add_adapter("further", LocFTConfig(layers=[1], init_weights=False))
    assert model.peft_config["new"].base_fingerprint == model.peft_config["further"].base_fingerprint == fingerprint
    model.unmerge_adapter()
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    PeftModel.from_pretrained(make_model(), tmp_path / "new")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"adapters": ["default", "zoo", "ape"]},
            "adapters ['zoo', 'ape'] do not exist, expected some of ['default', 'other']",
        ),
        ({"adapters": []}, "adapters [] do not exist, expected some of ['default', 'other']"),
        (
            {"adapter_name": "other"},
            "there already is an adapter 'other': delete it first, or give another name",
        ),
        ({"weights": [1.0]}, "there are 2 adapters and 1 weights, expected one weight for each"),
        (
            {"combination_type": "svd"},
            "`combination_type` is 'svd', expected one of ['linear', 'ties', 'dare_linear', 'dare_ties', "
            "'magnitude_prune']",
        ),
        (
            {"combination_type": "ties"},
            "`density` is None, expected a share above 0, and 1 at most, for 'ties'",
        ),
        (
            {"combination_type": "dare_linear", "density": 0.0},
            "`density` is 0.0, expected a share above 0, and 1 at most, for 'dare_linear'",
        ),
        (
            {"combination_type": "magnitude_prune", "density": 1.5},
            "`density` is 1.5, expected a share above 0, and 1 at most, for 'magnitude_prune'",
        ),
        (
            {"majority_sign_method": "mean"},
            "`majority_sign_method` is 'mean', expected one of ['total', 'frequency']",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message, pair):
    model = pair()
    given = {"adapters": ["default", "other"], "weights": [1.0, 1.0], "adapter_name": "new", **arguments}
    with pytest.raises(ValueError) as raised:
        model.add_weighted_adapter(**given)
    assert str(raised.value) == message
    assert list(model.peft_config) == ["default", "other"]


def test_several_full_copies_of_a_module_are_refused(pair):
    model = pair(layers=[1], modules_to_save=["lm_head"])
    with pytest.raises(ValueError) as raised:
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "new")
    assert str(raised.value) == (
        "adapters ['default', 'other'] hold full copies of modules (`modules_to_save`), which are no differences that could "
        "be combined: train them without"
    )


def test_a_name_that_torch_refuses_leaves_the_model_usable(pair):
    model = pair()
    before = logits(model)
    with pytest.raises(KeyError, match="module name can.*t contain"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "a.b")
    assert list(model.peft_config) == ["default", "other"]
    assert torch.equal(logits(model), before)
