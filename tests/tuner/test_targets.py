"""Which modules a config means: the right ones, or an error that names the nearest; never fewer in silence."""

import pytest
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import AutoModel, Gemma3Config

from peft_locft import LocFTConfig
from peft_locft.tuner import num_layers


LINEAR = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEAR += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "lm_head"]


@pytest.mark.parametrize(
    ("given", "layers"), [([-1], [2]), ([-3, -1], [0, 2]), (-2, [1]), ([2, 0], [0, 2]), ([2, -1, 2], [2])]
)
def test_negative_layers_count_from_the_last(given, layers, make_model, adapt):
    names, config = adapt(make_model(), layers=given, target_modules=["mlp.down_proj"])
    assert names == [f"model.layers.{layer}.mlp.down_proj" for layer in layers]
    assert config.layers == config.layers_to_transform == layers
    assert config.layers_pattern is None


def test_layers_are_counted_as_the_config_of_the_model_says(make_model, adapt):
    # Not as the longest list is: here an encoder of images has more layers.
    model = make_model()
    model.vision = nn.Module()
    model.vision.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(2, 2)}) for _ in range(5))
    assert adapt(model, layers=[-1])[1].layers == [2]


@pytest.mark.parametrize(
    ("given", "missing", "nearest"),
    [([3], [3], [2]), ([-4], [-4], [0]), ([1, 99], [99], [2]), ([0, 99, -7], [99, -7], [0, 2])],
)
def test_a_layer_out_of_range_is_refused(given, missing, nearest, refused):
    # PEFT itself would drop it in silence where another layer matches.
    assert refused(layers=given) == (
        f"layers {missing} are not in the model, which has the 3 layers 0 to 2 (or -3 to -1 from the last): the "
        f"nearest are {nearest}"
    )


def test_layers_of_a_model_without_a_config_are_counted(uneven, adapt):
    names, config = adapt(uneven, layers=[-1], target_modules=["mlp.down_proj"])
    assert (names, config.layers) == (["model.layers.2.mlp.down_proj"], [2])


def test_layers_of_a_model_without_layers_are_refused(build, refused):
    assert refused(build("first", "second"), layers=[0], target_modules=["first"]) == (
        "`layers` is [0], but Module has no numbered layers: leave `layers` out, or name their list in `layers_pattern`"
    )


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("wrong", ["mlp.down_prj", "mlp.dwon_proj"])
def test_a_misspelt_module_is_told_the_nearest(layers, wrong, refused):
    said = refused(layers=layers, target_modules=["mlp.up_proj", wrong])
    assert said == (
        f"Target modules ['{wrong}'] not found in the base model: the nearest names are ['mlp.down_proj', "
        "'mlp.up_proj', 'mlp.gate_proj']"
    )


def test_a_module_that_is_like_none_is_told_all(refused):
    assert refused(target_modules=["xyz"]) == (
        f"Target modules ['xyz'] not found in the base model: the nearest names are {LINEAR}"
    )


def test_a_list_of_many_names_is_cut(build, refused):
    model = build(*(f"model.layers.0.part{i}" for i in range(15)))
    assert refused(model, target_modules=["xyz"]) == (
        f"Target modules ['xyz'] not found in the base model: the nearest names are "
        f"{[f'part{i}' for i in range(12)]} and 3 more"
    )


def test_an_expression_chooses_by_whole_name(make_model, adapt):
    names, _ = adapt(make_model(), target_modules=r".*\.[02]\.mlp\.(up|down)_proj")
    assert names == [f"model.layers.{layer}.mlp.{module}" for layer in (0, 2) for module in ("up_proj", "down_proj")]


def test_an_expression_that_matches_nothing_is_refused(refused):
    assert refused(target_modules="mlp.down_proj") == (
        "Target modules ['mlp.down_proj'] not found in the base model (a string is a regular expression over whole "
        "names): the nearest names are ['mlp.down_proj', 'mlp.up_proj', 'mlp.gate_proj']"
    )


def test_a_full_name_is_taken_in_its_own_layer(make_model, adapt):
    names, _ = adapt(make_model(), layers=[-2], target_modules=["model.layers.1.mlp.up_proj"])
    assert names == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj", "lm_head"])
def test_a_full_name_outside_of_the_layers_is_refused(name, refused):
    # PEFT itself would edit it and ignore the layers.
    assert refused(layers=[0, 2], target_modules=[name]) == (
        f"`target_modules` has '{name}', which is a module outside of `layers` [0, 2]: give the end of its name to "
        "choose by layer, or leave `layers` out"
    )


def test_a_full_name_in_one_of_two_layers_is_refused(refused):
    assert refused(layers=[0, 1], target_modules=["model.layers.1.mlp.up_proj"]) == (
        "layers [0] have no module 'model.layers.1.mlp.up_proj', which is in the layers [1]; their modules are "
        f"{LINEAR[:-1]}"
    )


def test_a_module_that_one_of_the_layers_does_not_have_is_refused(uneven, refused):
    assert refused(uneven, layers=[0, 1], target_modules=["mlp.down_proj"]) == (
        "layers [1] have no module 'mlp.down_proj', which is in the layers [0, 2]; their modules are ['moe.router']"
    )


def test_a_module_of_another_part_of_the_model_is_refused(build, refused):
    model = build("model.layers.0.up", "model.head.down")
    assert refused(model, layers=[0], target_modules=["down"]) == (
        "layers [0] have no module 'down', which is outside of the layers: leave `layers` out; their modules are ['up']"
    )


def test_excluded_modules_are_left_out_of_some_of_the_layers(make_model, adapt):
    settings = {"target_modules": ["down_proj", "up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]}
    names, _ = adapt(make_model(), layers=[0, 1], **settings)
    expected = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert names == expected
    names, _ = adapt(make_model(), layers=[0], target_modules=["up_proj"], exclude_modules=["layers.2.mlp.up_proj"])
    assert names == ["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize(("architecture", "name"), [("llama", "layers.1.mlp.down_proj"), ("gpt2", "h.1.mlp.c_proj")])
def test_layers_of_a_bare_decoder_are_found(architecture, name, make_model, adapt, tmp_path):
    # Its names begin with the list of layers, which PEFT finds only by `layers_pattern`.
    bare = AutoModel.from_config(make_model(architecture).config)
    names, config = adapt(bare, layers=[1])
    assert (names, config.layers_pattern) == ([name], [name.split(".")[0]])
    bare.peft_config["default"].save_pretrained(tmp_path)
    names, config = adapt(
        AutoModel.from_config(make_model(architecture).config),
        **LocFTConfig.from_pretrained(tmp_path).to_dict(),
    )
    assert names == [name]


def test_layers_are_counted_in_the_list_that_the_pattern_names(build, adapt):
    # Without the pattern, the first number counts, which is the tower's.
    model = build(*(f"towers.{tower}.layers.{layer}.mlp.down_proj" for tower in (0, 1) for layer in range(4)))
    names, config = adapt(model, layers=[-2], layers_pattern="layers")
    assert names == ["towers.0.layers.2.mlp.down_proj", "towers.1.layers.2.mlp.down_proj"]
    assert (config.layers, config.target_modules) == ([2], {"mlp.down_proj"})


def test_all_linear_takes_every_linear_module_but_the_head(make_model, adapt):
    model = make_model()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert len(linear) == 3 * 7
    assert adapt(model, target_modules="all-linear")[0] == linear


def test_the_dummy_of_peft_targets_nothing(make_model, adapt):
    assert adapt(make_model(), target_modules=DUMMY_TARGET_MODULES)[0] == []


def test_number_of_layers_is_that_of_the_text_model(make_model):
    config = Gemma3Config(text_config={"num_hidden_layers": 5}, vision_config={"num_hidden_layers": 7})
    assert num_layers(config) == 5
    assert num_layers(make_model("gpt2").config) == 3
    assert num_layers(None) is num_layers({"num_hidden_layers": 3}) is None


def test_a_misspelt_excluded_module_is_refused(refused):
    assert refused(target_modules=["mlp"], exclude_modules=["mlp.up_proj", "mlp.down_prj"]) == (
        "`exclude_modules` ['mlp.down_prj'] not found in the base model: the nearest names are ['mlp.down_proj', "
        "'mlp.up_proj', 'mlp.gate_proj']"
    )
