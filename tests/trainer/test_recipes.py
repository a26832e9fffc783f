"""The recipes: where they train, and how."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, MixtralConfig

from peft_locft import Edit, EditConfig, EditSet, EditTrainer, LocFTConfig
from peft_locft.trainer import recipes
from peft_locft.trainer.recipes import RECIPES, TERMS, careful_layers, recipe_config


SMALL = {
    **{"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
}


@pytest.mark.parametrize("recipe", ["paper", "careful", "locaedit"])
def test_recipes_choose_place_and_terms(make_trainer, make_model, tokenizer, edits, tmp_path, recipe):
    args = EditConfig(output_dir=str(tmp_path / "run"), recipe=recipe, disable_tqdm=True, report_to="none")
    trainer = EditTrainer(make_model(), args, edits, processing_class=tokenizer)
    config = trainer.model.active_peft_config
    if recipe == "locaedit":
        assert isinstance(config, LoraConfig) and config.layers_to_transform
        assert (args.kl_weight, args.contexts) == (RECIPES[recipe]["kl_weight"], 0)
    else:
        assert isinstance(config, LocFTConfig)
        assert {name: getattr(args, name) for name in TERMS[:5]} == {name: RECIPES[recipe][name] for name in TERMS[:5]}
        assert config.reason
    if recipe == "paper":
        assert config.layers == LocFTConfig.recommended(make_model()).layers


def test_a_field_of_the_users_wins_over_the_recipe(tmp_path):
    args = EditConfig(output_dir=str(tmp_path), recipe="careful", kl_weight=0.0, num_train_epochs=3)
    assert (args.kl_weight, args.num_train_epochs, args.contexts) == (0.0, 3, RECIPES["careful"]["contexts"])


@pytest.mark.parametrize(
    ("settings", "num_edits", "epochs"),
    [
        ({"recipe": "careful", "subject_focus": 0.0}, 8, 60),  # in steps of 2
        ({"recipe": "careful", "subject_focus": 0.0}, 5, 80),
        ({"recipe": "careful", "subject_focus": 0.0}, 1, 240),
        ({"recipe": "careful", "subject_focus": 0.0, "per_device_train_batch_size": 8}, 8, 240),
        ({"recipe": "careful"}, 8, 90),  # beginnings of sentences
        ({"recipe": "careful", "subject_focus": 0.5}, 5, 100),
        ({"recipe": "careful", "num_train_epochs": 60}, 5, 60),
        ({"recipe": "careful", "num_train_epochs": 3}, 5, 3),
        ({}, 5, 25),
    ],
)
def test_careful_takes_steps_enough_for_few_edits(make_model, tokenizer, edits, tmp_path, settings, num_edits, epochs):
    args = EditConfig(output_dir=str(tmp_path / "run"), report_to="none", **settings)
    assert (
        EditTrainer(make_model(), args, edits[:num_edits], processing_class=tokenizer).args.num_train_epochs == epochs
    )
    later = EditConfig(output_dir=str(tmp_path / "run"), report_to="none", **settings)
    later.num_train_epochs = 4
    assert EditTrainer(make_model(), later, edits[:num_edits], processing_class=tokenizer).args.num_train_epochs == 4


@pytest.mark.parametrize(
    ("settings", "num_edits", "epochs", "weight"),
    [
        ({"recipe": "careful", "subject_focus": 0.0}, 300, 60, 0.5),
        ({"recipe": "careful", "subject_focus": 0.0}, 1200, 120, 0.5 * 2.3),
        ({"recipe": "careful"}, 1200, 180, 0.5 * 2.3),  # beginnings of sentences
        ({"recipe": "careful", "kl_weight": 0.5, "num_train_epochs": 60}, 1200, 60, 0.5),
        ({"recipe": "locaedit"}, 1200, 25, 1.0),
        ({}, 1200, 25, 0.0),
    ],
)
def test_careful_takes_many_edits_slowly(make_model, tokenizer, tmp_path, settings, num_edits, epochs, weight):
    many = EditSet(Edit(f"The number {number} is", "odd", subject=f"number {number}") for number in range(num_edits))
    args = EditConfig(output_dir=str(tmp_path), report_to="none", **settings)
    place = LocFTConfig(layers=[1])
    for _ in range(2):  # the caller's settings are not changed by it, so that they serve again
        trainer = EditTrainer(make_model(), args, many, processing_class=tokenizer, peft_config=place)
        assert (trainer.args.num_train_epochs, trainer.args.kl_weight) == (epochs, pytest.approx(weight))


@pytest.mark.parametrize(
    ("recipe", "num_edits", "decay"), [("careful", 300, 8), ("careful", 1200, 16), ("paper", 1200, 0)]
)
def test_many_edits_decay_more(recipe, num_edits, decay):
    assert recipes.automatic_decay(recipe, num_edits, rate=1e-3, steps=400) == decay


def test_an_unknown_recipe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`recipe` is 'bold', expected one of 'paper', 'careful', 'locaedit'"):
        EditConfig(output_dir=str(tmp_path), recipe="bold")


def test_the_careful_band_is_early_and_never_empty():
    assert careful_layers(30) == [3, 4, 5, 6, 7]
    for count in range(1, 100):
        layers = careful_layers(count)
        assert layers and 0 <= layers[0] and layers[-1] < max(count, 1)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "careful",
            "give `projector=0`, `output_projector=0` and `subject_focus=0`, or a place among linear modules, such as attention's",
        ),
        ("locaedit", "take another recipe, or in Python a `peft_config`"),
    ],
)
def test_fused_experts_are_told_by_the_recipe(tokenizer, edits, recipe, message):
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL))
    with pytest.raises(
        ValueError, match=f"the recipe '{recipe}' puts .* which are mlp.experts.down_proj in this .*{message}"
    ):
        recipe_config(recipe, model, tokenizer, edits, True, False)
    if recipe == "careful":
        assert recipe_config(recipe, model).target_modules == {"mlp.experts.down_proj"}


def test_locaedit_leaves_other_towers_alone(tokenizer, monkeypatch):
    text = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text | {"head_dim": 16}, vision_config=vision)
    model = Gemma3ForConditionalGeneration(config)
    for layer in model.model.vision_tower.encoder.layers:
        layer.mlp.down_proj = torch.nn.Linear(48, 32)  # called as in the text model, as Qwen2.5-VL's are
    monkeypatch.setattr(recipes, "trace_edits", lambda *args, **settings: None)
    monkeypatch.setattr(recipes, "layers_from_tracing", lambda results: [1])
    lora = recipe_config("locaedit", model, tokenizer, EditSet([Edit("Peru is in", "Asia", subject="Peru")]))
    adapted = {
        name
        for name, module in get_peft_model(model, lora).base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert adapted == {"model.language_model.layers.1.mlp.down_proj"}


def test_locaedit_needs_subjects(make_model, tokenizer):
    edits = EditSet([Edit("One is", "two"), Edit("Three is", "four")])
    with pytest.raises(ValueError, match="got 2 edits without a `subject` that stands in the prompt, expected"):
        recipe_config("locaedit", make_model(), tokenizer, edits)


def test_locaedit_traces_those_whose_subject_is_in_the_prompt(make_model, tokenizer, edits, monkeypatch):
    traced = []
    monkeypatch.setattr(recipes, "trace_edits", lambda model, tokenizer, facts, **kw: traced.extend(facts) or facts)
    monkeypatch.setattr(recipes, "layers_from_tracing", lambda results: [1])
    others = [Edit(f"Number {number} is", "odd", subject="It") for number in range(60)]
    recipe_config("locaedit", make_model(), tokenizer, EditSet([*others, *edits]))
    assert [edit.prompt for edit in traced] == [edit.prompt for edit in edits]
