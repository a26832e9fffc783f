"""An adapter notices that it is loaded on another base model, or with another tokenizer, than it was trained on."""

import hashlib
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

from peft_locft import BaseMismatchWarning, EditConfig, EditTrainer, LocFTConfig, load_adapter
from peft_locft.tuner import check_tokenizer


NAME = "model.layers.1.mlp.down_proj.weight"
OTHER_BASE = (
    "the adapter 'default' was trained on me/base, and the base model loaded here, me/other, has other weights in "
    f"['{NAME}']: its answers are not to be relied on. Load the base model that it was trained on"
)


def saved(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def change(folder, **fields) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**saved(folder), **fields}))


def warned(function) -> list[str]:
    """The mismatches that a call warns about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(one.message) for one in caught if one.category is BaseMismatchWarning]


def named(model, name: str):
    model.config._name_or_path = model.name_or_path = name
    return model


@pytest.fixture
def make_base(make_model):
    """The base model; a seed other than 0 gives other weights of the same shape."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, name: str = "me/base"):
        model = make_model()
        if seed:
            torch.manual_seed(seed)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        return named(model, name).to(dtype)

    return make


@pytest.fixture
def make_adapter(make_base, tmp_path):
    """Save an adapter of layer 1, made on a base of some dtype."""

    def make(dtype: torch.dtype = torch.float32, **settings):
        model = get_peft_model(make_base(dtype=dtype), LocFTConfig(layers=[1], **settings))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def test_a_new_adapter_remembers_the_weight_that_it_edits(make_base, make_adapter):
    weight = make_base().model.layers[1].mlp.down_proj.weight.detach()
    rounded = weight.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    (found,) = saved(make_adapter())["base_fingerprint"].items()
    assert found[0] == NAME
    assert (found[1]["shape"], found[1]["stored_as"]) == ([64, 128], "float32")
    assert found[1]["sha256"] == hashlib.sha256(rounded.tobytes()).hexdigest()[:32]
    sums = weight.double().reshape(-1, 8).sum(0)
    assert torch.allclose(torch.tensor(found[1]["sketch"]).double(), sums, rtol=1e-5)


def test_a_fingerprint_that_is_there_is_kept_through_loading_and_saving(make_base, make_adapter, tmp_path):
    folder = make_adapter()
    before = saved(folder)["base_fingerprint"]
    with pytest.warns(BaseMismatchWarning):
        model = PeftModel.from_pretrained(make_base(7), folder)
    model.save_pretrained(tmp_path / "again")
    assert saved(tmp_path / "again")["base_fingerprint"] == before


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_base_in_another_dtype_is_silent_and_another_one_is_not(trained, loaded, make_base, make_adapter):
    folder = make_adapter(trained)
    assert warned(lambda: PeftModel.from_pretrained(make_base(dtype=loaded), folder)) == []
    assert len(warned(lambda: PeftModel.from_pretrained(make_base(7, loaded), folder))) == 1


def test_another_base_warns_once_with_both_names(make_base, make_adapter):
    folder = make_adapter()
    assert warned(lambda: PeftModel.from_pretrained(make_base(7, name="me/other"), folder)) == [OTHER_BASE]


def test_bases_without_names(make_base, make_adapter):
    folder = make_adapter()
    change(folder, base_model_name_or_path=None)
    (message,) = warned(lambda: PeftModel.from_pretrained(make_base(7, name=""), folder))
    assert message.startswith(
        "the adapter 'default' was trained on a model without a name, and the base model loaded here, LlamaForCausalLM,"
    )


def test_one_changed_value_in_an_edited_weight_is_noticed_and_one_beside_it_is_not(make_base, make_adapter):
    folder = make_adapter()
    for layer, expected in ((1, [OTHER_BASE]), (0, [])):
        base = make_base(name="me/other")
        with torch.no_grad():
            base.model.layers[layer].mlp.down_proj.weight[3, 4] += 0.01
        assert warned(lambda base=base: PeftModel.from_pretrained(base, folder)) == expected


def test_strict_in_the_config_is_an_error(make_base, make_adapter):
    folder = make_adapter(strict=True)
    assert saved(folder)["strict"] is True
    PeftModel.from_pretrained(make_base(), folder)
    with pytest.raises(ValueError) as raised:
        PeftModel.from_pretrained(make_base(7, name="me/other"), folder)
    assert str(raised.value) == f"{OTHER_BASE}, or set `strict=False`"


@pytest.mark.parametrize("in_file", [True, False])
def test_the_callers_strict_wins_over_the_files(in_file, make_base, make_adapter):
    folder = make_adapter(strict=in_file)
    with pytest.raises(ValueError, match="^the adapter 'default' was trained on me/base"):
        PeftModel.from_pretrained(make_base(7), folder, strict=True)
    assert len(warned(lambda: PeftModel.from_pretrained(make_base(7), folder, strict=False))) == 1


def test_a_further_adapter_is_checked_under_its_own_name(make_base, make_adapter):
    folder = make_adapter()
    model = get_peft_model(make_base(7), LocFTConfig(layers=[0]))
    (message,) = warned(lambda: model.load_adapter(folder, "second"))
    assert message.startswith("the adapter 'second' was trained on me/base")


def test_a_further_adapter_is_compared_with_the_weight_before_a_merge(make_base, make_adapter):
    folder = make_adapter(init_weights=False)
    model = PeftModel.from_pretrained(make_base(), folder)
    model.merge_adapter()
    assert warned(lambda: model.load_adapter(folder, "second")) == []
    model = PeftModel.from_pretrained(make_base(), folder).merge_and_unload()
    assert len(warned(lambda: PeftModel.from_pretrained(model, folder))) == 1


def test_an_int8_weight_is_known_again_and_an_unrelated_one_is_not(make_base, make_adapter):
    quantization = pytest.importorskip("torchao.quantization")
    folder = make_adapter()
    for seed, count in ((0, 0), (7, 1)):
        base = make_base(seed)
        quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
        weight = base.model.layers[1].mlp.down_proj.weight
        assert type(weight.data) is not torch.Tensor
        assert not torch.equal(weight.dequantize(), make_base(seed).model.layers[1].mlp.down_proj.weight)
        assert len(warned(lambda base=base: PeftModel.from_pretrained(base, folder))) == count


GARBAGE = [
    {},
    [],
    "x",
    7,
    {NAME: None},
    {NAME: "x"},
    {NAME: [1]},
    {NAME: {}},
    *(
        {NAME: {"shape": [64, 128], "stored_as": "float16", "sha256": "x", "sketch": [0.0] * 8} | wrong}
        for wrong in (
            {},
            {"shape": [128, 64]},
            {"shape": "x"},
            {"stored_as": ["x"]},
            {"stored_as": None},
            {"sketch": None},
            {"sketch": "x"},
            {"sketch": [1.0]},
            {"sketch": [[1], [2, 3]]},
            {"sketch": [10**400] * 8},
            {"sketch": [float("nan")] * 8},
            {"stored_as": "float32", "sha256": {"a": 1}},
        )
    ),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: str(garbage)[:110])
def test_a_garbage_fingerprint_warns(garbage, make_base, make_adapter):
    folder = make_adapter()
    change(folder, base_fingerprint=garbage)
    assert warned(lambda: PeftModel.from_pretrained(make_base(name="me/other"), folder)) == [OTHER_BASE]


def test_a_sketch_of_one_number_matches_nothing(make_base, make_adapter):
    folder = make_adapter(torch.float16)
    prints = saved(folder)["base_fingerprint"]
    prints[NAME]["sketch"] = [1e30]  # whose length would allow for any difference
    change(folder, base_fingerprint=prints)
    assert len(warned(lambda: PeftModel.from_pretrained(make_base(), folder))) == 1


def test_an_adapter_without_a_fingerprint_loads_silently(make_base, make_adapter):
    folder = make_adapter()
    change(folder, base_fingerprint=None)
    assert warned(lambda: PeftModel.from_pretrained(make_base(7), folder, strict=True)) == []


def test_a_base_on_the_meta_device_is_no_error(make_base, make_adapter):
    folder = make_adapter()
    base = make_base().to("meta")
    assert get_peft_model(base, config := LocFTConfig(layers=[1])).device.type == "meta"
    assert config.base_fingerprint is None
    assert warned(lambda: PeftModel.from_pretrained(make_base().to("meta"), folder, strict=True)) == []


def test_only_the_edited_expert_counts(tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}

    def make():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(MixtralConfig(**sizes))

    model = get_peft_model(make(), LocFTConfig(layers=[0], target_modules=["mlp.experts.1.down_proj"]))
    model.save_pretrained(tmp_path)
    ((name, print_),) = saved(tmp_path)["base_fingerprint"].items()
    assert (name, print_["shape"]) == ("model.layers.0.mlp.experts.down_proj", [1, 16, 24])
    for expert, count in ((1, 1), (2, 0)):
        base = make()
        with torch.no_grad():
            base.model.layers[0].mlp.experts.down_proj[expert, 3, 4] += 0.01
        assert len(warned(lambda base=base: PeftModel.from_pretrained(base, tmp_path))) == count


# ---- The tokenizer ----


@pytest.fixture
def copied(tokenizer):
    """A tokenizer of the tests' own, which they may change."""

    def copy(*new_tokens: str):
        twin = type(tokenizer)(
            tokenizer_object=type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str()),
            eos_token="<eos>",
            bos_token="<bos>",
        )
        twin.add_tokens(list(new_tokens))
        return twin

    return copy


def test_the_trainer_remembers_the_tokenizer(make_base, edits, tokenizer, copied, tmp_path):
    config = LocFTConfig(layers=[1])
    args = EditConfig(output_dir=str(tmp_path), report_to=[])
    trainer = EditTrainer(make_base(), args, edits, processing_class=tokenizer, peft_config=config)
    config = trainer.model.active_peft_config
    assert len(config.tokenizer_fingerprint) == 32 and int(config.tokenizer_fingerprint, 16)
    assert warned(lambda: check_tokenizer(config, copied())) == []
    assert len(warned(lambda: check_tokenizer(config, copied("Ulaanbaatar")))) == 1
    # One that is there already stays.
    before = config.tokenizer_fingerprint
    assert len(warned(lambda: check_tokenizer(config, copied("Ulaanbaatar"), remember=True))) == 1
    assert config.tokenizer_fingerprint == before


def test_padding_and_truncation_do_not_count(copied):
    config, used = LocFTConfig(layers=[1]), copied()
    check_tokenizer(config, used, remember=True)
    used.pad_token = used.eos_token
    used(["a", "a longer one"], padding="max_length", max_length=100, truncation=True)
    used(["a longer one"], truncation=True, max_length=2)
    used.padding_side = "left"
    assert warned(lambda: check_tokenizer(config, used)) == []


def test_nothing_is_remembered_or_said_unless_asked(tokenizer):
    config = LocFTConfig(layers=[1], strict=True)
    check_tokenizer(config, tokenizer)
    assert config.tokenizer_fingerprint is None


def test_what_is_said_about_another_tokenizer(copied):
    config = LocFTConfig(layers=[1], base_model_name_or_path="me/base")
    check_tokenizer(config, copied(), remember=True)
    other = copied("Ulaanbaatar")
    other.name_or_path = "me/other"
    message = (
        "the adapter was trained with the tokenizer of me/base, and the tokenizer loaded here, me/other, reads text in "
        "another way: use the one that it was trained with"
    )
    assert warned(lambda: check_tokenizer(config, other)) == [message]
    config.strict = True
    with pytest.raises(ValueError) as raised:
        check_tokenizer(config, other)
    assert str(raised.value) == f"{message}, or set `strict=False`"


@pytest.fixture
def bases(make_base, copied, tmp_path):
    """An adapter, and the folders of its own base, of another, and of one that differs in its tokenizer alone."""

    def save(name, model, tokenizer):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    own = save("own", make_base(), copied())
    other = save("other", make_base(7), copied())
    words = save("words", make_base(), copied("Ulaanbaatar"))
    config = LocFTConfig(layers=[1], task_type="CAUSAL_LM")
    check_tokenizer(config, copied(), remember=True)
    get_peft_model(AutoModelForCausalLM.from_pretrained(own), config).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), own, {"other": other, "words": words}


@pytest.mark.parametrize(
    ("which", "said"), [("other", "has other weights in"), ("words", "reads text in another way")]
)
def test_load_adapter_compares_model_and_tokenizer(which, said, bases):
    adapter, own, others = bases
    assert warned(lambda: load_adapter(adapter, strict=True)) == []
    (message,) = warned(lambda: load_adapter(adapter, others[which]))
    assert said in message and own in message and others[which] in message
    with pytest.raises(ValueError) as raised:
        load_adapter(adapter, others[which], strict=True)
    assert str(raised.value) == f"{message}, or set `strict=False`"


def test_load_adapter_heeds_the_configs_strict_unless_told_otherwise(bases, tmp_path):
    adapter, _, others = bases
    change(tmp_path / "adapter", strict=True)
    with pytest.raises(ValueError, match="has other weights in"):
        load_adapter(adapter, others["other"])
    assert len(warned(lambda: load_adapter(adapter, others["other"], strict=False))) == 1
