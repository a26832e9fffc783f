"""Groups, parts, exclusions and towers: which modules an entry of `target_modules` means, and that it keeps meaning it."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

from peft_locft import LocFTConfig


QKVO = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
# (where the layers are, the linear modules of attention, those of the MLP)
GROUPS = {
    "llama": ("model.layers", QKVO, GATED),
    "qwen2": ("model.layers", QKVO, GATED),
    "qwen3": ("model.layers", QKVO, GATED),
    "gemma3": ("model.layers", QKVO, GATED),
    "mistral": ("model.layers", QKVO, GATED),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"]),
    "gpt_neox": (
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense"],
        ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    "opt": ("model.decoder.layers", [*QKVO[:3], "self_attn.out_proj"], ["fc1", "fc2"]),
    "phi3": ("model.layers", ["self_attn.qkv_proj", "self_attn.o_proj"], ["mlp.gate_up_proj", "mlp.down_proj"]),
}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
LANGUAGE = [f"model.language_model.layers.{layer}.{end}" for layer in range(2) for end in [*QKVO, *GATED]]


def llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**VISION, projection_dim=16)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT)))


def gemma3():
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**VISION, vision_use_head=False)
    config = Gemma3Config(text_config=Gemma3TextConfig(**TEXT, head_dim=8), vision_config=vision.to_dict())
    return Gemma3ForConditionalGeneration(config)


def qwen2_vl():
    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 3, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


TOWERS = {"llava": llava, "gemma3": gemma3, "qwen2_vl": qwen2_vl}


def mixtral(**changes):
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4, **changes))


def qwen2_moe():
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**TEXT, **experts))


@pytest.fixture(params=TOWERS)
def towers(request):
    return TOWERS[request.param]()


@pytest.fixture
def reloaded(tmp_path):
    """Put a saved and loaded config into a model; return what it means there."""

    def reloaded(config, model):
        config.save_pretrained(tmp_path)
        loaded = LocFTConfig.from_pretrained(tmp_path)
        get_peft_model(model, loaded)
        return loaded

    return reloaded


@pytest.mark.parametrize("layers", [None, [1], [0, -1]])
@pytest.mark.parametrize("group", ["attention", "mlp", "layer"])
@pytest.mark.parametrize("architecture", GROUPS)
def test_a_group_is_all_its_linear_modules_in_the_layers(architecture, group, layers, make_model, adapt):
    where, attention, mlp = GROUPS[architecture]
    ends = {"attention": attention, "mlp": mlp, "layer": attention + mlp}[group]
    numbers = {None: [0, 1, 2], (1,): [1], (0, -1): [0, 2]}[layers and tuple(layers)]
    names, config = adapt(make_model(architecture), target_modules=[group], layers=layers)
    assert sorted(names) == sorted(f"{where}.{number}.{end}" for number in numbers for end in ends)
    assert config.target_modules == {group}


def test_the_mlp_of_a_mixture_is_its_experts_and_not_its_router(adapt):
    model = qwen2_moe()
    shared = [f"model.layers.1.mlp.shared_expert.{end}" for end in ("gate_proj", "up_proj", "down_proj")]
    assert isinstance(model.get_submodule("model.layers.1.mlp.shared_expert_gate"), nn.Linear)
    names, config = adapt(model, target_modules=["mlp"], layers=[1])
    assert sorted(names) == ["model.layers.1.mlp.experts", *sorted(shared)]
    assert config.targets["model.layers.1.mlp.experts"] == {"gate_up_proj": (0, 1, 2, 3), "down_proj": (0, 1, 2, 3)}


def test_the_router_is_not_taken_whatever_its_parts_are_called(adapt):
    jetmoe = JetMoeForCausalLM(
        JetMoeConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8)
    )
    assert isinstance(jetmoe.get_submodule("model.layers.0.mlp.router.layer"), nn.Linear)
    names, _ = adapt(jetmoe, target_modules=["mlp"])
    assert sorted(names) == ["model.layers.0.mlp.input_linear", "model.layers.0.mlp.output_linear"]
    hunyuan = HunYuanMoEV1ForCausalLM(
        HunYuanMoEV1Config(**TEXT, num_experts=2, moe_topk=1, head_dim=8, pad_token_id=0)
    )
    assert isinstance(hunyuan.get_submodule("model.layers.0.mlp.gate.wg"), nn.Linear)
    assert not [name for name in adapt(hunyuan, target_modules=["layer"])[0] if "gate.wg" in name]


@pytest.mark.parametrize(
    ("part", "ends"),
    [("self_attn", QKVO), ("layers.1", [*QKVO, *GATED]), ("model.layers.1.self_attn", QKVO), ("1.mlp", GATED)],
)
def test_a_part_is_all_the_linear_modules_in_it(part, ends, make_model, adapt):
    names, _ = adapt(make_model(), target_modules=[part], layers=[1])
    assert names == [f"model.layers.1.{end}" for end in ends]


def test_a_part_holds_no_embedding_and_no_module_that_only_begins_like_it(make_model, adapt, build):
    names, _ = adapt(make_model(), target_modules=["model"])
    assert names == [f"model.layers.{layer}.{end}" for layer in range(3) for end in [*QKVO, *GATED]]
    model = build("model.layers.0.self_attn.q", "model.layers.0.self_attn_norm.q", "model.layers.0.cross_self_attn.q")
    assert adapt(model, target_modules=["self_attn"])[0] == ["model.layers.0.self_attn.q"]


def test_a_part_that_one_of_the_layers_does_not_have_is_refused(build, refused):
    model = build("model.layers.0.self_attn.q", "model.layers.1.mamba.in_proj", "model.layers.2.self_attn.q")
    assert refused(model, target_modules=["self_attn"], layers=[-1, -2]) == (
        "layers [1] have no module 'self_attn', which is in the layers [0, 2]; their modules are ['mamba.in_proj']"
    )
    assert refused(model, target_modules=["attention"], layers=[0, 1]) == (
        "layers [1] have no module 'attention', which is in the layers [0, 2]; their modules are ['mamba.in_proj']"
    )


def test_a_layer_whose_only_module_of_a_group_is_a_router_lacks_the_group(uneven, refused):
    assert refused(uneven, target_modules=["mlp"], layers=[0, 1]) == (
        "layers [1] have no module 'mlp', which is in the layers [0, 2]; their modules are ['moe.router']"
    )


def test_a_group_that_the_model_does_not_have_is_refused(build, refused):
    assert refused(build("model.layers.0.mixer.in_proj", "head"), target_modules=["mixer", "attention"]) == (
        "Target modules ['attention'] not found in the base model: the nearest names are ['mixer.in_proj', 'head']"
    )


def test_one_part_that_is_misspelt_beside_one_that_is_not_is_refused(refused):
    assert refused(target_modules=["mlp", "self_atn.q_proj"]) == (
        "Target modules ['self_atn.q_proj'] not found in the base model: the nearest names are ['self_attn.q_proj', "
        "'self_attn.v_proj', 'self_attn.o_proj']"
    )


def test_a_misspelt_module_to_save_is_refused(refused):
    assert refused(layers=[0], modules_to_save=["lm_head", "embed_tokns"]) == (
        "`modules_to_save` ['embed_tokns'] not found in the base model: the nearest names are ['model.embed_tokens']"
    )


def test_modules_to_save_are_not_edited_as_well(make_model, adapt):
    names, _ = adapt(make_model(), target_modules=["layer"], layers=[1], modules_to_save=["mlp"])
    assert names == [f"model.layers.1.{end}" for end in QKVO]


def test_a_further_adapter_does_not_edit_the_copies_that_another_one_saves(make_model):
    model = get_peft_model(make_model(), LocFTConfig(layers=[0], modules_to_save=["lm_head"]))
    config = LocFTConfig(target_modules="all-linear")
    model.add_adapter("second", config)
    assert sorted(config.targets) == sorted(f"model.layers.{i}.{end}" for i in range(3) for end in [*QKVO, *GATED])


@pytest.mark.parametrize(("saved", "target"), [("lm_head", "lm_head"), ("mlp", "down_proj")])
def test_a_copy_that_another_adapter_saves_is_no_place_for_a_delta(saved, target, make_model):
    first = LocFTConfig(target_modules=["q_proj"], modules_to_save=[saved])
    model = get_peft_model(make_model(), first)
    with pytest.raises(ValueError, match=rf"^Target modules \['{target}'\] not found in the base model: "):
        model.add_adapter("second", LocFTConfig(target_modules=[target]))


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        (["attention"], GATED),
        (["mlp", "self_attn.q_proj"], QKVO[1:]),
        (["layers.1.self_attn"], GATED),
        (r".*\.[qkvo]_proj", GATED),
        ({"up_proj", "layers.0"}, [*QKVO, GATED[0], GATED[2]]),
    ],
)
def test_what_is_excluded_is_named_in_the_same_way(excluded, left, make_model, adapt):
    names, _ = adapt(make_model(), target_modules=["layer"], layers=[1], exclude_modules=excluded)
    assert names == [f"model.layers.1.{end}" for end in left]


def test_one_expert_is_excluded(adapt):
    settings = {"target_modules": ["mlp.experts"], "layers": [0]}
    exclude = ["mlp.experts.1.down_proj", "mlp.experts.-1.gate_up_proj"]
    _, config = adapt(mixtral(), exclude_modules=exclude, **settings)
    assert config.targets == {"model.layers.0.mlp.experts": {"gate_up_proj": (0, 1, 2), "down_proj": (0, 2, 3)}}
    _, config = adapt(mixtral(), exclude_modules=["experts.down_proj"], **settings)
    assert config.targets == {"model.layers.0.mlp.experts": {"gate_up_proj": (0, 1, 2, 3)}}


def test_an_expert_that_is_excluded_and_does_not_exist_is_refused(refused):
    assert refused(mixtral(), target_modules=["mlp.experts"], exclude_modules=["mlp.experts.4.down_proj"]) == (
        "`exclude_modules` has 'mlp.experts.4.down_proj', but model.layers.0.mlp.experts.down_proj has the 4 experts 0 "
        "to 3 (or -4 to -1 from the last)"
    )


MANY = [f"model.layers.{layer}.{end}" for layer in range(3) for end in [*QKVO, *GATED]]
SAME = {
    "a group": ("llama", {"target_modules": ["attention"], "layers": [-1]}),
    "a part": ("llama", {"target_modules": ["self_attn", "1.mlp"]}),
    "an expression": ("llama", {"target_modules": r".*\.1\.mlp\..*"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "many names": ("llama", {"target_modules": MANY}),
    "many but one": ("llama", {"target_modules": MANY[:-1], "exclude_modules": ["1.mlp"]}),
    "an expert": (mixtral, {"target_modules": ["mlp.experts.-1.down_proj"], "layers": [-1]}),
    "an expression for experts": (mixtral, {"target_modules": r".*\.experts\.[02]\.down_proj"}),
    "many experts": (
        lambda: mixtral(num_experts_per_tok=1),
        {
            "target_modules": [
                f"layers.{layer}.mlp.experts.{expert}.{parameter}"
                for layer in range(2)
                for expert in range(4)
                for parameter in ("down_proj", "gate_up_proj")
            ]
            + [f"self_attn.{end}" for end in "q_proj k_proj v_proj o_proj".split()]
            + ["embed_tokens", "lm_head"]
        },
    ),
    "a tower": (llava, {"target_modules": ["vision_tower.mlp", "vision_tower.self_attn.q_proj"], "layers": [-1]}),
    "all-linear of a tower": (llava, {"target_modules": "all-linear"}),
}


@pytest.mark.parametrize("case", SAME)
def test_a_further_adapter_and_a_saved_config_mean_the_same_modules(case, make_model, reloaded):
    kind, settings = SAME[case]

    def fresh():
        return make_model(kind) if isinstance(kind, str) else kind()

    first, second = LocFTConfig(**settings), LocFTConfig(**settings)
    model = get_peft_model(fresh(), first)
    assert sum(len(parameters) for parameters in first.targets.values()) > 0
    model.add_adapter("second", second)
    assert second.targets == first.targets
    assert reloaded(first, fresh()).targets == first.targets
    assert reloaded(second, fresh()).targets == first.targets


def test_a_long_list_stays_as_it_was_given(make_model, adapt):
    # PEFT shortens lists of 20 and more to endings that are unique in the model.
    assert adapt(make_model(), target_modules=MANY)[1].target_modules == set(MANY)


@pytest.mark.parametrize("target", [["layer"], "all-linear", r".*_proj", GATED + QKVO, ["language_model"]])
def test_the_language_tower_is_meant_unless_another_is_named(target, towers, adapt):
    names, _ = adapt(towers, target_modules=target)
    assert sorted(names) == sorted(LANGUAGE)


def test_the_default_is_in_the_language_tower_and_its_layers_are_counted(towers, adapt):
    names, config = adapt(towers, layers=[-1])
    assert (names, config.layers) == (["model.language_model.layers.1.mlp.down_proj"], [1])


def test_a_layer_that_only_the_other_tower_has_is_refused(towers, refused):
    # which has three layers
    assert refused(towers, layers=[2]) == (
        "layers [2] are not in the model, which has the 2 layers 0 to 1 (or -2 to -1 from the last): the nearest are [1]"
    )


SIGHT = {"llava": "vision_tower.encoder.layers", "gemma3": "vision_tower.encoder.layers", "qwen2_vl": "visual.blocks"}


@pytest.mark.parametrize("kind", TOWERS)
def test_another_tower_is_chosen_by_its_name(kind, adapt):
    layers, tower = f"model.{SIGHT[kind]}", SIGHT[kind].split(".")[0]
    mlp = [f"{layers}.2.mlp.fc1", f"{layers}.2.mlp.fc2"]
    assert adapt(TOWERS[kind](), target_modules=[f"{tower}.mlp"], layers=[-1])[0] == mlp
    assert adapt(TOWERS[kind](), target_modules=[f"{tower}.mlp.fc2"], layers=[2])[0] == mlp[1:]
    assert adapt(TOWERS[kind](), target_modules=[f"{layers}.2.mlp.fc2"])[0] == mlp[1:]
    assert adapt(TOWERS[kind](), target_modules=[f"{layers}.2.mlp"])[0] == mlp
    assert adapt(TOWERS[kind](), target_modules=rf".*\.{tower}\..*\.2\.mlp\.fc\d")[0] == mlp
    both = adapt(TOWERS[kind](), target_modules=[f"{tower}.mlp", "mlp.down_proj"])[0]
    expected = [f"{layers}.{i}.mlp.fc{j}" for i in range(3) for j in (1, 2)]
    assert sorted(both) == sorted([*expected, *(name for name in LANGUAGE if name.endswith("down_proj"))])


def test_a_whole_tower_is_all_its_linear_modules(adapt):
    projector = ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"]
    for name in ("multi_modal_projector", "model.multi_modal_projector"):
        assert adapt(llava(), target_modules=[name])[0] == projector
    seen = adapt(llava(), target_modules=["vision_tower"])[0]
    ends = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    assert sorted(name.rpartition(".")[2] for name in seen) == sorted(3 * ends)
    assert all(name.startswith("model.vision_tower.encoder.layers.") for name in seen)


def test_a_name_that_only_another_tower_has_is_refused_with_how_to_name_it(refused):
    assert refused(llava(), target_modules=["mlp.fc1"]) == (
        "Target modules ['mlp.fc1'] are only in ['model.vision_tower'], and the language tower model.language_model is "
        "edited unless another is named: write 'vision_tower.mlp.fc1' for that one"
    )
    assert refused(qwen2_vl(), target_modules=["qkv"], layers=[0]) == (
        "Target modules ['qkv'] are only in ['model.visual'], and the language tower model.language_model is edited "
        "unless another is named: write 'visual.qkv' for that one"
    )


def test_a_layer_that_another_tower_does_not_have_is_refused(refused):
    assert refused(llava(), target_modules=["vision_tower.mlp.fc1"], layers=[-4, 1]) == (
        "layers [-4] are not in the model, which has the 3 layers 0 to 2 (or -3 to -1 from the last): the nearest are "
        "[0]"
    )


def test_a_name_that_the_chosen_tower_does_not_have_is_refused(refused):
    said = refused(llava(), target_modules=["vision_tower.mlp.down_proj"])
    assert said.startswith(
        "Target modules ['vision_tower.mlp.down_proj'] not found in the base model: the nearest names are "
    )


def test_layers_of_two_towers_at_once_are_refused(refused):
    assert refused(llava(), target_modules=["mlp.down_proj", "vision_tower.mlp.fc1"], layers=[0]) == (
        "`layers` is [0] and `target_modules` ['mlp.down_proj', 'vision_tower.mlp.fc1'] are in several towers of the "
        "model, ['model.language_model', 'model.vision_tower']: make one adapter for each tower"
    )


def test_what_is_excluded_may_be_in_another_tower(adapt):
    names, _ = adapt(llava(), target_modules=["vision_tower.mlp"], exclude_modules=["vision_tower.fc1"])
    assert names == [f"model.vision_tower.encoder.layers.{layer}.mlp.fc2" for layer in range(3)]
    # A name alone is one of the language tower, here too.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names, _ = adapt(llava(), target_modules=["vision_tower.self_attn.q_proj"], exclude_modules=["q_proj"])
    assert len(names) == 3


def test_an_adapter_in_a_tower_changes_what_is_seen_alone(adapt):
    torch.manual_seed(0)
    model = llava().eval()
    pixels, ids = torch.randn(1, 3, 16, 16), torch.arange(6)[None]
    with torch.no_grad():
        seen, said = model.model.vision_tower(pixels).last_hidden_state, model(ids).logits
        adapt(model, target_modules=["vision_tower.mlp.fc1"], layers=[-2], init_weights=False)
        assert (model.model.vision_tower(pixels).last_hidden_state - seen).abs().max() > 1e-3
        assert torch.equal(model(ids).logits, said)
