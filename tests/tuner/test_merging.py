"""Merging the delta into the weight: rounded once, undone bit for bit, refused where it would do harm."""

import copy

import pytest
import torch
from peft import get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_locft import LocFTConfig
from peft_locft.tuner import LocFTLinear


ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_neox", "opt", "phi3", "mistral"]
IDS = torch.arange(12)[None]
BF16 = torch.bfloat16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_equals_unmerged(architecture, make_adapted, make_model):
    model = make_adapted(architecture)
    before = model(IDS).logits
    model.merge_adapter(safe_merge=True)
    (module,) = [module for module in model.modules() if isinstance(module, LocFTLinear)]
    module.locft_delta["default"].weight.data.fill_(torch.nan)  # which is used no more
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)
    assert (before - make_model(architecture)(IDS).logits).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_merging_into_bf16_rounds_once(kind, make_layer):
    # Small against the weight, where sums in bf16 would lose most of it.
    layer = make_layer(kind, BF16, scale=1e-3)
    weight = layer.base_layer.weight.detach().clone()
    a, b = (layer.get_delta_weight(name).detach() for name in "ab")
    assert weight.dtype is BF16 and a.dtype is torch.float32
    layer.merge()
    once = (weight.float() + a).to(BF16)
    assert torch.equal(layer.base_layer.weight, once)
    with pytest.warns(
        UserWarning, match="Already following adapters were merged a. You are now additionally merging b"
    ):
        layer.merge(adapter_names=["b"])
    both = (weight.float() + a + b).to(BF16)
    assert torch.equal(layer.base_layer.weight, both) and layer.merged_adapters == ["a", "b"]
    # Each cheaper way comes to something else, here.
    assert not torch.equal(both, (once.float() + b).to(BF16))
    assert not torch.equal(both, weight + a.to(BF16) + b.to(BF16))
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight) and layer.base_layer.weight.dtype is BF16
    assert not torch.equal(weight, (both.float() - a - b).to(BF16))
    assert layer.merged_adapters == []
    # The copy that was kept for unmerging is not used again: the weight may change in between.
    layer.base_layer.weight.data = weight + 1
    layer.merge(adapter_names=["b"])
    assert torch.equal(layer.base_layer.weight, ((weight + 1).float() + b).to(BF16))


@pytest.mark.parametrize("model_dtype", [torch.float16, torch.float64])
def test_a_model_may_be_cast_while_it_is_merged(model_dtype, make_layer, x):
    layer = make_layer()
    weight, a, b = (w.detach().clone() for w in (layer.weight, *(layer.get_delta_weight(name) for name in "ab")))
    layer.merge()
    layer.to(model_dtype)
    assert layer(x.to(model_dtype)).dtype is model_dtype
    with pytest.warns(UserWarning, match="additionally merging b"):
        layer.merge(adapter_names=["b"])
    assert layer.weight.dtype is model_dtype
    torch.testing.assert_close(layer.weight.float(), weight + a + b, atol=1e-2, rtol=1e-2)
    layer.unmerge()
    assert torch.equal(layer.weight, weight.to(model_dtype)) and layer.weight.dtype is model_dtype


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, torch.nan), (torch.float32, torch.inf), (BF16, -torch.inf), (torch.float16, 70000.0)],
)
def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(name, dtype, value, make_layer):
    # 70000 is finite in float32, in which the sum is formed, and infinite in float16, in which it is stored.
    layer = make_layer(dtype=dtype)
    layer.locft_delta[name].weight.data[1, 2] = value
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError) as raised:
        layer.merge(safe_merge=True, adapter_names=["a", "b"])
    assert str(raised.value) == f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
    assert torch.equal(layer.weight, before) and not layer.merged
    layer.merge(adapter_names=["a", "b"])
    assert not torch.isfinite(layer.weight).all()


def test_safe_merge_names_the_default_adapter(make_adapted):
    model = make_adapted()
    delta = model.get_parameter("base_model.model.model.layers.1.mlp.down_proj.locft_delta.default.weight")
    delta.data[0, 0] = torch.nan
    with pytest.raises(ValueError) as raised:
        model.merge_and_unload(safe_merge=True)
    assert str(raised.value) == "NaNs detected in the merged weights. The adapter default seems to be broken"


def test_merging_the_merged_and_unmerging_the_unmerged_warns_and_changes_nothing(make_layer):
    layer = make_layer()
    before = layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="^Already unmerged. Nothing to do.$"):
        layer.unmerge()
    assert torch.equal(layer.weight, before)
    layer.merge()
    merged = layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="^All adapters are already merged, nothing to do.$"):
        layer.merge()
    assert torch.equal(layer.weight, merged) and not torch.equal(merged, before)


def test_merging_into_weights_that_cannot_be_read_is_refused(make_layer):
    # Most of these libraries need other hardware; what is tested is that PEFT's judgement is heeded.
    layer = make_layer()
    layer.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    before = layer.weight.detach().clone()
    with pytest.raises(TypeError) as raised:
        layer.merge()
    assert str(raised.value) == (
        "the base layer is a quantised Linear, expected floating-point weights: load the base model without "
        "quantisation to merge, or leave the adapter unmerged"
    )
    assert torch.equal(layer.weight, before) and not layer.merged
    layer.merge(adapter_names=["elsewhere"])  # nothing to merge here, nothing to refuse


def test_adapters_of_other_layers_are_passed_over(make_layer, make_model):
    layer = make_layer()
    before = layer.weight.detach().clone()
    layer.merge(adapter_names=["elsewhere"])
    assert torch.equal(layer.weight, before) and not layer.merged
    model = get_peft_model(make_model(), LocFTConfig(layers=[1], init_weights=False))
    model.add_adapter("other", LocFTConfig(layers=[2], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected = model(IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    merged = [module.merged_adapters for module in model.modules() if isinstance(module, LocFTLinear)]
    assert merged == [["default"], ["other"]]


def test_unmerging_works_in_a_copy_of_a_merged_layer(make_layer):
    layer = make_layer(dtype=BF16)
    before = layer.weight.detach().clone()
    layer.merge()
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert torch.equal(twin.weight, before) and not torch.equal(layer.weight, before)
