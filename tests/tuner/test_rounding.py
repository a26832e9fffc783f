"""What a merge costs in the dtype of the base weights, and a safe merge over several layers."""

import pytest
import torch
from peft import get_peft_model

from peft_locft import LocFTConfig, merge_report
from peft_locft.tuner import LocFTLayer, LocFTLinear


IDS = torch.arange(12)[None]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAME = "model.layers.1.mlp.down_proj.weight"


def layer_of(model) -> LocFTLinear:
    (layer,) = [module for module in model.modules() if isinstance(module, LocFTLinear)]
    return layer


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name].nan_to_num(1e9), second[name].nan_to_num(1e9)) for name in first
    )


@pytest.fixture
def ones(make_adapted):
    """A model whose edited weight is 1 everywhere, and a delta of zeros but for its first values."""

    def ones(dtype: torch.dtype, *values: float):
        model = make_adapted(dtype=dtype)
        layer = layer_of(model)
        layer.get_base_layer().weight.data.fill_(1.0)
        delta = layer.locft_delta["default"].weight.data
        assert delta.dtype is F32
        delta.zero_()
        delta[0, : len(values)] = torch.tensor(values)
        return model

    return ones


@pytest.mark.parametrize(
    ("dtype", "values", "kept", "unchanged"),
    [
        # Above 1, numbers are 2**-7 apart in bfloat16, 2**-10 in float16 and 2**-23 in float32.
        (BF16, [2**-7, 2**-7], 1.0, 0.0),
        (BF16, [2**-7, 2**-9], 1 - 2**-18 / (2**-14 + 2**-18), 0.5),
        (BF16, [2**-9], 0.0, 1.0),
        (BF16, [3 * 2**-9], 1 - 1 / 9, 0.0),  # rounded up to 4 * 2**-9
        (F16, [2**-10, 2**-12], 1 - 2**-24 / (2**-20 + 2**-24), 0.5),
        (F16, [2**-7, 2**-9], 1.0, 0.0),
        (F32, [2**-7, 2**-20], 1.0, 0.0),
        (F32, [2**-25], 0.0, 1.0),
        (BF16, [], 1.0, 0.0),
    ],
)
def test_the_report_equals_what_was_computed_by_hand(dtype, values, kept, unchanged, ones):
    model = ones(dtype, *values)
    before = state(model)
    report = merge_report(model)
    assert list(report) == [NAME]
    assert report[NAME].kept == pytest.approx(kept, abs=1e-6)
    assert report[NAME].unchanged == pytest.approx(unchanged, abs=1e-9)
    assert same(state(model), before) and not layer_of(model).merged


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_report_equals_what_a_merge_does(dtype, make_adapted):
    model = make_adapted(dtype=dtype)
    layer = layer_of(model)
    delta = layer.locft_delta["default"].weight
    delta.data.mul_(1e-2)
    cost = merge_report(model)[NAME]
    before = layer.get_base_layer().weight.detach().float()
    model.merge_adapter()
    difference = layer.get_base_layer().weight.detach().float() - before
    lost = ((difference - delta) ** 2).sum() / (delta**2).sum()
    assert cost.kept == pytest.approx(1 - lost.item(), abs=1e-6)
    assert cost.unchanged == pytest.approx(((difference == 0) & (delta != 0)).float().mean().item(), abs=1e-6)
    assert (cost.kept > 0.999999) == (dtype is F32)


def test_a_delta_that_rounding_makes_worse_is_kept_below_zero(ones):
    # Below 1, numbers are 2**-8 apart in bfloat16: -0.6 of that becomes the whole.
    assert merge_report(ones(BF16, -0.6 * 2**-8))[NAME].kept == pytest.approx(1 - (0.4 / 0.6) ** 2, abs=1e-6)


def test_another_dtype_tells_what_merging_into_it_would_cost(ones):
    model = ones(F32, 2**-7, 2**-9, 2**-12)
    before = state(model)
    total = 2**-14 + 2**-18 + 2**-24
    assert merge_report(model)[NAME].kept == 1.0
    assert merge_report(model, dtype=F32) == merge_report(model)
    coarse, middle = merge_report(model, dtype=BF16)[NAME], merge_report(model, dtype=F16)[NAME]
    assert coarse.kept == pytest.approx(1 - (2**-18 + 2**-24) / total, abs=1e-6)
    assert coarse.unchanged == pytest.approx(2 / 3)
    assert middle.kept == pytest.approx(1 - 2**-24 / total, abs=1e-6)
    assert middle.unchanged == pytest.approx(1 / 3)
    assert same(state(model), before)
    # A finer dtype than the base's loses nothing of what is added to it.
    assert merge_report(ones(BF16, 2**-9), dtype=F32)[NAME].kept == 1.0


def test_adapters_are_counted_together_and_by_name(ones):
    model = ones(BF16, 2**-9)
    model.add_adapter("other", LocFTConfig(layers=[1, 2]))
    for layer in (module for module in model.modules() if isinstance(module, LocFTLayer)):
        layer.locft_delta["other"].weight.data[0, 0] = 3 * 2**-9
    alone, other = merge_report(model), merge_report(model, ["other"])
    both = merge_report(model, ["default", "other"])
    assert list(alone) == [NAME] and list(other) == list(both) == [NAME, NAME.replace(".1.", ".2.")]
    assert alone[NAME].kept == 0.0 and other[NAME].kept == pytest.approx(1 - 1 / 9, abs=1e-6)
    assert both[NAME].kept == 1.0  # 4 * 2**-9 is one step


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("gpt2", {"layers": [1]}), ("llama", {"target_modules": ["embed_tokens"]}), ("llama", {"layers": [0, 2]})],
)
def test_the_report_has_a_line_for_each_weight_of_any_kind(architecture, settings, make_model):
    model = get_peft_model(make_model(architecture).to(BF16), LocFTConfig(init_weights=False, **settings))
    before = state(model)
    report = merge_report(model)
    assert sorted(report) == sorted(f"{name}.weight" for name in model.targeted_module_names)
    assert all(0.9 < cost.kept < 1 and 0 <= cost.unchanged < 0.2 for cost in report.values())
    assert same(state(model), before)


def test_the_report_of_merged_adapters_is_refused(ones):
    model = ones(BF16, 2**-7)
    model.merge_adapter()
    with pytest.raises(ValueError) as raised:
        merge_report(model)
    assert str(raised.value) == "adapters ['default'] are merged already: call `unmerge_adapter` first"


@pytest.mark.parametrize(
    ("names", "shown"), [(["elsewhere"], "any of the adapters ['elsewhere']"), (None, "an active adapter")]
)
def test_the_report_of_nothing_is_refused(names, shown, ones, make_model):
    model = make_model() if names is None else ones(BF16, 2**-7)
    with pytest.raises(ValueError) as raised:
        merge_report(model, names)
    assert str(raised.value) == f"there is nothing to merge: no layer has {shown}"


@pytest.mark.parametrize("names", [None, ["default"]])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_that_fails_in_the_last_layer_changes_no_layer(method, names, make_model):
    model = get_peft_model(make_model(), LocFTConfig(init_weights=False)).eval()
    layers = [module for module in model.modules() if isinstance(module, LocFTLinear)]
    layers[-1].locft_delta["default"].weight.data[3, 4] = torch.nan
    before = state(model)
    first = "base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"
    with pytest.raises(ValueError) as raised:
        getattr(model, method)(safe_merge=True, adapter_names=names)
    assert str(raised.value) == "NaNs detected in the merged weights. The adapter default seems to be broken"
    assert len(layers) == 3 and same(state(model), before) and not any(layer.merged for layer in layers)
    assert [module for module in model.modules() if isinstance(module, LocFTLinear)] == layers
    getattr(model, method)(adapter_names=names)  # as it is asked for
    assert not torch.equal(layers[0].get_base_layer().weight, before[first])


def test_a_safe_merge_of_what_is_merged_already_counts_it_once(ones):
    model = ones(F16, 40000.0)  # twice this is infinite in float16
    model.merge_adapter(safe_merge=True)
    merged = state(model)
    with pytest.warns(UserWarning, match="^All adapters are already merged, nothing to do.$"):
        model.merge_adapter(safe_merge=True)
    assert same(state(model), merged)


def test_a_safe_merge_counts_what_is_merged_before(ones):
    model = ones(F16, 40000.0)
    model.add_adapter("other", LocFTConfig(layers=[1]))
    layer_of(model).locft_delta["other"].weight.data[0, 0] = 40000.0
    model.merge_adapter()
    with pytest.raises(ValueError) as raised:
        model.merge_adapter(["other"], safe_merge=True)
    assert str(raised.value) == "NaNs detected in the merged weights. The adapter default, other seems to be broken"
    assert layer_of(model).merged_adapters == ["default"]
