"""The recommended place, against places written out by hand: from the paper's tables, and by counting layers."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Lfm2Config,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    ViTConfig,
)

from peft_locft import EditConfig, EditTrainer, LocFTConfig
from peft_locft.search.places import find_places
from peft_locft.trainer.rate import automatic_learning_rate


# The last projection of the MLP, read off each architecture's source.
DOWN_PROJECTIONS = {
    "llama": "mlp.down_proj",
    "qwen2": "mlp.down_proj",
    "qwen3": "mlp.down_proj",
    "gemma3": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "phi3": "mlp.down_proj",
    "mistral": "mlp.down_proj",
}
RULE = (
    ": the down projection of a late layer, because the paper's search found that generalization peaks early (layers 3 "
    "to 8 of 32) and late (20 to 25 of 32), and that the down projections of late layers leave the general capability of "
    "a model as it was"
)


def sizes(layers, hidden, vocab, inner=None):
    # As many heads as there are 128 dimensions, or 64 in the smallest.
    heads = hidden // 64 if hidden < 3584 else hidden // 128
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner or 4 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 2 if heads % 2 == 0 else 1,
        "vocab_size": vocab,
    }


# From the models' own files.
CONFIGS = {
    "Llama-3-8B": LlamaConfig(**sizes(32, 4096, 128256, 14336)),
    "Llama-3-70B": LlamaConfig(**sizes(80, 8192, 128256, 28672)),
    "Llama-3.1-405B": LlamaConfig(**sizes(126, 16384, 128256, 53248)),
    "Llama-3.2-1B": LlamaConfig(**sizes(16, 2048, 128256, 8192)),
    "Llama-2-7B": LlamaConfig(**sizes(32, 4096, 32000, 11008)),
    "SmolLM2-135M": LlamaConfig(**sizes(30, 576, 49152, 1536)),
    "Mistral-7B-v0.1": MistralConfig(**sizes(32, 4096, 32000, 14336)),
    "with two added tokens": MistralConfig(**sizes(32, 4096, 32002, 14336)),
    "Mistral-7B-v0.3": MistralConfig(**sizes(32, 4096, 32768, 14336)),
    "Mistral-Nemo": MistralConfig(**sizes(40, 5120, 131072, 14336)),
    "Qwen2.5-7B": Qwen2Config(**sizes(28, 3584, 152064, 18944)),
    "Qwen2.5-14B": Qwen2Config(**sizes(48, 5120, 152064, 13824)),
    "Qwen2.5-32B": Qwen2Config(**sizes(64, 5120, 152064, 27648)),
    "Qwen2.5-72B": Qwen2Config(**sizes(80, 8192, 152064, 29568)),
    "Qwen2.5-0.5B": Qwen2Config(**sizes(24, 896, 151936, 4864)),
    "Qwen2.5-1.5B": Qwen2Config(**sizes(28, 1536, 151936, 8960)),
    "Qwen2.5-3B": Qwen2Config(**sizes(36, 2048, 151936, 11008)),
    "Qwen1.5-7B": Qwen2Config(**sizes(32, 4096, 151936, 11008)),
    "Qwen1.5-MoE-A2.7B": Qwen2MoeConfig(**sizes(24, 2048, 151936, 5632)),
    "Qwen2-57B-A14B": Qwen2MoeConfig(**sizes(28, 3584, 151936, 18944)),
}


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        # The paper's.
        ("Llama-3-8B", 22, "mlp.down_proj"),
        ("Mistral-7B-v0.1", 23, "layer"),
        ("Qwen2.5-7B", 6, "mlp.down_proj"),
        ("Qwen1.5-MoE-A2.7B", 20, "mlp.shared_expert.down_proj"),
        ("with two added tokens", 23, "layer"),
        # Larger members, at the same depth: the 23rd of 32, the 7th of 28 and the 21st of 24.
        ("Llama-3-70B", 57, "mlp.down_proj"),
        ("Llama-3.1-405B", 90, "mlp.down_proj"),
        ("Qwen2.5-14B", 11, "mlp.down_proj"),
        ("Qwen2.5-32B", 15, "mlp.down_proj"),
        ("Qwen2.5-72B", 19, "mlp.down_proj"),
        ("Qwen2-57B-A14B", 23, "mlp.shared_expert.down_proj"),
        # Smaller ones and others: the 23rd of 32.
        ("Llama-3.2-1B", 11, "mlp.down_proj"),
        ("Qwen2.5-0.5B", 16, "mlp.down_proj"),
        ("Qwen2.5-1.5B", 19, "mlp.down_proj"),
        ("Qwen2.5-3B", 25, "mlp.down_proj"),
        ("Llama-2-7B", 22, "mlp.down_proj"),
        ("SmolLM2-135M", 21, "mlp.down_proj"),
        ("Mistral-7B-v0.3", 22, "mlp.down_proj"),
        ("Mistral-Nemo", 28, "mlp.down_proj"),
        ("Qwen1.5-7B", 22, "mlp.down_proj"),
    ],
)
def test_the_place_of_real_models_from_their_configs_alone(name, layer, module):
    config = CONFIGS[name]
    before = copy.deepcopy(config.to_dict())
    expected = LocFTConfig(layers=[layer], target_modules=[module], task_type="CAUSAL_LM")
    assert LocFTConfig.recommended(config) == expected
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "Mistral-7B-v0.1",
            "the config has the shape of Mistral-7B-v0.1 (mistral, 32 layers, hidden size 4096), for which the paper found "
            "layer 23, the entire layer",
        ),
        (
            "Qwen2.5-72B",
            "the config has the shape of a larger member of the family of Qwen2.5-7B (qwen2, 80 layers, hidden size 8192): the "
            "layer at the depth of the paper's layer 6 of 28, the MLP's down projection",
        ),
        (
            "Qwen2.5-0.5B",
            "the config has the shape of a smaller member of the family of Qwen2.5-7B (qwen2, 24 layers, hidden size 896), and "
            f"the paper measured larger ones only{RULE}",
        ),
        (
            "SmolLM2-135M",
            "the paper names no place for a model of this type and size (llama, 30 layers, hidden size 576)" + RULE,
        ),
    ],
)
def test_the_reason_is_told(name, reason):
    assert LocFTConfig.recommended(CONFIGS[name]).reason == reason


def test_no_name_is_looked_at():
    config = Qwen2Config(**sizes(8, 256, 1000))
    config._name_or_path = "Qwen/Qwen2.5-7B"
    assert LocFTConfig.recommended(config).layers == [5]


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("Llama-3-8B", {"model.layers.22.mlp.down_proj"}),
        (
            "Mistral-7B-v0.1",
            {f"model.layers.23.self_attn.{part}_proj" for part in "qkvo"}
            | {f"model.layers.23.mlp.{part}_proj" for part in ("gate", "up", "down")},
        ),
        ("Qwen2.5-7B", {"model.layers.6.mlp.down_proj"}),
        ("Qwen1.5-MoE-A2.7B", {"model.layers.20.mlp.shared_expert.down_proj"}),
    ],
)
def test_the_papers_places_are_in_the_models(name, modules):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
        place = LocFTConfig.recommended(model)
        assert place == LocFTConfig.recommended(CONFIGS[name])
        assert set(get_peft_model(model, place).targeted_module_names) == modules


def test_the_text_model_of_several_towers_is_meant():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    gemma = Gemma3Config(text_config=sizes(12, 128, 1000), vision_config=vision, mm_tokens_per_image=4)
    llava = LlavaConfig(
        text_config=CONFIGS["Mistral-7B-v0.1"], vision_config=vision | {"model_type": "clip_vision_model"}
    )
    assert LocFTConfig.recommended(gemma).layers == [8]
    assert LocFTConfig.recommended(gemma).target_modules == {"mlp.down_proj"}
    assert LocFTConfig.recommended(llava).layers == [23]
    assert LocFTConfig.recommended(llava).target_modules == {"layer"}
    for config, layer, count in ((gemma, 8, 1), (llava, 23, 7)):
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
            names = get_peft_model(model, LocFTConfig.recommended(model)).targeted_module_names
        assert len(names) == count
        assert all(name.startswith(f"model.language_model.layers.{layer}.") for name in names)


def test_a_config_that_only_a_model_of_images_and_text_has_is_enough():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"}
    llava = LlavaConfig(text_config=LlamaConfig(**sizes(16, 128, 1000)), vision_config=vision)
    assert LocFTConfig.recommended(llava).layers == [11]
    assert LocFTConfig.recommended(llava).target_modules == {"mlp.down_proj"}


@pytest.mark.parametrize(("architecture", "module"), DOWN_PROJECTIONS.items())
def test_every_architecture_has_a_place(architecture, module, make_model):
    model = make_model(architecture)
    # 23/32 of 3 layers is 2.2: the second layer, counted from 0 it is 1.
    expected = LocFTConfig(layers=[1], target_modules=[module], task_type="CAUSAL_LM")
    assert LocFTConfig.recommended(model) == LocFTConfig.recommended(model.config) == expected
    (name,) = get_peft_model(model, LocFTConfig.recommended(model)).targeted_module_names
    assert name.endswith(f".1.{module}")


def test_a_hybrid_model_has_a_place():
    config = Lfm2Config(
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 50},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"] * 2},
    )
    assert LocFTConfig.recommended(config).target_modules == {"feed_forward.w2"}
    places = find_places(AutoModelForCausalLM.from_config(config), groups=["up", "down"])
    assert {place.module for place in places} == {"feed_forward.w2", "feed_forward.w3"}


# Llama-3-8B has 32 layers, of which the paper edits layer 22; the others are at the same depth, rounded.
@pytest.mark.parametrize(("layers", "place"), [(1, 0), (2, 0), (3, 1), (4, 2), (12, 8), (30, 21), (32, 22)])
def test_the_late_layer_is_at_the_depth_of_the_papers(layers, place, make_model):
    model = make_model(num_hidden_layers=layers, hidden_size=8, intermediate_size=8, head_dim=2)
    assert LocFTConfig.recommended(model).layers == [place]


@pytest.mark.parametrize("first", [LocFTConfig(layers=[1]), LoraConfig(target_modules=["down_proj"], r=2)])
def test_a_model_that_has_an_adapter_already_has_the_same_place(first, make_model):
    assert LocFTConfig.recommended(get_peft_model(make_model(), first)) == LocFTConfig.recommended(make_model())


def test_the_reason_belongs_to_the_object_and_not_to_the_file(make_model, tmp_path):
    config = LocFTConfig.recommended(make_model())
    assert LocFTConfig(layers=[1]).reason is None
    assert copy.deepcopy(config).reason == config.reason
    with pytest.raises(AttributeError):
        config.reason = "because"
    assert not any("reason" in name for name in config.to_dict())
    config.save_pretrained(tmp_path)
    assert LocFTConfig.from_pretrained(tmp_path).reason is None


def test_it_is_the_trainers_default(make_model, tokenizer, edits, tmp_path):
    model = make_model()
    expected = LocFTConfig.recommended(model)
    trainer = EditTrainer(
        model=model, args=EditConfig(output_dir=str(tmp_path)), train_dataset=edits, processing_class=tokenizer
    )
    config = trainer.model.active_peft_config
    assert (config.layers, config.target_modules, config.reason) == (
        expected.layers,
        expected.target_modules,
        expected.reason,
    )


@pytest.mark.parametrize(
    ("name", "config", "rate"),
    [
        # The paper's, of its appendix on hyperparameters.
        ("Llama-3-8B", None, 5e-4),
        ("Mistral-7B-v0.1", None, 5e-5),
        ("with two added tokens", None, 5e-5),
        ("Qwen2.5-7B", None, 5e-4),
        # By the width of the modules' inputs.
        ("Mistral-7B-v0.1", LocFTConfig(layers=[23], target_modules=["mlp.down_proj"]), 5e-4),
        ("Qwen2.5-7B", LocFTConfig(layers=[7], target_modules=["mlp.down_proj"]), 5e-4 * 14336 / 18944),
        ("Qwen2.5-14B", None, 5e-4 * 14336 / 13824),
        ("Mistral-7B-v0.3", None, 5e-4),
        ("Qwen2.5-0.5B", None, 5e-4 * 14336 / 4864),
    ],
)
def test_the_papers_rate_at_its_places(name, config, rate):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.bfloat16)
    model = get_peft_model(model, copy.deepcopy(config) or LocFTConfig.recommended(CONFIGS[name]))
    assert automatic_learning_rate(model, 1.0) == pytest.approx(rate)
    assert automatic_learning_rate(model, 0.5) == pytest.approx(rate / 2)


@pytest.mark.parametrize("config", [None, {"num_hidden_layers": 3}])
def test_a_model_that_does_not_tell_its_number_of_layers_is_refused(config):
    model = nn.Sequential(nn.Linear(2, 2))
    if config is not None:
        model.config = config
    with pytest.raises(ValueError) as raised:
        LocFTConfig.recommended(model)
    assert str(raised.value) == (
        "the config of Sequential has no `num_hidden_layers`, so no place is known for it: give "
        "`LocFTConfig(layers=[...], target_modules=[...])`"
    )


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError) as raised:
        LocFTConfig.recommended("Qwen/Qwen2.5-7B")
    assert str(raised.value) == (
        "`model` is a str, expected a model or its config, as `AutoConfig.from_pretrained(name)` loads it"
    )


def test_a_config_of_no_language_model_is_refused():
    with pytest.raises(ValueError) as raised:
        LocFTConfig.recommended(ViTConfig())
    assert str(raised.value) == (
        "the config is of the type 'vit', for which transformers has no model that continues text: load the model and "
        "give it instead, or give `LocFTConfig(layers=[...], target_modules=[...])`"
    )


def test_a_model_without_a_known_projection_is_refused(make_model):
    model = make_model()
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(ValueError) as raised:
        LocFTConfig.recommended(model)
    assert str(raised.value) == (
        "Please specify `target_modules` in `peft_config`: LlamaForCausalLM has no down projection of a known name in "
        "layers [1]. Its linear modules are ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', "
        "'self_attn.o_proj', 'lm_head']"
    )
