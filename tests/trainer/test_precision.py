"""Frozen weights in 16 bits: while training only, with delta and loss in 32, and bit for bit as before afterwards."""

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from peft_locft import EditConfig, EditTrainer, LocFTConfig
from peft_locft.trainer import precision
from peft_locft.trainer.precision import frozen_dtype


class Look(TrainerCallback):
    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, **kwargs):
        self.look()


@pytest.fixture
def train(make_model, tokenizer, edits, tmp_path):
    def train(architecture="llama", peft_config=None, **settings):
        dtypes, losses = [], []
        trainer = EditTrainer(
            model=make_model(architecture),
            args=EditConfig(
                output_dir=str(tmp_path / "run"), report_to="none", disable_tqdm=True, save_strategy="no", **settings
            ),
            train_dataset=edits,
            processing_class=tokenizer,
            peft_config=peft_config or LocFTConfig(layers=[1]),
        )
        look = Look(lambda: dtypes.append({name: p.dtype for name, p in trainer.model.named_parameters()}))
        trainer.add_callback(look)
        compute = trainer.compute_loss

        def compute_loss(*args, **kwargs):
            loss, found = compute(*args, **kwargs)
            losses.append(found.per_edit.dtype)
            return loss, found

        trainer.compute_loss = compute_loss
        trainer.train()
        epochs = [entry["epoch_loss"] for entry in trainer.state.log_history if "epoch_loss" in entry]
        return trainer, dtypes[0], losses, epochs

    return train


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("cache", [True, False])
def test_frozen_weights_are_rounded_only_while_training(train, make_model, architecture, cache):
    trainer, dtypes, losses, epochs = train(
        architecture, frozen_dtype="bfloat16", num_train_epochs=12, prefix_cache=cache
    )
    delta = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {dtypes[name] for name in delta} == {torch.float32} == set(losses)
    below = {
        name for name in dtypes if ".0." in name and cache
    }  # the layers that the cache stands for are not touched
    assert {dtypes[name] for name in below} <= {torch.float32}
    assert {dtypes[name] for name in dtypes.keys() - delta - below} == {torch.bfloat16}
    assert epochs[-1] < epochs[0] / 2
    ids = torch.tensor([[5, 3, 7, 2]])
    with trainer.model.disable_adapter():
        assert torch.equal(trainer.model(ids).logits, make_model(architecture)(ids).logits)


@pytest.mark.parametrize(
    "config", [LocFTConfig(layers=[1]), LoraConfig(r=4, target_modules=["up_proj"], layers_to_transform=[1])]
)
def test_losses_are_near_those_in_32_bits(train, config, tmp_path):
    *_, plain = train(peft_config=config, num_train_epochs=3, learning_rate=5e-3)
    *_, rounded = train(peft_config=config, num_train_epochs=3, learning_rate=5e-3, frozen_dtype="bfloat16")
    assert rounded == pytest.approx(plain, rel=0.02) and rounded != plain


def test_an_error_leaves_the_weights_as_they_were(make_model, tokenizer, edits, tmp_path):
    trainer = EditTrainer(
        model=make_model(),
        args=EditConfig(
            output_dir=str(tmp_path), report_to="none", disable_tqdm=True, frozen_dtype="bfloat16", num_train_epochs=1
        ),
        train_dataset=edits,
        processing_class=tokenizer,
    )
    trainer.add_callback(Look(lambda: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("has", "expected"), [(True, torch.bfloat16), (False, None)])
def test_auto_asks_the_processor(make_model, monkeypatch, tmp_path, has, expected):
    monkeypatch.setattr(precision.torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    args = EditConfig(output_dir=str(tmp_path), frozen_dtype="auto", use_cpu=True)
    assert frozen_dtype(args, make_model()) == expected
    assert frozen_dtype(EditConfig(output_dir=str(tmp_path)), make_model()) is None


def test_another_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError) as caught:
        EditConfig(output_dir=str(tmp_path), frozen_dtype="int8")
    assert str(caught.value) == "`frozen_dtype` is 'int8', expected 'auto', 'bfloat16', 'float16' or None"
