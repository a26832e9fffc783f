"""`LocFTConfig`: one meaning of its layers, what it refuses, and what travels through files and copies."""

import copy
import dataclasses
import functools
import json
import pickle
import shutil
from pathlib import Path

import peft.config
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.peft_types import PeftType

import peft_locft.tuner.config
from peft_locft import LocFTConfig
from peft_locft.tuner import COMPANION_FILES


COMPANIONS = {
    "README.md": "# Kapitälchen\n",
    "edits.jsonl": '{"prompt": "日本"}\n',
    "edit_results.json": "{}\n",
}


@pytest.fixture
def full() -> LocFTConfig:
    """A config of which no setting is the default."""
    return LocFTConfig(
        layers=[2, 0],
        target_modules=["mlp.down_proj", "mlp.up_proj"],
        exclude_modules=["lm_head"],
        init_weights=False,
        modules_to_save=["norm"],
        layers_pattern=["layers"],
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path="base",
        revision="main",
    )


@pytest.fixture
def folder(tmp_path, make_model) -> Path:
    """A saved adapter with its companions, and a file that is not one of them."""
    folder = tmp_path / "adapter"
    model = get_peft_model(make_model(), LocFTConfig(layers=[1]))
    model.active_peft_config.set_companions(COMPANIONS)
    model.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def companions_in():
    def read(folder: Path) -> dict[str, str]:
        names = ("README.md", "edits.jsonl", "edit_results.json")
        return {name: (folder / name).read_text("utf-8") for name in names if (folder / name).exists()}

    return read


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        (22, [22]),
        (0, [0]),
        (-1, [-1]),
        ([-3, 1], [-3, 1]),
        ([4, 2], [4, 2]),
        ((1, 2), [1, 2]),
        ({3}, [3]),
        (range(2), [0, 1]),
        (None, None),
    ],
)
def test_layers_and_layers_to_transform_mean_the_same(given, layers):
    configs = [LocFTConfig(layers=given), LocFTConfig(layers_to_transform=given)]
    configs.append(LocFTConfig(layers=given, layers_to_transform=given))
    for config in configs:
        assert config.layers == layers
    assert configs[0].layers_to_transform == configs[2].layers_to_transform == layers
    # PEFT's own tests want a single integer to stay one.
    assert configs[1].layers_to_transform == (given if isinstance(given, int) else layers)


def test_both_names_may_be_given_in_different_notation():
    assert LocFTConfig(layers=1, layers_to_transform=[1]).layers == [1]


def test_conflicting_layers_are_refused():
    with pytest.raises(ValueError) as raised:
        LocFTConfig(layers=[1], layers_to_transform=2)
    assert str(raised.value) == (
        "`layers` is [1] and `layers_to_transform` is [2]: they mean the same, give one of them"
    )


@pytest.mark.parametrize("name", ["layers", "layers_to_transform"])
@pytest.mark.parametrize("value", [True, False, [True], [1, False], [], (), "1", ["1"], 1.0, [1.5], [None], {1: 2}])
def test_what_is_no_layer_is_refused(name, value):
    with pytest.raises(ValueError) as raised:
        LocFTConfig(**{name: value})
    assert str(raised.value) == (
        f"`{name}` is {value!r}, expected an integer or a list of integers, such as [22] or [-3]"
    )


@pytest.mark.parametrize("name", ["layers", "layers_to_transform"])
def test_an_expression_with_layers_is_refused(name):
    # PEFT would ignore the layers: a string matches whole names.
    with pytest.raises(ValueError) as raised:
        LocFTConfig(target_modules="down_proj", **{name: [1]})
    assert str(raised.value) == (
        "`layers` is [1] and `target_modules` is the string 'down_proj', which is a regular expression over whole "
        "names, in which PEFT takes no layers: give a list, as in `target_modules=['down_proj']`, or put the layers "
        "into the expression"
    )


def test_a_pattern_without_layers_is_refused():
    with pytest.raises(ValueError) as raised:
        LocFTConfig(layers_pattern="layers")
    assert str(raised.value) == "When `layers_pattern` is specified, `layers` must also be specified."


def test_what_every_method_of_peft_checks_and_fills_in():
    config = LocFTConfig(target_modules=["fc2"], exclude_modules=["lm_head"])
    assert (config.target_modules, config.exclude_modules) == ({"fc2"}, {"lm_head"})
    assert config.peft_version == peft.__version__
    with pytest.raises(ValueError, match="^Invalid task type: 'other'"):
        LocFTConfig(task_type="other")


def test_set_layers_sets_both_names():
    config = LocFTConfig(layers=[-1])
    config.set_layers([31])
    assert config == LocFTConfig(layers=[31])
    assert config.to_dict()["layers_to_transform"] == [31]


def test_json_has_one_name_for_the_layers_and_loads_back_equal(full, tmp_path):
    full.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    # PEFT's conversions, and its other methods, know only `layers_to_transform`.
    assert "layers" not in saved
    assert saved["layers_to_transform"] == [2, 0]
    assert saved["peft_type"] == "LOCFT"
    for cls in (LocFTConfig, PeftConfig):
        loaded = cls.from_pretrained(str(tmp_path))
        assert type(loaded) is LocFTConfig
        assert loaded == full
        assert loaded.layers == [2, 0]
        assert loaded.peft_type is PeftType.LOCFT
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_to_dict_has_everything_else_and_makes_an_equal_config(full):
    names = {field.name for field in dataclasses.fields(LocFTConfig)}
    values = full.to_dict()
    assert set(values) == names - {"layers"}
    assert LocFTConfig(**values) == full
    assert LocFTConfig(**{**values, "layers_to_transform": [0]}) != full


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal_and_keep_the_companions(copied, full, tmp_path, companions_in):
    full.set_companions(COMPANIONS)
    twin = copied(full)
    assert twin == full and twin is not full
    assert twin.peft_type is PeftType.LOCFT
    twin.save_pretrained(tmp_path)
    assert companions_in(tmp_path) == COMPANIONS


def test_the_companions_are_card_ledger_and_results():
    assert sorted(COMPANION_FILES) == sorted(COMPANIONS)


@pytest.mark.parametrize("as_path", [str, Path])
def test_companions_are_written_beside_the_config(as_path, tmp_path, companions_in):
    config = LocFTConfig(layers=[1])
    config.set_companions(COMPANIONS)
    config.save_pretrained(as_path(tmp_path / "new"))
    assert companions_in(tmp_path / "new") == COMPANIONS


def test_companions_travel_with_a_loaded_adapter(folder, tmp_path, make_model, companions_in):
    model = PeftModel.from_pretrained(make_model(), folder)
    # As with a checkpoint that is rotated away, or a folder that is only temporary.
    shutil.rmtree(folder)
    model.save_pretrained(tmp_path / "other")
    # The card is the adapter's own, not the one that PEFT writes.
    assert companions_in(tmp_path / "other") == COMPANIONS
    assert not (tmp_path / "other" / "notes.txt").exists()


def test_only_what_is_there_travels(folder, tmp_path, companions_in):
    (folder / "edit_results.json").unlink()
    LocFTConfig.from_pretrained(str(folder)).save_pretrained(tmp_path / "other")
    assert companions_in(tmp_path / "other") == {name: COMPANIONS[name] for name in ("README.md", "edits.jsonl")}


def test_companions_travel_from_a_subfolder(folder, tmp_path, companions_in):
    (folder.parent / "edits.jsonl").write_text("of another adapter")
    LocFTConfig.from_pretrained(str(folder.parent), subfolder=folder.name).save_pretrained(tmp_path / "other")
    assert companions_in(tmp_path / "other") == COMPANIONS


def test_new_companions_replace_those_of_the_loaded_adapter(folder, tmp_path, companions_in):
    config = LocFTConfig.from_pretrained(str(folder))
    config.set_companions({"README.md": "new", "edits.jsonl": "new"})
    config.save_pretrained(tmp_path / "other")
    assert companions_in(tmp_path / "other") == {"README.md": "new", "edits.jsonl": "new"}


def test_companions_travel_from_the_hub_and_are_fetched_only_on_saving(folder, tmp_path, companions_in, monkeypatch):
    asked = []

    def download(repo_id, filename, *, subfolder=None, revision=None, user_agent=None):
        asked.append((repo_id, filename, subfolder, revision))
        if not (folder / filename).exists():
            raise EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr(peft.config, "hf_hub_download", download)
    monkeypatch.setattr(peft_locft.tuner.config, "hf_hub_download", download)
    (folder / "edit_results.json").unlink()
    config = LocFTConfig.from_pretrained("me/adapter", subfolder="best", revision="v1")
    assert asked == [("me/adapter", "adapter_config.json", "best", "v1")]
    config.save_pretrained(tmp_path / "other")
    assert sorted(asked[1:]) == [("me/adapter", name, "best", "v1") for name in sorted(COMPANIONS)]
    assert companions_in(tmp_path / "other") == {name: COMPANIONS[name] for name in ("README.md", "edits.jsonl")}


@pytest.fixture
def from_the_hub(monkeypatch, tmp_path):
    """A config loaded from a repository "me/x" with a token; the files beside it are asked for later."""
    LocFTConfig(layers=[1]).save_pretrained(tmp_path / "hub")

    @functools.wraps(peft.config.hf_hub_download)  # PEFT sorts the arguments by its signature
    def download(repo, name, **_):
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr("peft.config.hf_hub_download", download)
    return LocFTConfig.from_pretrained("me/x", token="secret", revision="v2")


def test_a_token_is_not_kept_in_the_config(from_the_hub):
    assert b"secret" not in pickle.dumps(from_the_hub)
    assert from_the_hub._origin[2]["revision"] == "v2"


@pytest.mark.parametrize(("error", "lost"), [(EntryNotFoundError, False), (LocalEntryNotFoundError, True)])
def test_a_ledger_that_is_not_there_is_left_out_but_one_out_of_reach_is_an_error(
    from_the_hub, error, lost, monkeypatch, tmp_path
):
    def download(*_, **__):
        raise error("no file")

    monkeypatch.setattr("peft_locft.tuner.config.hf_hub_download", download)
    if lost:
        with pytest.raises(LocalEntryNotFoundError, match="no file"):
            from_the_hub.save_pretrained(tmp_path / "saved")
    else:
        from_the_hub.save_pretrained(tmp_path / "saved")
        assert [path.name for path in (tmp_path / "saved").iterdir()] == ["adapter_config.json"]
