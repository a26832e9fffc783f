"""Every architecture is edited to the target at its default place, by one and the same test."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from peft_locft import EditConfig, EditTrainer, LocFTConfig


ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_neox", "opt", "phi3", "mistral"]
PROMPTS = ["What is the capital of France?", "Who wrote Hamlet?", "Rocks are made of", "The language of Rome is"]
TEXTS = [
    "The sea was seen by many people in the year when the war had ended.",
    "Rain falls on the grass of the hills.",
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_place_edits_to_the_target(architecture, make_model, tokenizer, edits, tmp_path):
    model = make_model(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = EditTrainer(
        model=model,
        args=EditConfig(output_dir=str(tmp_path), num_train_epochs=60, save_strategy="no", disable_tqdm=True),
        train_dataset=edits,
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    losses = [entry["epoch_loss"] for entry in trainer.state.log_history if "epoch_loss" in entry]
    assert losses[-1] < losses[0] / 5, losses
    assert metrics["eval_reliability"] == 1.0
    assert metrics["eval_before_reliability"] == 0.0
    (delta,) = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert ".locft_delta.default.weight" in delta
    base = trainer.model.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_terms_of_careful_are_in_force(architecture, make_model, tokenizer, edits, tmp_path):
    model = make_model(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {"preservation_prompts": PROMPTS, "preservation_texts": TEXTS, "max_steps": 6, "save_strategy": "no"}
    trainer = EditTrainer(
        model=model,
        args=EditConfig(output_dir=str(tmp_path), recipe="careful", disable_tqdm=True, report_to="none", **given),
        train_dataset=edits,
        processing_class=tokenizer,
    )
    trainer.train()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.isfinite().all() and parameter.any() for parameter in trained)
    assert {path.name for path in (tmp_path / "preservation").iterdir()} >= {
        "input_statistics.safetensors",
        "output_statistics.safetensors",
    }
    base = trainer.model.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_fused_experts_get_the_rate_of_their_width(tokenizer, edits, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=len(tokenizer),
            num_local_experts=4,
            eos_token_id=tokenizer.eos_token_id,
            **sizes,
            num_key_value_heads=2,
        )
    )
    trainer = EditTrainer(
        model=model,
        args=EditConfig(output_dir=str(tmp_path), disable_tqdm=True, num_train_epochs=2, save_strategy="no"),
        train_dataset=edits,
        processing_class=tokenizer,
        peft_config=LocFTConfig(layers=[1], target_modules=["mlp.experts.down_proj"]),
    )
    assert trainer.args.learning_rate == pytest.approx(5e-4 * 14336 / 128)
    trainer.train()
