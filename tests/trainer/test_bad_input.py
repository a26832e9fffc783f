"""What cannot be trained is refused with the reason, before anything is trained or written."""

import copy

import pytest
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from peft_locft import Edit, EditConfig, EditDataError, EditSet, EditTrainer, LocFTConfig


@pytest.fixture
def make_trainer(make_model, tokenizer, edits, tmp_path):
    """Build a trainer of which one thing is wrong; nothing may be written."""
    output = tmp_path / "output"

    def make(model=None, args=None, **given):
        settings = {"output_dir": str(output), "disable_tqdm": True, **(args or {})}
        arguments = {"train_dataset": edits, "processing_class": tokenizer, **given}
        return EditTrainer(
            model=model if model is not None else make_model(), args=EditConfig(**settings), **arguments
        )

    yield make
    assert not output.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"per_device_train_batch_size": 1}, r"a batch of one edit \(`per_device_train_batch_size=1`\) for 8 edits"),
        ({"max_steps": 3}, "`max_steps=3`, expected at least the 4 steps that an epoch has"),
        ({"num_train_epochs": 0.5}, "`num_train_epochs=0.5`, expected at least 1"),
        ({"train_sampling_strategy": "sequential"}, "`train_sampling_strategy='sequential'`, expected 'random'"),
        ({"dataloader_drop_last": True}, "`dataloader_drop_last=True`, expected False"),
    ],
)
def test_what_defeats_breadth_first(make_trainer, args, message):
    with pytest.raises(ValueError, match="LocFT-BF trains breadth-first.*" + message):
        make_trainer(args=args)


def test_all_that_defeats_breadth_first_is_named_at_once(make_trainer):
    with pytest.raises(ValueError) as error:
        make_trainer(args={"per_device_train_batch_size": 1, "max_steps": 3, "dataloader_drop_last": True})
    assert all(name in str(error.value) for name in ("batch of one edit", "max_steps=3", "dataloader_drop_last"))


def test_a_streaming_dataset(make_trainer, edits):
    with pytest.raises(TypeError, match="a streaming dataset was given.*Load it without `streaming=True`"):
        make_trainer(train_dataset=edits.to_dataset().to_iterable_dataset())


def test_no_edits(make_trainer):
    with pytest.raises(ValueError, match="`train_dataset` is missing"):
        make_trainer(train_dataset=None)
    with pytest.raises(EditDataError, match="there are no edits"):
        make_trainer(train_dataset=EditSet([]))
    with pytest.raises(EditDataError, match="there are no edits"):
        make_trainer(train_dataset=Dataset.from_dict({"prompt": [], "target": []}))


def test_edits_that_are_too_long_are_all_named(make_trainer, edits, tokenizer):
    long = [Edit("word " * 80 + "is", "x", id="prompt"), Edit("It is", "word " * 80, id="target")]
    with pytest.raises(EditDataError) as error:
        make_trainer(train_dataset=EditSet([*edits, *long]))
    assert len(error.value.faults) == 2
    assert "edit 9 (prompt): its prompt alone has" in error.value.faults[0]
    assert "nothing of the target to learn within the 64 tokens" in error.value.faults[0]
    assert "edit 10 (target): it has" in error.value.faults[1]
    assert "expected at most the 64" in error.value.faults[1]
    with pytest.raises(EditDataError, match="within the 4 tokens that `max_length`, the tokenizer"):
        make_trainer(args={"max_length": 4})
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 4
    with pytest.raises(EditDataError, match="within the 4 tokens that `max_length`, the tokenizer"):
        make_trainer(processing_class=short)


def test_a_target_that_the_tokenizer_drops(make_trainer, edits, tokenizer, monkeypatch):
    # Some tokenizers drop characters that they do not know.
    monkeypatch.setattr(
        "peft_locft.trainer.data.encode_answers", lambda tokenizer, prompts, answers: [([5, 6], []) for _ in prompts]
    )
    with pytest.raises(EditDataError, match="turns its target 'Astana' into no tokens: nothing to learn"):
        make_trainer()


def test_a_tokenizer_without_eos(make_trainer, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="has no EOS token.*set `tokenizer.eos_token`"):
        make_trainer(processing_class=bare)


def test_a_model_without_a_decoder(make_trainer):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = AutoModel.from_config(BertConfig(vocab_size=400, **sizes))
    with pytest.raises(ValueError, match="the model is a BertModel, expected a decoder that continues text"):
        make_trainer(model=encoder)
    both = T5ForConditionalGeneration(T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="the model is a T5ForConditionalGeneration, expected a decoder"):
        make_trainer(model=both)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LocFTConfig(layers=[7]), r"layers \[7\] are not in the model, which has the 3 layers 0 to 2"),
        (LocFTConfig(layers=[1], target_modules=["mlp.downproj"]), "the nearest names are .*'mlp.down_proj'"),
        (PromptTuningConfig(num_virtual_tokens=2), "PromptTuningConfig learns a prompt, expected a PEFT config that"),
    ],
)
def test_a_place_that_is_not_there(make_trainer, config, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(peft_config=config)


def test_a_peft_model_with_a_config_or_without_anything_to_train(make_trainer, make_model):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="is a PeftModel already and `peft_config` was given too"):
        make_trainer(model=model, peft_config=LocFTConfig(layers=[0]))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="the PeftModel has no trainable parameters.*is_trainable=True"):
        make_trainer(model=model)


def test_no_tokenizer_to_be_found(make_trainer, make_model):
    with pytest.raises(ValueError, match="pass the tokenizer as `processing_class`"):
        make_trainer(processing_class=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip_loss": -1}, "`skip_loss` is -1, expected 0"),
        ({"stop_loss": -0.1}, "`stop_loss` is -0.1, expected 0"),
        ({"learning_rate": 0}, "`learning_rate` is 0, expected more than 0"),
        ({"max_length": 1}, "`max_length` is 1, expected at least 2 tokens"),
        ({"fp16": True}, "`skip_loss` is 0.01 with `fp16=True`.*use `bf16=True`, or `skip_loss=0`"),
    ],
)
def test_arguments_that_make_no_sense(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        EditConfig(output_dir=str(tmp_path), **settings)


def test_an_output_folder_that_is_a_file(make_model, tokenizer, edits, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises((NotADirectoryError, FileExistsError)):
        trainer = EditTrainer(
            make_model(), EditConfig(output_dir=str(tmp_path / "taken")), edits, processing_class=tokenizer
        )
        trainer.train()
    assert (tmp_path / "taken").read_text() == "mine"


def test_workers_that_do_not_know_the_epoch(make_trainer):
    edits = EditSet([Edit("The king of Peru is", "Lima", train_rephrases=["Who rules Peru?"])])
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    with pytest.raises(ValueError, match="`dataloader_persistent_workers` is True, expected False: workers that stay"):
        make_trainer(args=settings, train_dataset=edits)


def test_whole_numbers_may_be_written_as_fractions(tmp_path):
    args = EditConfig(output_dir=str(tmp_path), contexts=3.0)
    assert args.contexts == 3 and isinstance(args.contexts, int)
