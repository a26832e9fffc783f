"""A pytest plugin that puts `LocFTConfig` into the parameter lists of PEFT's own tests, and runs only what is ours.

PEFT's files are not changed: their lists are, after import, before pytest reads them. Tests that are written for one
method by name run with that name standing for LocFT, where what they check is common to all methods.
"""

import functools
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import tiny_models

from peft_locft import LocFTConfig


# (the test, the reason): what PEFT tests for all its methods or for LoRA and what cannot be asked of LocFT.
NOT_APPLICABLE = {
    "test_save_pretrained_pickle": "saves a pickle and loads it; LocFT refuses pickles, which can run code",
    "test_save_pretrained_selected_adapters_pickle": "saves a pickle and loads it; LocFT refuses pickles",
    "test_mixed_adapter_batches_lora_opt_timing": "needs an accelerator and a model from the Hub, and asserts times",
    "test_mixed_adapter_batches_lora_conv2d": "image convolutions are no weights of a decoder",
    "test_mixed_adapter_batches_mha_raises": "`torch.nn.MultiheadAttention` is no layer of a decoder",
    "test_from_pretrained": "loads a LoRA from the Hub",
    "test_from_pretrained_cache_dir": "loads a LoRA from the Hub",
    "test_save_pretrained_with_runtime_config": "loads a LoRA from the Hub",
    "test_lora_conversion[GPT2]": "a random dense delta of width 16 is no matrix of rank 8: half of it is lost, and the "
    "test's bound is one half. Trained deltas: see the table of sizes in the documentation",
}


# So that the suite cannot shrink in silence when PEFT renames something.
LEAST = {"test_custom_models": 500, "test_decoder_models": 200, "test_config": 25}
# PEFT names the methods that a test is for in the test itself: (part of the test's name, the method that LocFT takes the
# place of in it).
STANDS_FOR = (
    ("mixed_adapter_batches", "LoraConfig"),
    ("weighted_combination_of_adapters", "IA3Config"),
    ("GPT2", "LoHaConfig"),
)


def _stub(name: str, **content: object) -> None:
    """Stand in for a library of which the tests import something without using it."""
    if importlib.util.find_spec(name) is None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        sys.modules[name] = module


def pytest_sessionstart(session: pytest.Session) -> None:
    _stub("diffusers", StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))  # for models of images
    _stub("sklearn")  # AdaMSS asks whether it is there
    from tests import test_config, test_custom_models, test_decoder_models, test_lora_conversion

    _extend_custom(test_custom_models)
    test_config.ALL_CONFIG_CLASSES += ((LocFTConfig, {}),)  # a tuple: its users are given a new one below
    for module in (test_config, test_custom_models, test_decoder_models, test_lora_conversion):
        _extend_marks(module)
    test_config.LAYER_INDEXING_CONFIG_CLASSES.append((LocFTConfig, {}))
    test_decoder_models.ALL_CONFIGS.append((LocFTConfig, {"task_type": "CAUSAL_LM", "target_modules": None}))
    folders = tiny_models.build(Path(os.environ["LOCFT_CONFORMANCE_MODELS"]))
    for models in (test_decoder_models.PEFT_DECODER_MODELS_TO_TEST, test_decoder_models.SMALL_GRID_MODELS):
        names = [model.split("/")[-1] for model in models]
        models[:] = [folders[name] for name in names if name in folders]


def _extend_custom(module: ModuleType) -> None:
    def row(name: str, model: str, *targets: str, **settings: object) -> tuple:
        return (f"{name} LocFT", model, LocFTConfig, {"target_modules": list(targets), **settings})

    module.TEST_CASES[:] = [
        ("Vanilla MLP 1 LocFT", "MLP", LocFTConfig, {"target_modules": "lin0"}),
        row("Vanilla MLP 2", "MLP", "lin0"),
        row("Vanilla MLP 3", "MLP", "lin1"),
        row("Vanilla MLP 4", "MLP", "lin0", "lin1"),
        row("Vanilla MLP 5", "MLP", "lin0", modules_to_save=["lin1"]),
        row("Vanilla MLP 6", "MLP", "lin0", exclude_modules=["lin1"]),
        row("Embedding + transformers Conv1D 1", "EmbConv1D", "conv1d"),
        row("Embedding + transformers Conv1D 2", "EmbConv1D", "emb"),
        row("Embedding + transformers Conv1D 3", "EmbConv1D", "emb", "conv1d"),
    ]
    module.ALL_PEFT_CONFIG_CLASSES[:] = [LocFTConfig]
    for name, first, second in (("Same", "lin0", "lin0"), ("Different", "lin0", "lin1")):
        module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES.append(
            (
                f"LocFT {name}",
                "locft",
                LocFTConfig,
                {"target_modules": [first], "init_weights": False},
                {"target_modules": [second], "init_weights": False},
            )
        )


def _extend_marks(module: ModuleType) -> None:
    """Add a row for LocFT to the parameters of single tests, after the row of LoRA that it is made from."""
    from peft import LoraConfig

    for cls in [value for value in vars(module).values() if isinstance(value, type)]:
        for function in vars(cls).values():
            for mark in getattr(function, "pytestmark", []):
                if mark.name != "parametrize" or not isinstance(mark.args[1], (list, tuple)):
                    continue
                rows = mark.args[1]
                if isinstance(rows, tuple) and (LocFTConfig, {}) not in rows and len(rows) > 20:
                    object.__setattr__(mark, "args", (mark.args[0], (*rows, (LocFTConfig, {})), *mark.args[2:]))
                elif isinstance(rows, list):
                    rows += [tuple(map(_like_lora, row)) for row in rows if _is_of(row, LoraConfig)]


def _is_of(row: object, kind: type) -> bool:
    return isinstance(row, tuple) and any(type(value) is kind for value in row)


def _like_lora(value: object) -> object:
    """A `LoraConfig` as the `LocFTConfig` that means the same."""
    from peft import LoraConfig

    if type(value) is not LoraConfig:
        return value.replace("LoRA", "LocFT") if isinstance(value, str) else value
    settings = {name: getattr(value, name) for name in ("task_type", "target_modules", "modules_to_save")}
    return LocFTConfig(**settings, init_weights=value.init_lora_weights)


@pytest.fixture(autouse=True)
def _locft_for_lora(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the tests of `requires_grad`, LoRA's name stands for LocFT, and its two matrices for the one delta."""
    stands_for = next((method for part, method in STANDS_FOR if part in request.node.name), None)
    if stands_for and request.module.__name__.endswith("test_decoder_models"):
        from tests import testing_common

        monkeypatch.setattr(testing_common, stands_for, LocFTConfig)
        monkeypatch.setattr(request.module, stands_for, LocFTConfig, raising=False)
    if _is_requires_grad_test(request.node):
        monkeypatch.setattr(request.module, "LoraConfig", _locft_config)
        check = request.cls.check_requires_grad

        @functools.wraps(check)
        def check_delta(self: object, model: object, *expected: str) -> None:
            names = [name.replace("lora_embedding_A", "lora_A").replace("lora_A", "locft_delta") for name in expected]
            names = [f"{name}.weight" if not name.endswith((".weight", ".bias")) else name for name in names]
            return check(
                self, model, *[name for name in names if "lora_B" not in name and "lora_embedding_B" not in name]
            )

        monkeypatch.setattr(request.cls, "check_requires_grad", check_delta)


def _locft_config(**settings: object) -> LocFTConfig:
    kept = ("target_modules", "modules_to_save", "task_type", "inference_mode")
    return LocFTConfig(**{name: value for name, value in settings.items() if name in kept})


def _is_requires_grad_test(item: pytest.Item) -> bool:
    is_common = any(
        part in item.name for part in ("grad_lora_different", "grad_lora_same", "grad_lora_emb", "modules_to_save")
    )
    return item.cls is not None and item.cls.__name__ == "TestRequiresGrad" and is_common


def _is_ours(item: pytest.Item) -> bool:
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    flat = [part for value in values for part in (value if isinstance(value, tuple) else [value])]
    if any(value is LocFTConfig or isinstance(value, LocFTConfig) for value in flat):
        return True
    return _is_requires_grad_test(item) or item.name == "test_from_peft_type"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _is_ours(item)]
    for suite, least in LEAST.items():
        count = sum(suite in item.nodeid for item in items)
        if count < least and not config.option.keyword:
            raise pytest.UsageError(
                f"{suite} has {count} tests of LocFT, expected at least {least}: PEFT's parameter lists are called or made "
                "in another way than this plugin knows"
            )
    for item in items:
        reason = NOT_APPLICABLE.get(item.originalname)
        if item.originalname == "test_lora_conversion" and "GPT2" in item.name:
            reason = NOT_APPLICABLE["test_lora_conversion[GPT2]"]
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"does not apply to LocFT: {reason}"))
