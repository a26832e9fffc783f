"""Quantised base models, on the CPU: the delta stays in float32, a merge quantises again, and is undone bit for bit."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from preserved import KEPT
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from peft_locft import EditConfig, EditTrainer, LocFTConfig, merge_report, search_locations
from peft_locft.tuner import LocFTLinear
from peft_locft.tuner.quantization import keep_in_order


IDS = torch.arange(24).view(2, 12)
KINDS = ["torchao int8", "bnb 8bit", "bnb fp4", "bnb nf4 nested"]
# How far a merge may move the logits, relative to how far the adapter moves them: the delta is quantised as well.
MERGE_ERROR = {"torchao int8": 0.1, "bnb 8bit": 0.1, "bnb fp4": 0.8, "bnb nf4 nested": 0.8}
BY_HAND = (
    "the base model was quantised with torchao by hand, so how to quantise a merged weight again is not known: load it "
    "with `AutoModelForCausalLM.from_pretrained(..., quantization_config=TorchAoConfig(...))`, or leave the adapter "
    "unmerged"
)


def settings(kind: str) -> TorchAoConfig | BitsAndBytesConfig:
    if kind == "torchao int8":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "bnb 8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    nested = kind.endswith("nested")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4" if nested else "fp4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )


@pytest.fixture
def load(make_model, tmp_path):
    """Load a tiny Llama quantised, whose sizes are multiples of 64."""

    def load(kind: str) -> nn.Module:
        quantization_config = settings(kind)
        folder = tmp_path / "base"
        if not folder.exists():
            make_model(hidden_size=128, intermediate_size=256, head_dim=32).save_pretrained(folder)
        try:
            return AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=quantization_config, dtype=torch.float32, device_map="cpu"
            ).eval()
        except (ImportError, NotImplementedError, RuntimeError) as error:
            pytest.skip(f"{kind} does not load on this CPU: {error}")

    return load


@pytest.fixture
def adapted(load):
    """A quantised model with a random delta in layer 1."""

    def adapted(kind: str) -> tuple[PeftModel, LocFTLinear]:
        torch.manual_seed(2)
        model = get_peft_model(load(kind), LocFTConfig(layers=[1], init_weights=False)).eval()
        (layer,) = [module for module in model.modules() if isinstance(module, LocFTLinear)]
        return model, layer

    return adapted


def raw(layer: LocFTLinear) -> dict[str, torch.Tensor]:
    """The numbers that a quantised layer is stored as: data and scales."""
    base = layer.get_base_layer()
    weight = base.weight
    if hasattr(weight, "qdata"):
        return {"data": weight.qdata.clone(), "scale": weight.scale.clone()}
    found = {"data": weight.data.clone()}
    state = getattr(weight, "quant_state", None)
    if state is not None:
        found["scale"] = state.absmax.clone()
        if state.nested:
            found["nested"] = state.state2.absmax.clone()
    else:
        scale = base.state.SCB if base.state.SCB is not None else weight.SCB
        found["scale"] = scale.clone()
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_adds_the_delta_to_the_quantised_output(kind, adapted):
    model, layer = adapted(kind)
    delta = layer.locft_delta["default"].weight
    assert delta.dtype is torch.float32 and delta.device.type == "cpu"
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        base = layer.get_base_layer()(x)
        torch.testing.assert_close(layer(x), base + x @ delta.T, atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            assert torch.equal(layer(x), base)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_reads_the_same_after_a_forward_pass(kind, adapted):
    # bitsandbytes puts 4-bit weights into another order, and their scales into bfloat16, at the first forward pass.
    model, layer = adapted(kind)
    before = layer.get_base_weight().to(torch.float32)
    with torch.no_grad():
        model(IDS)
    torch.testing.assert_close(layer.get_base_weight().to(torch.float32), before, atol=1e-6, rtol=5e-3)
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(layer.get_base_layer()(x), x @ layer.get_base_weight().T, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_the_delta_and_nothing_of_the_base(kind, adapted):
    model, layer = adapted(kind)
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.state_dict()
    changed = [
        name
        for name, value in before.items()
        if not (
            torch.equal(value.qdata, after[name].qdata) and torch.equal(value.scale, after[name].scale)
            if hasattr(value, "qdata")
            else torch.equal(value, after[name])
        )
    ]
    assert changed == ["base_model.model.model.layers.1.mlp.down_proj.locft_delta.default.weight"]
    assert layer.locft_delta["default"].weight.dtype is torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_reloaded_adapter_gives_the_same_logits_without_a_warning(kind, adapted, load, tmp_path, recwarn):
    model, layer = adapted(kind)
    delta = layer.locft_delta["default"].weight.detach().clone()
    model.save_pretrained(tmp_path / "adapter")
    recwarn.clear()
    with torch.no_grad():
        expected = model(IDS).logits
        reloaded = PeftModel.from_pretrained(load(kind), tmp_path / "adapter").eval()
        assert torch.equal(reloaded(IDS).logits, expected)
    (again,) = [module for module in reloaded.modules() if isinstance(module, LocFTLinear)]
    assert torch.equal(again.locft_delta["default"].weight, delta)
    with torch.no_grad():
        used = load(kind)
        used(IDS)  # after which bitsandbytes keeps the numbers in another order
    PeftModel.from_pretrained(used, tmp_path / "adapter")
    assert [str(warning.message) for warning in recwarn if "was trained on" in str(warning.message)] == []


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_the_logits_and_unmerging_restores_the_weight_bit_for_bit(kind, used_before, adapted):
    model, layer = adapted(kind)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = twin(IDS).logits
        with twin.disable_adapter():
            moved = (twin(IDS).logits - expected).norm()
        if used_before:
            model(IDS)
        before, readable = raw(layer), layer.get_base_weight().clone()
        model.merge_adapter(safe_merge=True)
        assert not same(raw(layer), before)
        merged = model(IDS).logits
        assert 0 < (merged - expected).norm() < MERGE_ERROR[kind] * moved
        wanted = readable.float() + layer.locft_delta["default"].weight
        error = (layer.get_base_weight().float() - wanted).norm() / wanted.norm()
        assert error < (0.02 if "int8" in kind or "8bit" in kind else 0.15)
        model.unmerge_adapter()
        assert same(raw(layer), before) and torch.equal(layer.get_base_weight(), readable)
        assert torch.equal(model(IDS).logits, expected)
        again = merged.clone()
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, again, atol=0.05 * again.abs().max().item(), rtol=0)


def test_a_weight_that_was_merged_and_unmerged_is_not_quantised_a_second_time(adapted):
    _, layer = adapted("bnb fp4")
    before = raw(layer)
    layer.merge()
    layer.unmerge()
    weight = layer.get_base_layer().weight
    assert weight.bnb_quantized and layer.get_base_layer().quant_state is weight.quant_state
    layer.get_base_layer().to("cpu")  # moving to a device is what quantises
    assert same(raw(layer), before)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_returns_the_quantised_model_with_the_delta_in_it(kind, adapted):
    model, layer = adapted(kind)
    with torch.no_grad():
        expected = model(IDS).logits
        with model.disable_adapter():
            moved = (model(IDS).logits - expected).norm()
        model.merge_adapter()
        merged = model(IDS).logits
        # What is merged already is neither merged nor refused again.
        with pytest.warns(UserWarning, match="^All adapters are already merged, nothing to do.$"):
            unloaded = model.merge_and_unload(safe_merge=True)
        assert type(unloaded.model.layers[1].mlp.down_proj) is type(layer.get_base_layer())
        assert torch.equal(unloaded(IDS).logits, merged)
        assert (merged - expected).norm() < MERGE_ERROR[kind] * moved


@pytest.mark.parametrize("kind", KINDS)
def test_merge_report_counts_quantisation_and_changes_nothing(kind, adapted):
    model, layer = adapted(kind)
    before, delta = raw(layer), layer.locft_delta["default"].weight.detach()
    report = merge_report(model)
    assert same(raw(layer), before) and not layer.merged
    original = layer.get_base_weight().float()
    layer.merge()
    difference = layer.get_base_weight().float() - original
    layer.unmerge()
    (cost,) = report.values()
    assert list(report) == ["model.layers.1.mlp.down_proj.weight"]
    assert cost.kept == pytest.approx(1 - ((difference - delta).norm() / delta.norm()).item() ** 2, rel=1e-4)
    assert cost.kept < 1 and cost.unchanged == pytest.approx((difference == 0).float().mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_merge_into_quantised_weights_is_refused_and_changes_nothing(kind, adapted):
    model, layer = adapted(kind)
    model.add_adapter("other", LocFTConfig(layers=[1], init_weights=False))
    model.merge_adapter()
    before = raw(layer)
    with pytest.raises(TypeError) as raised:
        model.merge_adapter(["other"])
    assert str(raised.value) == (
        "adapters ['default'] are merged into quantised weights: unmerge them, and merge all adapters at once"
    )
    assert same(raw(layer), before) and layer.merged_adapters == ["default"]


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_refusal_in_the_last_layer_leaves_all_layers_alone(method, safe_merge, make_model):
    model = get_peft_model(make_model(), LocFTConfig(init_weights=False))
    layers = [module for module in model.modules() if isinstance(module, LocFTLinear)]
    layers[-1].quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    before = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    with pytest.raises(TypeError) as raised:
        getattr(model, method)(safe_merge=safe_merge)
    assert str(raised.value) == (
        "the base layer is a quantised Linear, expected floating-point weights: load the base model without "
        "quantisation to merge, or leave the adapter unmerged"
    )
    assert all(torch.equal(layer.get_base_layer().weight, weight) for layer, weight in zip(layers, before))
    assert not any(layer.merged for layer in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_a_model_that_was_used_before(kind, load):
    """On a CPU with AVX512-BF16, bitsandbytes stores 4 bits for use in a way that knows no gradients."""
    model = load(kind)

    def gradient() -> torch.Tensor:
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.logsumexp(-1).sum().backward()
        return embedded.grad

    expected = gradient()
    with torch.no_grad():
        model(IDS)
    keep_in_order(model)
    with torch.no_grad():
        model(IDS)
    found = gradient()
    assert expected.norm() > 0.1
    # The other order rounds the scales, so that not all is as it was.
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_edited_by_careful_and_searched(kind, load, tokenizer, edits, tmp_path, recwarn):
    settings = {"report_to": "none", "prefix_cache_memory": 0, "disable_tqdm": True, **KEPT}
    args = EditConfig(str(tmp_path / "run"), recipe="careful", num_train_epochs=13, **settings)
    model = load(kind)
    with torch.no_grad():
        model(IDS)
    trainer = EditTrainer(model, args, edits, processing_class=tokenizer, peft_config=LocFTConfig(layers=[1]))
    trainer.train()
    if kind != "bnb 8bit":  # which rounds an edit by what stands beside it
        assert not [str(one.message) for one in recwarn if "prefix cache is off" in str(one.message)]
    (delta,) = (layer.locft_delta for layer in trainer.model.modules() if isinstance(layer, LocFTLinear))
    assert delta["default"].weight.norm() > 0
    args = EditConfig(str(tmp_path / "searched"), num_train_epochs=1, **settings)
    options = {"layers": [1], "groups": ["down"], "rungs": 1, "output_dir": tmp_path / "places"}
    assert len(search_locations(load(kind), edits, tokenizer=tokenizer, args=args, **options).rows) == 1


def test_a_model_quantised_with_torchao_by_hand_refuses_merging_and_still_runs(make_model):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = make_model()
    quantize_(base.model, Int8WeightOnlyConfig())
    model = get_peft_model(base, LocFTConfig(layers=[1], init_weights=False)).eval()
    (layer,) = [module for module in model.modules() if isinstance(module, LocFTLinear)]
    before, expected = raw(layer), model(IDS).logits
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge, lambda: merge_report(model)):
        with pytest.raises(TypeError) as raised:
            merge()
        assert str(raised.value) == BY_HAND
        assert same(raw(layer), before) and not layer.merged
        assert torch.equal(model(IDS).logits, expected)
