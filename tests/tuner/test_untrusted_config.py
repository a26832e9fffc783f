"""An adapter's files as somebody who means harm might write them: a clear, short error, in little time and memory."""

import json
import signal
from contextlib import contextmanager

import huggingface_hub
import peft.config
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model

import peft_locft.tuner.config
from peft_locft import LocFTConfig, load_adapter, save_as_lora
from peft_locft.tuner import LocFTLinear


# Takes far too long on names that it does not match, even for an engine that sees through the classic `(a+)+$`.
BOMB = "(.*)" * 9 + "".join(rf"\{i}" for i in range(1, 10)) + "[A-Z]"


def shown(value) -> str:
    """A value in a message: its first characters, and a sign that there are more."""
    return repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:200]}..."


@pytest.fixture
def folder(make_model, tmp_path):
    """An honest adapter."""
    get_peft_model(make_model(), LocFTConfig(layers=[1])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def forge(folder):
    """Rewrite fields of the adapter's config, as JSON text."""

    def forge(**fields):
        path = folder / "adapter_config.json"
        config = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({name: value for name, value in config.items() if value != "(out)"}))
        return folder

    return forge


@contextmanager
def computing_at_most(seconds: float):
    """Fail what takes more of the processor's time, which others on a busy machine do not add to, and what hangs."""

    def fail(*_):
        pytest.fail(f"still computing after {seconds} s")

    before = signal.signal(signal.SIGPROF, fail)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.fixture
def load_refused(forge, make_model):
    """The message with which a forged adapter is refused: short, and soon."""

    def refused(error=ValueError, **fields) -> str:
        folder, base = forge(**fields), make_model()
        with computing_at_most(12), pytest.raises(error) as raised:
            PeftModel.from_pretrained(base, folder)
        assert len(str(raised.value)) < 1500
        assert not any(isinstance(module, LocFTLinear) for module in base.modules())
        return str(raised.value)

    return refused


NO_LAYERS = "expected an integer or a list of integers, such as [22] or [-3]"


@pytest.mark.parametrize("name", ["layers", "layers_to_transform"])
@pytest.mark.parametrize("value", ["22", [True], [1.5], 1.0, [[1]], {"1": 1}, ["1"] * 5000, [], "1" * 10**6, [None]])
def test_layers_of_a_wrong_type(name, value, load_refused):
    message = load_refused(**{"layers_to_transform": "(out)", name: value})
    assert message.startswith(f"`{name}` is ") and message.endswith(NO_LAYERS)


@pytest.mark.parametrize("value", [10**9, -(10**9), [1, 3], [-4], [10**4000], list(range(3, 9000))])
def test_layers_out_of_range(value, load_refused):
    message = load_refused(layers_to_transform=value)
    assert "are not in the model, which has the 3 layers 0 to 2 (or -3 to -1 from the last)" in message


def test_a_very_long_list_of_layers(load_refused):
    message = load_refused(layers_to_transform=[1] * 100_000)
    assert message == "`layers_to_transform` has 100000 entries, expected at most 10000"


def test_long_layers_that_clash(load_refused):
    message = load_refused(layers=list(range(9000)), layers_to_transform=list(range(1, 9001)))
    assert message.startswith("`layers` is [0, 1, 2,") and message.endswith("they mean the same, give one of them")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_an_expression_that_would_hang(field, load_refused):
    fields = {"layers_to_transform": None, "target_modules": "all-linear"}
    message = load_refused(**{**fields, field: BOMB})
    assert message == (
        f"`{field}` is the regular expression {BOMB!r}, which takes longer than 5 s on the model's names, as expressions "
        "with nested repetitions do: write it without them, or give a list of names"
    )


def test_the_classic_expression_that_would_hang_matches_nothing_in_time(load_refused):
    message = load_refused(layers_to_transform=None, target_modules="(a+)+$")
    assert message.startswith("Target modules ['(a+)+$'] not found in the base model")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_an_expression_that_is_none_or_is_huge(field, load_refused):
    fields = {"layers_to_transform": None, "target_modules": "all-linear"}
    message = load_refused(**{**fields, field: "(down_proj"})
    assert message == (
        f"`{field}` is the regular expression '(down_proj', which is not valid (missing ) at position 10): mend it, or "
        "give a list of names"
    )
    message = load_refused(**{**fields, field: "a|" * 10**6})
    assert message == (
        f"`{field}` is the regular expression {'a|' * 100!r}... of 2000000 characters, expected at most 10000: give a "
        "list of names"
    )


HARD = {
    "(" * 4000 + ")" * 4000: "which is nested too deeply: mend it, or give a list of names",
    "x{1000000000}": "whose repetitions in braces are more than 1000000, multiplied: use smaller ones, or give a list of names",
    "((x{9999}){99}){99}": "whose repetitions in braces are more than 1000000, multiplied: use smaller ones, or give a list of names",
    "(a|(?R))*": "which refers to itself: write it without, or give a list of names",
}


@pytest.mark.parametrize("expression", HARD, ids=lambda expression: expression[:20])
def test_an_expression_that_is_hard_to_compile(expression, load_refused):
    message = load_refused(layers_to_transform=None, target_modules="all-linear", exclude_modules=expression)
    shown = f"{expression[:200]!r}..." if len(expression) > 200 else repr(expression)
    assert message == f"`exclude_modules` is the regular expression {shown}, {HARD[expression]}"


def test_a_long_expression_with_layers(load_refused):
    message = load_refused(target_modules="a|" * 10**6)
    assert message.startswith("`layers` is [1] and `target_modules` is the string 'a|a|")


@pytest.mark.parametrize("pattern", [r"\w+", BOMB, "layers|x", "(layers"])
def test_a_layers_pattern_is_a_name_and_no_expression(pattern, load_refused):
    message = load_refused(layers_pattern=pattern)
    assert message == (
        "`layers` is [1], but LlamaForCausalLM has no numbered layers: leave `layers` out, or name their list in "
        f"`layers_pattern`, which is {pattern!r}"
    )


def test_an_expression_beside_the_right_layers_pattern_never_runs(forge, make_model, tmp_path):
    model = PeftModel.from_pretrained(make_model(), forge(layers_pattern=[BOMB, "layers"]))
    assert model.targeted_module_names == ["model.layers.1.mlp.down_proj"]
    with computing_at_most(10):
        save_as_lora(model, tmp_path / "lora", rank=2)


def test_an_expression_of_target_modules_becomes_full_names_in_a_lora(forge, make_model, tmp_path):
    # Python's own engine, which PEFT uses for a LoRA, has no timeout.
    expression = r"model\.layers\.1\.mlp\.down_proj|(\w*\w*\.?)*!x"
    model = PeftModel.from_pretrained(make_model(), forge(layers_to_transform=None, target_modules=expression))
    with computing_at_most(10):
        save_as_lora(model, tmp_path / "lora", rank=2)
    saved = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert saved["target_modules"] == ["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("field", ["modules_to_save", "target_modules", "exclude_modules"])
@pytest.mark.parametrize("value", [["(a+)+$"], [".*"], [""], ["x" * 501], [5], [None], [["a"]], ["a b"]])
def test_a_list_of_modules_holds_names_only(field, value, load_refused):
    assert load_refused(**{field: value}) == (
        f"`{field}` is {shown(value)}, expected a list of the names of modules, such as ['mlp.down_proj']: a name "
        "is made of letters, digits, `_`, `-` and dots"
    )


@pytest.mark.parametrize("value", [".*", 5, True, {"lm_head": 1}, "x" * 10**6])
def test_modules_to_save_that_are_no_list(value, load_refused):
    assert load_refused(modules_to_save=value).startswith(f"`modules_to_save` is {shown(value)}, expected a list")


@pytest.mark.parametrize("field", ["modules_to_save", "target_modules"])
def test_many_long_names_that_match_nothing(field, load_refused):
    message = load_refused(**{field: [f"{i}_{'x' * 490}" for i in range(500)]})
    assert "not found in the base model" in message and "and 488 more" in message


WRONG = {
    "target_modules": [5, 1.5, True, {"a": 1}, {str(i): i for i in range(9999)}],
    "exclude_modules": [5, 1.5, True, {"a": 1}, {str(i): i for i in range(9999)}],
    "init_weights": ["no", 0, None, [], "x" * 10**6],
    "strict": ["no", 0, None, {}, "x" * 10**6],
    "inference_mode": ["no", 0, None, {}],
    "task_type": [5, ["CAUSAL_LM"], {}, "x" * 10**6, "OTHER"],
    "base_model_name_or_path": [5, ["a"], {"a": 1}, True, "x" * 10**6],
    "revision": [5, ["a"], {}, True, "x" * 10**6],
    "layers_pattern": [5, [5], {"a": 1}, True, ["layers", None], ["x"] * 101, "x" * 501],
    "rank_pattern": [5, None, "x", [], {"a": 0}, {"a": -1}, {"a": "a"}, {"a": True}, {"a": 1.5}, {"a": None}],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_field_of_a_wrong_type_is_named(field, value, load_refused):
    message = load_refused(**{field: value})
    assert message.startswith("Invalid task type: 'OTHER'" if value == "OTHER" else f"`{field}` is ")


@pytest.mark.parametrize("rank", [65, 10**7, 10**12, 10**4000])
def test_a_rank_beyond_the_weights_shape_is_refused_before_anything_is_allocated(rank, load_refused):
    message = load_refused(rank_pattern={"model.layers.1.mlp.down_proj": rank})
    assert message == (
        f"`rank_pattern` has the rank {str(rank)[:50]} for a weight of 64 x 128, expected at most 64: mend the adapter's "
        "config"
    )


def test_ranks_of_modules_that_are_not_edited_do_nothing(forge, make_model):
    forged = forge(rank_pattern={"lm_head": 10**12, "(a+)+$": 3})
    model = PeftModel.from_pretrained(make_model(), forged)
    assert [name for name, _ in model.named_parameters() if "locft" in name] == [
        "base_model.model.model.layers.1.mlp.down_proj.locft_delta.default.weight"
    ]


def test_unknown_fields_are_warned_about_and_left_out(forge, make_model):
    forged = forge(trust_remote_code=True, __class__="os.system")
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['__class__', 'trust_remote_code'\]"):
        model = PeftModel.from_pretrained(make_model(), forged)
    assert not hasattr(model.active_peft_config, "trust_remote_code")
    assert type(model.active_peft_config) is LocFTConfig


def test_config_alone_is_checked_too(forge):
    forged = str(forge(rank_pattern={"a": 0}))
    for cls in (LocFTConfig, PeftConfig):
        with pytest.raises(ValueError) as raised:
            cls.from_pretrained(forged)
        assert str(raised.value) == "`rank_pattern` is {'a': 0}, expected a positive rank by the name of each module"


def test_a_long_name_of_the_base_is_cut_in_the_warning(forge, make_model):
    forged = forge(base_model_name_or_path="x" * 4000, base_fingerprint={}, strict=True)
    with pytest.raises(ValueError) as raised:
        PeftModel.from_pretrained(make_model(), forged)
    assert f"trained on {'x' * 200}, and" in str(raised.value) and len(str(raised.value)) < 1500


def test_a_card_that_is_no_text_does_not_keep_an_adapter_from_loading(folder, make_model):
    (folder / "README.md").write_bytes(b"\xff\xfe\x00")
    PeftModel.from_pretrained(make_model(), folder)


# ---- Pickles ----


class Exploit:
    """What runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


PICKLE = (
    "{} has its weights in adapter_model.bin, which is a pickle and can hold code, expected adapter_model.safetensors: "
    "ask its author for that file, or convert it with safetensors where you trust it"
)


def test_an_adapter_of_a_pickle_alone_is_refused(folder, make_model, tmp_path):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Exploit(tmp_path / "exploited")}, folder / "adapter_model.bin")
    second = get_peft_model(make_model(), LocFTConfig(layers=[0]))
    calls = [
        lambda: PeftModel.from_pretrained(make_model(), folder),
        lambda: PeftModel.from_pretrained(make_model(), tmp_path, subfolder="adapter"),
        lambda: second.load_adapter(folder, "second"),
        lambda: LocFTConfig.from_pretrained(str(folder)),
    ]
    for call in calls:
        with pytest.raises(ValueError) as raised:
            call()
        assert str(raised.value) == PICKLE.format(folder)
    assert not (tmp_path / "exploited").exists()


def test_a_pickle_beside_safetensors_is_not_opened(folder, make_model, tmp_path):
    torch.save({"x": Exploit(tmp_path / "exploited")}, folder / "adapter_model.bin")
    PeftModel.from_pretrained(make_model(), folder)
    assert not (tmp_path / "exploited").exists()


def test_a_config_alone_needs_no_weights(tmp_path):
    LocFTConfig(layers=[1]).save_pretrained(tmp_path)
    assert LocFTConfig.from_pretrained(str(tmp_path)).layers == [1]


@pytest.mark.parametrize(
    ("files", "refused"),
    [
        (["adapter_model.bin"], True),
        (["adapter_model.bin", "adapter_model.safetensors"], False),
        (["adapter_model.safetensors"], False),
        ([], False),
    ],
)
@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("subfolder", [None, "best"])
def test_a_pickle_on_the_hub_or_in_its_cache(files, refused, online, subfolder, folder, monkeypatch):
    def download(repo_id, filename, *, subfolder=None, revision=None, token=None, user_agent=None):
        if filename != "adapter_config.json":
            raise EntryNotFoundError(filename)
        return str(folder / filename)

    def is_there(repo, name, revision):
        assert (repo, revision) == ("me/x", "v1")
        return name in [f"{subfolder}/{file}" if subfolder else file for file in files]

    def exists(repo, name, *, repo_type=None, revision=None, token=None):
        assert token == "secret"
        if not online:
            raise huggingface_hub.errors.OfflineModeIsEnabled("offline")
        return is_there(repo, name, revision)

    def cached(repo, name, cache_dir=None, revision=None, repo_type=None):
        return "/cache/x" if not online and is_there(repo, name, revision) else None

    monkeypatch.setattr(peft.config, "hf_hub_download", download)
    for name, fake in {"file_exists": exists, "try_to_load_from_cache": cached, "hf_hub_download": download}.items():
        monkeypatch.setattr(peft_locft.tuner.config, name, fake)

    def load():
        return LocFTConfig.from_pretrained("me/x", subfolder=subfolder, revision="v1", token="secret")

    if refused:
        with pytest.raises(ValueError) as raised:
            load()
        assert str(raised.value) == PICKLE.format("me/x")
    else:
        assert load().layers == [1]


def test_load_adapter_refuses_a_pickle(forge, model_folder):
    folder = forge(base_model_name_or_path=str(model_folder))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError) as raised:
        load_adapter(str(folder))
    assert str(raised.value) == PICKLE.format(folder)
