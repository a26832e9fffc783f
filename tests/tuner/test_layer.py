"""The dense delta on one module: its arithmetic against arithmetic by hand, and what of it is trained."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_locft import LocFTConfig
from peft_locft.tuner import LocFTLinear


ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_neox", "opt", "phi3", "mistral"]
IDS = torch.arange(12)[None]
BF16 = torch.bfloat16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zero_delta_changes_nothing(architecture, make_model):
    model = get_peft_model(make_model(architecture), LocFTConfig())
    assert torch.equal(model(IDS).logits, make_model(architecture)(IDS).logits)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_delta_is_added_as_by_hand(kind, make_layer, x):
    layer = make_layer(kind)
    delta = layer.locft_delta["a"].weight
    assert delta.shape == (3, 5)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ delta.T)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_delta_weight_has_the_orientation_of_the_base_weight(kind, make_layer):
    layer = make_layer(kind)
    delta = layer.locft_delta["a"].weight
    assert torch.equal(layer.get_delta_weight("a"), delta if kind is nn.Linear else delta.T)
    assert layer.get_delta_weight("a").shape == layer.base_layer.weight.shape
    assert layer.supports_lora_conversion("a")


def test_active_adapters_add_up(make_layer, x):
    layer = make_layer()
    a, b = (layer.locft_delta[name].weight for name in "ab")
    for active, delta in ((["a"], a), (["b"], b), (["a", "b"], a + b), ([], a * 0), (["a", "elsewhere"], a)):
        layer.set_adapter(active)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ delta.T)


def test_gradient_is_that_of_fine_tuning_the_weight_and_flows_into_the_delta_alone(make_model):
    model = get_peft_model(make_model(), LocFTConfig(layers=[1]))
    model(IDS, labels=IDS).loss.backward()
    (name,) = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert name == "base_model.model.model.layers.1.mlp.down_proj.locft_delta.default.weight"
    plain = make_model()
    plain(IDS, labels=IDS).loss.backward()
    expected = plain.model.layers[1].mlp.down_proj.weight.grad
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(model.get_parameter(name).grad, expected)


def test_a_further_adapter_of_a_layer_is_frozen_until_it_is_active(make_layer):
    layer = make_layer()
    trained = {name: delta.weight.requires_grad for name, delta in layer.locft_delta.items()}
    assert trained == {"a": True, "b": False} and layer.active_adapters == ["a"]
    layer.update_layer("a", LocFTConfig(), inference_mode=True)
    assert not layer.locft_delta["a"].weight.requires_grad
    frozen = LocFTLinear(nn.Linear(5, 3), "a", LocFTConfig(inference_mode=True))
    assert not frozen.locft_delta["a"].weight.requires_grad


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [(BF16, "cpu", torch.float32), (torch.float64, "cpu", torch.float64), (torch.float32, "meta", torch.float32)],
)
def test_delta_is_made_beside_the_weight_and_never_coarser_than_float32(dtype, device, expected):
    layer = LocFTLinear(nn.Linear(5, 3, dtype=dtype, device=device), "a", LocFTConfig())
    delta = layer.locft_delta["a"].weight
    assert (delta.dtype, delta.device.type) == (expected, device)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_only_the_active_adapter_is_trained(dtype, make_model):
    # PEFT casts a half-precision delta to float32 when it is added, which must not set it free.
    model = get_peft_model(make_model().to(dtype), LocFTConfig(layers=[1]))
    model.add_adapter("same", LocFTConfig(layers=[1]))
    model.add_adapter("other", LocFTConfig(layers=[2]))
    for active in ("default", "same", "other", "default"):
        model.set_adapter(active)
        parameters = dict(model.named_parameters())
        assert [name.split(".")[-2] for name in parameters if parameters[name].requires_grad] == [active]
        deltas = [parameter.dtype for name, parameter in parameters.items() if "locft_delta" in name]
        assert deltas == [torch.float32] * 3
    with model.disable_adapter():
        assert not any(parameter.requires_grad for parameter in model.parameters())
    model.add_adapter("late", LocFTConfig(layers=[0]))
    assert [n.split(".")[-2] for n, parameter in model.named_parameters() if parameter.requires_grad] == ["default"]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_disabled_adapter_leaves_the_model_as_it_was(dtype, merged, make_adapted, make_model):
    model, base = make_adapted(dtype=dtype), make_model().to(dtype)
    adapted = model(IDS).logits
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert torch.equal(model(IDS).logits, adapted)
    assert not torch.equal(adapted, base(IDS).logits)


def test_other_kinds_of_module_are_refused(make_model):
    with pytest.raises(TypeError) as raised:
        get_peft_model(make_model(), LocFTConfig(target_modules=["model.norm"]))
    assert str(raised.value) == (
        "the target module 'model.norm' is a LlamaRMSNorm, expected a `torch.nn.Linear`, a "
        "`transformers.pytorch_utils.Conv1D`, a `torch.nn.Embedding`, or fused experts: name other `target_modules`"
    )


def test_forward_in_bf16_keeps_its_dtype_and_rounds_the_float32_sum_once(make_layer, x):
    layer, x = make_layer(dtype=BF16), x.to(BF16)
    delta = layer.locft_delta["a"].weight
    assert (layer.weight.dtype, delta.dtype, layer(x).dtype) == (BF16, torch.float32, BF16)
    assert torch.equal(layer(x), (layer.base_layer(x) + x.float() @ delta.T).to(BF16))
    assert not torch.equal(layer(x), layer.base_layer(x) + (x.float() @ delta.T).to(BF16))


def test_repr_tells_the_method(make_layer):
    assert repr(make_layer()).startswith("locft.LocFTLinear(\n  (base_layer): Linear(in_features=5, out_features=3")
