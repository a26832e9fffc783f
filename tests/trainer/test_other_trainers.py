"""LocFTConfig in other people's trainers, and other PEFT configs in ours."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft_locft import Edit, EditConfig, EditSet, EditTrainer, LocFTConfig
from peft_locft.trainer.data import tokenize_edits
from peft_locft.trainer.rate import automatic_learning_rate


def test_in_a_plain_trainer(make_model, tokenizer, edits, tmp_path):
    model = get_peft_model(make_model(), LocFTConfig(layers=[1], target_modules=["mlp.down_proj"]))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=20, learning_rate=0.05, report_to="none", disable_tqdm=True
        ),
        train_dataset=tokenize_edits(edits, tokenizer, None),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < before / 4
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_in_trls_sft_trainer(make_model, tokenizer, edits, tmp_path):
    from trl import SFTConfig, SFTTrainer

    model = make_model()
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            num_train_epochs=20,
            learning_rate=0.05,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"prompt": edit.prompt, "completion": f" {edit.target}"} for edit in edits]),
        processing_class=tokenizer,
        peft_config=LocFTConfig(layers=[1]),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 4, losses
    base = trainer.model.unload()
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in base.named_parameters())


@pytest.mark.parametrize("kind", ["lora", "several places", "peft model"])
def test_other_configs_in_the_edit_trainer(make_model, tokenizer, edits, tmp_path, kind):
    config = {
        "lora": LoraConfig(r=8, target_modules=["down_proj"]),
        "several places": LocFTConfig(layers=[0, -1], target_modules=["mlp.up_proj", "mlp.down_proj"]),
        "peft model": LocFTConfig(layers=[1]),
    }[kind]
    model = make_model()
    if kind == "peft model":
        model, config = get_peft_model(model, config), None
    trainer = EditTrainer(
        model=model,
        args=EditConfig(
            output_dir=str(tmp_path),
            num_train_epochs=60,
            learning_rate=0.02 if kind == "lora" else None,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=edits,
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    assert trainer.evaluate()["eval_reliability"] == 1.0
    trainer.save_model()
    assert {"adapter_model.safetensors", "edits.jsonl", "edit_results.json", "README.md"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_publishing_an_adapter_of_a_local_base_model_warns(model_folder, edits, tmp_path, monkeypatch):
    trainer = EditTrainer(
        str(model_folder), EditConfig(output_dir=str(tmp_path), num_train_epochs=1, disable_tqdm=True), edits
    )

    def offline(**_):
        raise OSError("no hub")

    monkeypatch.setattr("peft_locft.trainer.publishing.HfApi", offline)
    with pytest.raises(OSError, match="no hub"), pytest.warns(UserWarning, match="nobody else can load the adapter"):
        trainer.push_to_hub("me/x")


def test_automatic_rate_and_batch(make_model, tokenizer, edits, tmp_path):
    def settings(config, edits=edits, **given):
        args = EditConfig(output_dir=str(tmp_path), **given)
        trainer = EditTrainer(make_model(), args, edits, processing_class=tokenizer, peft_config=config)
        assert args.learning_rate == given.get("learning_rate"), "the caller's config was changed"
        return trainer.args

    down = LocFTConfig(layers=[1], target_modules=["mlp.down_proj"])
    both = LocFTConfig(layers=[1], target_modules=["mlp.down_proj", "mlp.up_proj"])
    assert settings(down).learning_rate == pytest.approx(5e-4 * 14336 / 128)
    assert settings(both).learning_rate == pytest.approx(5e-4 * 14336 / 128)  # the wider of 128 and 64
    assert settings(LoraConfig(target_modules=["down_proj"])).learning_rate == 2e-3
    assert settings(down, learning_rate=0.5).learning_rate == 0.5
    # Fewer than 25 edits at a rate by the cube root of their number, and what is learned at the subjects alone, at 1.1 times the rate.
    careful = 0.85 * 5e-4 * 14336 / 128
    assert settings(down, recipe="careful").learning_rate == pytest.approx(1.1 * (8 / 25) ** (1 / 3) * careful)
    off = settings(down, recipe="careful", subject_focus=0.0)
    assert off.learning_rate == pytest.approx((8 / 25) ** (1 / 3) * careful)
    one = settings(down, edits[:1], recipe="careful", subject_focus=0.0)
    assert one.learning_rate == pytest.approx(careful / 25 ** (1 / 3))
    others = [Edit("Where is Lima?", "Peru", subject="Lima"), Edit("It lies in", "Chile", subject="Quito")]
    mixed = settings(down, EditSet([*edits, *others]), recipe="careful")
    assert mixed.learning_rate == pytest.approx((1 + 0.1 * 8 / 10) * (10 / 25) ** (1 / 3) * careful)
    for count, factor in ((25, 0.85), (100, 0.85), (200, 0.85 / 2 ** (1 / 3)), (800, 0.85 / 2 * (3 / 8) ** (1 / 3))):
        many = EditSet(Edit(f"The number {number} is", "odd") for number in range(count))
        assert settings(down, many, recipe="careful").learning_rate == pytest.approx(factor * 5e-4 * 14336 / 128)
        assert settings(down, many).learning_rate == pytest.approx(5e-4 * 14336 / 128)
    assert settings(LoraConfig(target_modules=["down_proj"]), recipe="careful").learning_rate == 2e-3
    several = get_peft_model(make_model(), down)
    several.add_adapter("other", LocFTConfig(layers=[1], target_modules=["mlp.up_proj"]))
    several.set_adapter("other")
    assert automatic_learning_rate(several, 1.0) == pytest.approx(5e-4 * 14336 / 64)  # 128 is not trained now
    assert settings(down).per_device_train_batch_size == 2
    assert settings(down, per_device_train_batch_size=5).per_device_train_batch_size == 5


@pytest.mark.parametrize(
    ("num_edits", "parallel", "size", "careful"),
    [(1, 1, 2, 2), (8, 1, 2, 2), (72, 1, 18, 18), (100, 1, 25, 25), (1000, 1, 100, 25), (1000, 4, 25, 7)],
)
def test_automatic_batch_size(num_edits, parallel, size, careful):
    from peft_locft.trainer.recipes import MOST_EDITS
    from peft_locft.trainer.setup import automatic_batch_size

    assert automatic_batch_size(num_edits, parallel) == size
    assert automatic_batch_size(num_edits, parallel, MOST_EDITS["careful"]) == careful


def test_one_process_takes_one_of_several_gpus(make_model, tokenizer, edits, tmp_path):
    args = EditConfig(output_dir=str(tmp_path), report_to="none")
    args._n_gpu = 4  # as on a machine that has them
    with pytest.warns(UserWarning, match="one process has 4 GPUs, of which only the first is used: start one process"):
        trainer = EditTrainer(make_model(), args, edits[:4], processing_class=tokenizer)
    assert (trainer.args.n_gpu, trainer.args.train_batch_size, args.n_gpu) == (1, 2, 4)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_start_that_changes_the_base_model_is_refused(make_model, tokenizer, edits, tmp_path, start, wrapped):
    config = LoraConfig(target_modules=["down_proj"], init_lora_weights=start)
    model, config = (get_peft_model(make_model(), config), None) if wrapped else (make_model(), config)
    with pytest.raises(
        ValueError, match=f"`init_lora_weights` is '{start}', which changes the base model's own weights"
    ):
        EditTrainer(model, EditConfig(output_dir=str(tmp_path)), edits, processing_class=tokenizer, peft_config=config)


def test_careful_takes_smaller_batches(make_model, tokenizer, edits, tmp_path):
    def batch(recipe, **settings):
        args = EditConfig(output_dir=str(tmp_path), report_to="none", recipe=recipe, **settings)
        many = [{"prompt": f"Number {number} is", "target": "odd"} for number in range(200)]
        trainer = EditTrainer(make_model(), args, train_dataset=many, processing_class=tokenizer)
        return trainer.args.per_device_train_batch_size

    assert (batch("paper"), batch("careful")) == (50, 25)
    assert batch("careful", per_device_train_batch_size=5) == 5


def test_activation_checkpointing_changes_nothing_but_memory(make_model, tokenizer, edits, tmp_path):
    def losses(name, **settings):
        args = EditConfig(
            output_dir=str(tmp_path / name),
            num_train_epochs=3,
            save_strategy="no",
            disable_tqdm=True,
            prefix_cache=False,  # which goes with no checkpointing, and says so
            **settings,
        )
        trainer = EditTrainer(make_model(), args, edits, processing_class=tokenizer)
        trainer.train()
        return [entry["epoch_loss"] for entry in trainer.state.log_history if "epoch_loss" in entry]

    assert losses("checkpointed", activation_checkpointing=True) == pytest.approx(losses("plain"), abs=1e-6)


def test_a_bfloat16_model_is_edited_with_a_float32_delta(make_model, tokenizer, edits, tmp_path):
    trainer = EditTrainer(
        model=make_model().to(torch.bfloat16),
        args=EditConfig(output_dir=str(tmp_path), num_train_epochs=40, save_strategy="no", disable_tqdm=True),
        train_dataset=edits,
        processing_class=tokenizer,
    )
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad} == {torch.float32}
    assert trainer.evaluate()["eval_reliability"] == 1.0
