"""The automatic rate, where the first step would be too much for the model."""

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F

from peft_locft import EditConfig, LocFTConfig
from peft_locft.trainer import rate, recipes


BARE = {"contexts": 0, "kl_weight": 0.0, "projector": 0.0, "subject_focus": 0.0}
KEPT = {"preservation_prompts": ["What is the river of Spain?"], "preservation_texts": ["Peru is a country."]}


def trained_of(trainer):
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def gain_by_hand(trainer, edits, tokenizer):
    """The L1 norm of the mean loss's gradient, a weight, on one edit after the other."""
    model, trained = trainer.model, trained_of(trainer)
    sums = [torch.zeros_like(parameter) for parameter in trained]
    for edit in edits:
        prompt = tokenizer(edit.prompt)["input_ids"]
        target = [*tokenizer(f"{edit.prompt} {edit.target}")["input_ids"][len(prompt) :], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        loss = F.cross_entropy(logits, torch.tensor(target)) / len(edits)
        for some, gradient in zip(sums, torch.autograd.grad(loss, trained)):
            some += gradient
    return sum(some.abs().sum().item() for some in sums) / len(sums)


@pytest.mark.parametrize("layers", [[1], [0, 1]])
def test_a_first_step_may_do_so_much_a_weight(make_trainer, edits, tokenizer, monkeypatch, layers):
    trainer = make_trainer(LocFTConfig(layers=layers), num_train_epochs=1)
    by_width, gain = trainer.args.learning_rate, gain_by_hand(trainer, edits, tokenizer)
    assert by_width == pytest.approx(5e-4 * 14336 / 128)
    gain /= (25 / len(edits)) ** 0.5  # what so few may have more than 25
    monkeypatch.setattr(rate, "_MOST_GAIN", 1.01 * by_width * gain)
    trainer.train()
    assert trainer.args.learning_rate == by_width
    monkeypatch.setattr(rate, "_MOST_GAIN", 0.1 * by_width * gain)
    trainer = make_trainer(LocFTConfig(layers=layers), num_train_epochs=2, output="other")
    trainer.train()
    assert trainer.args.learning_rate == pytest.approx(0.1 * by_width, rel=0.05)  # of two digits
    found = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert found and set(found) == {trainer.args.learning_rate}
    lowered = trainer.args.learning_rate
    trainer.args.num_train_epochs = 3
    trainer.train()  # on: what is trained already has another gradient
    assert trainer.args.learning_rate == lowered


def test_few_edits_have_a_lower_rate_and_are_allowed_more_gain(make_trainer, edits, tokenizer, monkeypatch):
    settings = {"recipe": "careful", **BARE}
    trainer = make_trainer(LocFTConfig(layers=[1]), num_train_epochs=1, **settings)
    by_number, gain = trainer.args.learning_rate, gain_by_hand(trainer, edits, tokenizer)
    assert by_number == pytest.approx(0.85 * (8 / 25) ** (1 / 3) * 5e-4 * 14336 / 128)
    gain /= (25 / len(edits)) ** 0.5
    for allowed in (1.01, 0.5):
        monkeypatch.setattr(rate, "_MOST_GAIN", allowed * by_number * gain / 0.85)
        trainer = make_trainer(LocFTConfig(layers=[1]), num_train_epochs=1, output=f"run{allowed}", **settings)
        trainer.train()
        assert trainer.args.learning_rate == pytest.approx(min(allowed, 1) * by_number, rel=0.05)


def test_the_recipes_factor_is_beside_it(make_trainer, monkeypatch):
    monkeypatch.setattr(rate, "_MOST_GAIN_PROJECTED", 0.05)
    monkeypatch.setattr(recipes, "_FOCUSED_RATE", 1.4)
    rates = []
    for focus in (0.0, 1.0):
        trainer = make_trainer(
            LocFTConfig(layers=[1]),
            recipe="careful",
            subject_focus=focus,
            contexts=0,
            kl_weight=0.0,
            output=f"run{focus}",
            **KEPT,
        )
        by_width = trainer.args.learning_rate
        trainer.train()
        assert trainer.args.learning_rate < by_width
        rates.append(trainer.args.learning_rate)
    assert rates[1] == pytest.approx(1.4 * rates[0], rel=0.1)  # the edits are beginnings of sentences


def test_what_the_user_says_and_other_adapters_rates_stay(make_trainer, monkeypatch):
    monkeypatch.setattr(rate, "_MOST_GAIN", 1e-6)
    for config, settings, expected in (
        (LocFTConfig(layers=[1]), {"learning_rate": 0.02}, 0.02),
        (LoraConfig(target_modules=["down_proj"]), {}, 2e-3),
    ):
        trainer = make_trainer(config, output=str(expected), **settings)
        trainer.train()
        assert trainer.args.learning_rate == expected


def test_a_run_that_is_resumed_has_the_rate_that_it_had(make_trainer, monkeypatch):
    monkeypatch.setattr(rate, "_MOST_GAIN", 0.5)
    settings = {"save_strategy": "epoch", "stop_loss": 0}
    straight = make_trainer(output="straight", num_train_epochs=4, **settings)
    straight.train()
    make_trainer(num_train_epochs=2, **settings).train()
    resumed = make_trainer(num_train_epochs=4, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.args.learning_rate == straight.args.learning_rate
    assert straight.args.learning_rate < 0.05 < 5e-4 * 14336 / 128
    assert all(torch.equal(*pair) for pair in zip(trained_of(straight), trained_of(resumed), strict=True))


def decays_of(trainer):
    return {group["weight_decay"] for group in trainer.optimizer.param_groups if group["params"]}


@pytest.mark.parametrize(
    ("settings", "steps"), [({"num_train_epochs": 2}, 8), ({"max_steps": 5}, 5), ({"learning_rate": 0.02}, 16)]
)
def test_careful_decays_as_much_in_every_run(make_trainer, settings, steps):
    trainer = make_trainer(LocFTConfig(layers=[1]), recipe="careful", **BARE, **settings)
    trainer.train()  # 8 edits in steps of 2
    decay = trainer.args.weight_decay
    assert decay == pytest.approx(3.2 / (trainer.args.learning_rate * steps), rel=5e-3)
    assert decays_of(trainer) == {decay}
    trainer.evaluate()
    assert trainer.results.settings["weight_decay"] == decay


@pytest.mark.parametrize(
    ("config", "settings", "decay"),
    [
        (LocFTConfig(layers=[1]), {"recipe": "careful", "weight_decay": 0.5}, 0.5),
        (LocFTConfig(layers=[1]), {"recipe": "careful", "weight_decay": 0.0}, 0.0),
        (LoraConfig(target_modules=["down_proj"]), {"recipe": "careful"}, 0.0),
        (LocFTConfig(layers=[1]), {}, 0.0),
    ],
)
def test_the_users_decay_wins_and_a_lora_has_none(make_trainer, config, settings, decay):
    trainer = make_trainer(config, num_train_epochs=1, **BARE, **settings)
    trainer.train()
    assert (trainer.args.weight_decay, decays_of(trainer)) == (decay, {decay})
    trainer.evaluate()
    assert trainer.results.settings.get("weight_decay", 0.0) == decay


def test_a_run_that_is_resumed_decays_as_it_did(make_trainer, tmp_path):
    settings = {"recipe": "careful", "save_strategy": "epoch", "save_total_limit": None, "stop_loss": 0, **BARE}
    straight = make_trainer(LocFTConfig(layers=[1]), output="straight", **settings)
    straight.train()
    resumed = make_trainer(LocFTConfig(layers=[1]), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight/checkpoint-8"))
    assert resumed.args.weight_decay == straight.args.weight_decay > 0
    assert all(torch.equal(*pair) for pair in zip(trained_of(straight), trained_of(resumed), strict=True))


def test_a_decay_under_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`weight_decay` is -0.1, expected 0 \(off\) or more"):
        EditConfig(output_dir=str(tmp_path), weight_decay=-0.1)
