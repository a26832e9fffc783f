import pytest

from peft_locft import EditConfig, EditTrainer, LocFTConfig


@pytest.fixture
def make_trainer(make_model, tokenizer, edits, tmp_path):
    """A trainer of a tiny model; one that is a PeftModel already takes no config."""

    def make(peft_config=None, train_dataset=edits, model=None, output="run", **settings):
        settings = {"num_train_epochs": 4, "save_strategy": "no", **settings}
        return EditTrainer(
            model=model or make_model(),
            args=EditConfig(output_dir=str(tmp_path / output), disable_tqdm=True, report_to="none", **settings),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            peft_config=peft_config or (LocFTConfig(layers=[1]) if model is None else None),
        )

    return make
