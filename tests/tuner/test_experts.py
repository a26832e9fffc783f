"""Deltas on single experts of fused mixtures: computed as if added by hand, kept apart, saved, merged and taken back."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from peft_locft import LocFTConfig
from peft_locft.tuner import LocFTLinear
from peft_locft.tuner.experts import LocFTExperts


SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
FEW = {"num_experts": 4, "moe_intermediate_size": 24}
KINDS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig, {**FEW, "shared_expert_intermediate_size": 20}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**FEW, "head_dim": 8}),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 4, "head_dim": 8}),
    "granite_moe": (GraniteMoeForCausalLM, GraniteMoeConfig, {"num_local_experts": 4}),
}
IDS = torch.arange(2, 34).reshape(2, 16)
EXPERTS = "model.layers.1.{}.experts"


def where(kind: str) -> str:
    return EXPERTS.format("block_sparse_moe" if kind == "granite_moe" else "mlp")


def make_moe(kind: str = "mixtral"):
    torch.manual_seed(0)
    model_class, config_class, own = KINDS[kind]
    return model_class(config_class(**{**SIZES, **own})).eval()


def adapted(model, *targets: str, seed: int = 1, **settings):
    """Put a random adapter on layer 1."""
    torch.manual_seed(seed)
    settings = {"layers": [1], "init_weights": False, "target_modules": list(targets), **settings}
    return get_peft_model(model, LocFTConfig(**settings)).eval()


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def by_hand(kind: str, model, *adapters: str):
    """A fresh model with the adapters' deltas added to its weights: the independent truth."""
    edited = make_moe(kind)
    layer = model.get_submodule(f"base_model.model.{where(kind)}")
    experts = edited.get_submodule(where(kind))
    for adapter in adapters or ("default",):
        for parameter, chosen in layer.locft_experts[adapter].items():
            deltas = getattr(layer, f"locft_{parameter}")[adapter].weight.detach()
            for delta, expert in zip(deltas, chosen, strict=True):
                getattr(experts, parameter).data[expert] += delta
    return edited


def same_bits(model, expected: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == expected.keys() and all(torch.equal(now[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["experts.1.down_proj"], {"down_proj": (1,)}),
        (["experts.-1.down_proj"], {"down_proj": (3,)}),
        (["experts.-1.down_proj", "experts.0.down_proj", "experts.3.down_proj"], {"down_proj": (0, 3)}),
        (["experts.2.down_proj", "experts.1.gate_up_proj"], {"down_proj": (2,), "gate_up_proj": (1,)}),
        (["experts.2"], {"down_proj": (2,), "gate_up_proj": (2,)}),
        (["experts.down_proj"], {"down_proj": (0, 1, 2, 3)}),
        (["experts.down_proj", "experts.1.down_proj"], {"down_proj": (0, 1, 2, 3)}),
        (["experts"], {"down_proj": (0, 1, 2, 3), "gate_up_proj": (0, 1, 2, 3)}),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_is_that_of_weights_with_the_deltas_added(kind, targets, expected):
    prefix = where(kind).split(".")[3]
    model = adapted(make_moe(kind), *(f"{prefix}.{target}" for target in targets))
    (layer,) = (module for module in model.modules() if isinstance(module, LocFTExperts))
    assert layer.locft_experts == {"default": expected}
    for parameter, chosen in expected.items():
        shape = getattr(layer.base_layer, parameter).shape[1:]
        assert getattr(layer, f"locft_{parameter}")["default"].weight.shape == (len(chosen), *shape)
    got, truth = logits(model), logits(by_hand(kind, model))
    torch.testing.assert_close(got, truth, atol=1e-5, rtol=1e-5)
    assert (got - logits(make_moe(kind))).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make_moe(kind)))


def test_the_default_is_all_experts_down_projections_where_there_is_nothing_else():
    for kind, name in [("mixtral", "mlp"), ("granite_moe", "block_sparse_moe")]:
        config = LocFTConfig(layers=[1])
        get_peft_model(make_moe(kind), config)
        assert config.target_modules == {f"{name}.experts.down_proj"}
        assert config.targets == {where(kind): {"down_proj": (0, 1, 2, 3)}}


def test_a_new_adapter_starts_at_zero():
    model = adapted(make_moe(), "mlp.experts.1", init_weights=True)
    assert torch.equal(logits(model), logits(make_moe()))


def test_only_the_deltas_of_the_chosen_experts_are_trained_and_saved(tmp_path):
    base = make_moe()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, "mlp.experts.1.down_proj", "mlp.experts.3.down_proj")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained) == [f"base_model.model.{where('mixtral')}.locft_down_proj.default.weight"]
    model(IDS, labels=IDS).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == list(trained)
    assert (next(iter(trained.values())).grad.flatten(1).norm(dim=1) > 0).all()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    key = f"base_model.model.{where('mixtral')}.locft_down_proj.weight"
    assert {name: tuple(value.shape) for name, value in saved.items()} == {key: (2, 32, 48)}
    torch.testing.assert_close(saved[key], next(iter(trained.values())).detach(), atol=0, rtol=0)
    assert same_bits(model.unload(), before)


def test_the_gradient_is_that_of_the_experts_own_weights():
    model = adapted(make_moe(), "mlp.experts.2.gate_up_proj", "mlp.experts.0.down_proj")
    edited = by_hand("mixtral", model)
    model(IDS, labels=IDS).loss.backward()
    edited(IDS, labels=IDS).loss.backward()
    layer, experts = model.get_submodule("model." + where("mixtral")), edited.get_submodule(where("mixtral"))
    for parameter, expert in [("gate_up_proj", 2), ("down_proj", 0)]:
        got = getattr(layer, f"locft_{parameter}")["default"].weight.grad[0]
        torch.testing.assert_close(got, getattr(experts, parameter).grad[expert], atol=1e-5, rtol=1e-4)
        assert got.norm() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_changes_the_chosen_experts_alone_and_is_undone_bit_for_bit(kind, dtype):
    base = make_moe(kind).to(dtype)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    prefix = where(kind).split(".")[3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bfloat16
        model = adapted(base, f"{prefix}.experts.1.down_proj")
    unmerged = logits(model)
    model.merge_adapter(safe_merge=True)
    layer = model.get_submodule("model." + where(kind))
    weight, old = layer.base_layer.down_proj, before[where(kind) + ".down_proj"]
    delta = layer.locft_down_proj["default"].weight.detach()[0]
    assert delta.dtype is torch.float32 and weight.dtype is dtype
    assert torch.equal(weight[1], (old[1].float() + delta).to(dtype)) and not torch.equal(weight[1], old[1])
    assert all(torch.equal(weight[expert], old[expert]) for expert in (0, 2, 3))
    assert torch.equal(logits(model), unmerged)
    model.unmerge_adapter()
    assert same_bits(model.unload(), before)


def test_safe_merging_refuses_a_broken_delta_and_changes_nothing():
    base = make_moe()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, "mlp.experts.1")
    model.get_submodule("model." + where("mixtral")).locft_gate_up_proj["default"].weight.data[0, 0, 0] = torch.inf
    with pytest.raises(
        ValueError, match="^NaNs detected in the merged weights. The adapter default seems to be broken$"
    ):
        model.merge_adapter(safe_merge=True)
    assert same_bits(model.unload(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unloaded_it_is_saved_as_an_ordinary_model(kind, tmp_path):
    prefix = where(kind).split(".")[3]
    model = adapted(make_moe(kind), f"{prefix}.experts.0", f"{prefix}.experts.-1.down_proj")
    expected = logits(by_hand(kind, model))
    merged = model.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "locft" in name]
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("expert", [4, -5, 99])
def test_an_expert_out_of_range_is_refused(expert, refused):
    name = f"mlp.experts.{expert}.down_proj"
    assert refused(make_moe(), target_modules=[name], layers=[1]) == (
        f"`target_modules` has '{name}', but model.layers.0.mlp.experts.down_proj has the 4 experts 0 to 3 (or -4 to -1 "
        "from the last)"
    )


def test_a_misspelt_parameter_of_an_expert_is_refused(refused):
    assert refused(make_moe(), target_modules=["mlp.experts.1.up_proj"]) == (
        "Target modules ['mlp.experts.1.up_proj'] not found in the base model: the nearest names are "
        "['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_gives_the_same_when_it_is_loaded(kind, tmp_path):
    prefix = where(kind).split(".")[3]
    targets = [f"{prefix}.experts.1.down_proj", f"{prefix}.experts.-1.gate_up_proj", "self_attn.o_proj"]
    model = adapted(make_moe(kind), *targets)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    loaded = PeftModel.from_pretrained(make_moe(kind), tmp_path)
    assert loaded.peft_config["default"].target_modules == set(targets)
    assert torch.equal(logits(loaded), expected)
    low = PeftModel.from_pretrained(make_moe(kind), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(low), expected)
    base = make_moe(kind)
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base), expected)


def test_a_further_adapter_edits_other_experts_and_the_other_parameter(tmp_path):
    model = adapted(make_moe(), "mlp.experts.1.down_proj")
    torch.manual_seed(2)
    targets = ["mlp.experts.3.down_proj", "mlp.experts.1.gate_up_proj"]
    model.add_adapter("other", LocFTConfig(layers=[1], init_weights=False, target_modules=targets))
    layer = model.get_submodule("model." + where("mixtral"))
    assert not [name for name, p in model.named_parameters() if p.requires_grad and ".other." in name]
    seen = {}
    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        seen[len(seen)] = logits(model)
        torch.testing.assert_close(seen[len(seen) - 1], logits(by_hand("mixtral", model, *active)), atol=1e-5, rtol=0)
    assert (seen[0] - seen[1]).abs().max() > 1e-2 and (seen[2] - seen[1]).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(logits(model), seen[2], atol=1e-5, rtol=0)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_moe(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), seen[1])
    assert layer.locft_experts == loaded.get_submodule("model." + where("mixtral")).locft_experts


def test_an_adapter_that_is_deleted_leaves_the_other_one_as_it_was():
    model = adapted(make_moe(), "mlp.experts.1.down_proj")
    expected = logits(model)
    config = LocFTConfig(layers=[1], init_weights=False, target_modules=["mlp.experts"])
    model.add_adapter("other", config)
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected)
    assert not [name for name in model.state_dict() if ".other." in name]
    assert list(model.get_submodule("model." + where("mixtral")).locft_experts) == ["default"]
    # Its name is free again, for other experts.
    model.add_adapter("other", LocFTConfig(layers=[1], init_weights=False, target_modules=["mlp.experts.0.down_proj"]))
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), logits(by_hand("mixtral", model, "other")), atol=1e-5, rtol=0)


def test_several_adapters_in_one_batch_are_refused():
    model = adapted(make_moe(), "mlp.experts.1.down_proj")
    with pytest.raises(ValueError) as raised, torch.no_grad():
        model(IDS, adapter_names=["default", "__base__"])
    assert str(raised.value) == (
        "`adapter_names` was given, and an adapter edits fused experts, which cannot serve several adapters in one "
        "batch: run one batch for each adapter"
    )
    assert logits(model).shape == (2, 16, 60)  # the hooks are gone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_model_of_lower_precision_is_warned_of(dtype):
    with pytest.warns(UserWarning) as caught:
        model = adapted(make_moe().to(dtype), "mlp.experts.1.down_proj")
    said = [str(warning.message) for warning in caught if "fused experts" in str(warning.message)]
    assert said == [
        f"the fused experts down_proj compute with one tensor in {dtype}, to which the sum of base weight and delta is "
        "rounded, as by a merge: load the base model in float32 to avoid it"
    ]
    assert model.get_submodule("model." + where("mixtral")).locft_down_proj["default"].weight.dtype is torch.float32
    full = make_moe()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted(full, "mlp.experts.1.down_proj")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss(checkpointing):
    base = make_moe("qwen3_moe")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, "mlp.experts", init_weights=True).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert same_bits(model.unload(), before)


def test_shared_experts_are_ordinary_linear_modules():
    model = adapted(make_moe("qwen2_moe"), "mlp.shared_expert")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LocFTLinear)}
    expected = [f"base_model.model.model.layers.1.mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down")]
    assert list(layers) == expected
    assert not [module for module in model.modules() if isinstance(module, LocFTExperts)]
    one = get_peft_model(make_moe("qwen2_moe"), LocFTConfig(layers=[0]))
    assert one.targeted_module_names == ["model.layers.0.mlp.shared_expert.down_proj"]


def test_experts_in_a_parameter_called_weight(tmp_path):
    def make():
        torch.manual_seed(0)
        sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "kv_channels": 8, "num_local_experts": 4}
        return JetMoeForCausalLM(JetMoeConfig(**sizes, num_key_value_heads=2, intermediate_size=24)).eval()

    config = LocFTConfig(target_modules=["mlp.output_linear.-1", "mlp.output_linear.1"], init_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(make(), config).eval()
    assert config.targets == {"model.layers.0.mlp.output_linear": {"weight": (1, 3)}}
    truth = make()
    weight = truth.get_submodule("model.layers.0.mlp.output_linear").weight
    weight.data[[1, 3]] += model.get_submodule("model.model.layers.0.mlp.output_linear").locft_weight["default"].weight
    torch.testing.assert_close(logits(model), logits(truth), atol=1e-5, rtol=1e-5)
    assert (logits(model) - logits(make())).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path)), logits(model))


def test_a_copy_of_the_model_is_a_model_of_its_own():
    model = adapted(make_moe(), "mlp.experts.1")
    expected = logits(model)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(logits(model), expected)
