"""Which places a model has, and what they are called."""

import pytest
from peft import get_peft_model

from peft_locft.search import GROUPS, find_places
from peft_locft.search.places import _BESIDE
from peft_locft.tuner.targets import DOWN_PROJECTIONS


UP = {
    "llama": "mlp.up_proj",
    "gemma3": "mlp.up_proj",
    "gpt2": "mlp.c_fc",
    "gpt_neox": "mlp.dense_h_to_4h",
    "opt": "fc1",
    "phi3": "mlp.gate_up_proj",
}


@pytest.mark.parametrize("architecture", UP)
def test_every_layer_times_every_group(architecture, make_model):
    model = make_model(architecture)
    places = find_places(model)
    assert [(place.layer, place.group) for place in places] == [(layer, g) for layer in range(3) for g in GROUPS]
    up = next(place for place in places if place.group == "up")
    assert up.module == UP[architecture]
    (name,) = get_peft_model(model, up.config).targeted_module_names
    assert name.endswith(f".0.{UP[architecture]}")


def test_every_known_down_projection_has_a_name_beside_it():
    assert all(name.rpartition(".")[2] in _BESIDE for name in DOWN_PROJECTIONS)


def test_a_subset(make_model):
    places = find_places(make_model(), [-1, 0, 2], ["down", "up", "down"])
    assert [tuple(place) for place in places] == [
        (layer, group, f"mlp.{group}_proj") for layer in (0, 2) for group in ("down", "up")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": ["down", "sideways"]}, "`groups` is ['down', 'sideways'], expected some of ['layer', 'attention'"),
        ({"groups": []}, "`groups` is [], expected some of"),
        ({"layers": [1, 3]}, "layers [3] are not in the model"),
    ],
)
def test_what_is_refused(options, message, make_model):
    with pytest.raises(ValueError) as raised:
        find_places(make_model(), **options)
    assert message in str(raised.value)


def test_a_layer_without_a_group_is_left_out_unless_it_was_asked_for(make_model):
    model = make_model()
    del model.model.layers[1].mlp.up_proj
    assert [(place.layer, place.group) for place in find_places(model, groups=["up"])] == [(0, "up"), (2, "up")]
    with pytest.raises(ValueError) as raised:
        find_places(model, [1], ["up"])
    assert str(raised.value) == (
        "layer 1 of LlamaForCausalLM has no up projection of a known name: expected one of ['mlp.up_proj', "
        "'mlp.gate_up_proj'] beside its mlp.down_proj. Leave the group 'up' out"
    )
