"""Deltas on embeddings, scaled, tied to the head, or with a padding row: one of the two is edited, and all is undone."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig
from peft_locft.tuner.embedding import LocFTEmbedding


IDS = torch.tensor([[5, 9, 9, 3], [7, 5, 1, 2]])
NAMES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}


def adapted(model, *targets: str, seed: int = 1, **settings):
    torch.manual_seed(seed)
    settings = {"target_modules": list(targets), "init_weights": False, **settings}
    return get_peft_model(model, LocFTConfig(**settings)).eval()


def logits(model, ids=IDS, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids, **kwargs).logits


def embedding(model) -> LocFTEmbedding:
    (layer,) = (module for module in model.modules() if isinstance(module, LocFTEmbedding))
    return layer


def bits(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("architecture", "scale"), [("llama", 1.0), ("gemma3", 64**0.5), ("gpt2", 1.0)])
def test_the_row_of_each_token_gets_its_delta_scaled_as_the_model_scales(architecture, scale, make_model):
    base = make_model(architecture)
    target = "wte" if architecture == "gpt2" else "embed_tokens"
    weight = base.get_input_embeddings().weight.detach().clone()
    model = adapted(base, target)
    layer = embedding(model)
    delta = layer.locft_delta["default"].weight.detach()
    assert delta.shape == weight.shape and delta.std() > 0.5
    with torch.no_grad():
        torch.testing.assert_close(layer(IDS), (weight + delta)[IDS] * scale, atol=1e-5, rtol=1e-5)
        model.merge_adapter(safe_merge=True)
        assert torch.equal(layer.base_layer.weight, weight + delta)
        torch.testing.assert_close(layer(IDS), (weight + delta)[IDS] * scale, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, weight)


def test_the_scale_is_rounded_as_the_model_rounds_it(make_model):
    # Gemma's own code rounds the root of its width to the weights' dtype: 6.9282 is 6.9375 in bfloat16.
    base = make_model("gemma3", hidden_size=48).to(torch.bfloat16)
    weight = base.get_input_embeddings().weight.detach().clone()
    base.get_input_embeddings().embed_scale = torch.tensor(48**0.5)
    layer = embedding(adapted(base, "embed_tokens"))
    delta = layer.locft_delta["default"].weight.detach()
    with torch.no_grad():
        assert layer.contribution("default", IDS).dtype is torch.float32
        torch.testing.assert_close(layer.contribution("default", IDS), delta[IDS] * 6.9375, atol=1e-6, rtol=1e-6)
        expected = (weight[IDS] * torch.tensor(6.9375, dtype=torch.bfloat16)).float() + delta[IDS] * 6.9375
        assert torch.equal(layer(IDS), expected.to(torch.bfloat16))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt"])
def test_merged_equals_unmerged_and_starts_at_zero(architecture, make_model):
    target = "wte" if architecture == "gpt2" else "embed_tokens"
    before = logits(make_model(architecture))
    assert torch.equal(logits(adapted(make_model(architecture), target, init_weights=True)), before)
    model = adapted(make_model(architecture), target)
    expected = logits(model)
    assert (expected - before).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


def test_only_the_rows_of_tokens_that_occur_are_trained(make_model):
    model = adapted(make_model(), "embed_tokens", init_weights=True)
    model(IDS, labels=IDS).loss.backward()
    grad = embedding(model).locft_delta["default"].weight.grad
    used = (grad != 0).any(dim=1).nonzero().flatten().tolist()
    assert used == [1, 5, 7, 9]  # the last token of a row predicts nothing
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "base_model.model.model.embed_tokens.locft_delta.default.weight"
    ]


@pytest.mark.parametrize("target", NAMES)
def test_of_two_tied_weights_the_other_one_stays(target, make_model):
    base = make_model(tie_word_embeddings=True)
    before, tied = bits(base), base.lm_head.weight
    assert tied is base.model.embed_tokens.weight
    # The independent truth: a model that is not tied, of which one weight has the delta.
    truth = make_model(tie_word_embeddings=False)
    truth.load_state_dict(before)
    model = adapted(base, target)
    delta = model.get_submodule(f"model.{NAMES[target]}").locft_delta["default"].weight.detach()
    truth.get_submodule(NAMES[target]).weight.data += delta
    expected = logits(truth)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(make_model(tie_word_embeddings=True))).abs().max() > 1e-2
    model.merge_adapter(safe_merge=True)
    (other,) = set(NAMES.values()) - {NAMES[target]}
    assert model.get_submodule(f"model.{other}").weight is tied and torch.equal(tied, before["lm_head.weight"])
    assert torch.equal(model.get_submodule(f"model.{NAMES[target]}").weight, tied + delta)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    unloaded = model.unload()
    assert unloaded.lm_head.weight is unloaded.model.embed_tokens.weight is tied
    assert same(bits(unloaded), before) and unloaded.config.tie_word_embeddings is True


def test_adapters_on_both_of_two_tied_weights_are_kept_apart(make_model):
    base = make_model(tie_word_embeddings=True)
    before, tied = bits(base), base.lm_head.weight
    model = adapted(base, *NAMES)
    expected = logits(model)
    deltas = {name: model.get_submodule(f"model.{name}").locft_delta["default"].weight for name in NAMES.values()}
    assert not torch.equal(*deltas.values())
    model.merge_adapter()
    for name, delta in deltas.items():
        assert torch.equal(model.get_submodule(f"model.{name}").weight, tied + delta)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    unloaded = model.unload()
    assert unloaded.lm_head.weight is unloaded.model.embed_tokens.weight is tied and same(bits(unloaded), before)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_tied_model_that_is_merged_and_saved_is_the_same_when_it_is_loaded(
    architecture, target, make_model, tmp_path
):
    model = adapted(make_model(architecture, tie_word_embeddings=True), target)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(merged))
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("is_merged", [False, True])
def test_a_saved_adapter_gives_the_same_when_it_is_loaded(is_merged, target, tied, make_model, tmp_path):
    model = adapted(make_model(tie_word_embeddings=tied), target)
    expected = logits(model)
    if is_merged:
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(tie_word_embeddings=tied), tmp_path)), expected)
    base = make_model(tie_word_embeddings=tied)
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base), expected)


def test_the_delta_alone_is_saved_where_it_is_asked_for(make_model, tmp_path):
    model = adapted(make_model(), "embed_tokens")
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert list(saved) == ["base_model.model.model.embed_tokens.locft_delta.weight"]
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(), tmp_path)), logits(model))


def test_the_row_of_the_padding_token_is_not_trained():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(6, 4, padding_idx=2))
    model = get_peft_model(base, LocFTConfig(target_modules=["0"], init_weights=False))
    layer = embedding(model)
    delta = layer.locft_delta["default"]
    assert delta.padding_idx == 2 and torch.equal(delta.weight[2], torch.zeros(4)) and (delta.weight[3] != 0).all()
    model(torch.tensor([2, 3, 2])).sum().backward()
    assert torch.equal(delta.weight.grad[2], torch.zeros(4)) and torch.equal(delta.weight.grad[3], torch.ones(4))
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight[2], torch.zeros(4)) and layer.base_layer.padding_idx == 2


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_each_row_of_a_batch_has_its_own_adapter(architecture, make_model):
    model = adapted(make_model(architecture), "embed_tokens")
    torch.manual_seed(2)
    model.add_adapter("other", LocFTConfig(target_modules=["embed_tokens", "lm_head"], init_weights=False))
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    for names in (["other", "default"], ["__base__", "other"], ["default", "default"]):
        mixed = logits(model, adapter_names=names)
        expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
        torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)
    assert all((alone[a] - alone[b]).abs().max() > 1e-2 for a, b in [("default", "other"), ("default", "__base__")])


def test_a_mixed_batch_is_refused_where_names_and_rows_do_not_fit_or_an_adapter_is_merged(make_model):
    model = adapted(make_model(), "embed_tokens")
    with pytest.raises(ValueError) as raised:
        logits(model, adapter_names=["default"])
    assert str(raised.value) == (
        "Length of `adapter_names` should be the same as the number of inputs, but got 1 and 2 respectively."
    )
    model.merge_adapter()
    with pytest.raises(ValueError) as raised:
        logits(model, adapter_names=["default", "__base__"])
    assert str(raised.value) == (
        "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
    )


def test_training_an_embedding_lowers_the_loss_and_leaves_the_tied_head(make_model):
    base = make_model(tie_word_embeddings=True)
    before = bits(base)
    model = adapted(base, "embed_tokens", init_weights=True).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert same(bits(model.unload()), before)
