"""What `plan_edit` refuses, and how it says so."""

import pytest
from peft import PromptTuningConfig
from transformers import AutoConfig, BartConfig, ViTConfig

from peft_locft import LocFTConfig, plan_edit


PLACE = LocFTConfig(layers=[1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_edits": 0}, "`num_edits` is 0, expected at least 1: how many edits there are"),
        ({"num_edits": 1.5}, "`num_edits` is 1.5, expected at least 1"),
        ({"tokens_per_edit": 0}, "`tokens_per_edit` is 0, expected at least 1 token"),
        ({"target_tokens": 20}, "`target_tokens` is 20 for an edit of 20 tokens, expected at most 19"),
        ({"tokens_per_edit": [9, 9]}, "`tokens_per_edit` has 2 numbers for 8 edits, expected one for each"),
        ({"tokens_per_edit": 65}, "the longest edit has 65 tokens, expected at most the 64 of the model's context"),
        ({"batch_size": 1}, "`batch_size` is 1 for 8 edits, expected at least 2"),
        ({"dtype": "int8"}, "`dtype` is 'int8', expected one of ['float32', 'float16', 'bfloat16']"),
        ({"frozen_dtype": "auto"}, "`frozen_dtype` is 'auto', expected one of"),
        ({"peft_config": LocFTConfig(layers=[3])}, "layers [3] are not in the model"),
        (
            {"peft_config": LocFTConfig(layers=[0]), "offload_prefix": True},
            "`offload_prefix` is True and no layer is below the trained ones",
        ),
        ({"prefix_cache": False, "offload_prefix": True}, "`offload_prefix` is True and `prefix_cache` is False"),
        (
            {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
            "PromptTuningConfig learns a prompt, expected a PEFT config that changes modules",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_faulty_numbers_and_places(changes, message, make):
    arguments = {"peft_config": PLACE, "num_edits": 8, **changes}
    with pytest.raises(ValueError) as error:
        plan_edit(make("llama").config, arguments.pop("peft_config"), **arguments)
    assert message in str(error.value)


def test_models_that_cannot_be_planned(make, tmp_path):
    def refused(model) -> str:
        with pytest.raises(ValueError) as error:
            plan_edit(model, num_edits=8)
        return str(error.value)

    assert refused(str(tmp_path / "gone")) == f"the model folder {tmp_path / 'gone'} does not exist"
    assert f"the model folder {tmp_path} has no config.json: give the folder" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert f"the config of the model '{tmp_path}' could not be read: " in refused(str(tmp_path))
    assert "the model is an encoder-decoder (bart), expected a decoder" in refused(BartConfig())
    assert "the model is of the type 'vit', which transformers' `AutoModelForCausalLM` does not load" in refused(
        ViTConfig()
    )
    config = make("llama").config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert "the model's config has a `quantization_config`" in refused(config)
    config = make("mixtral").config
    config._experts_implementation = "eager"  # a loop over the experts that are hit, which depends on values
    assert "MixtralForCausalLM cannot be planned, because its passes do not run on tensors without" in refused(config)


def test_a_name_that_is_not_on_the_hub(monkeypatch):
    def gone(name):
        raise OSError("no such repository")

    monkeypatch.setattr(AutoConfig, "from_pretrained", gone)
    with pytest.raises(
        ValueError, match="'me/gone' was found neither in a folder of that name nor on the Hub: no such"
    ):
        plan_edit("me/gone", num_edits=8)
