"""Adapters put where they are asked for or refused, models of given names, one layer by itself, a fresh process."""

import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_locft import LocFTConfig
from peft_locft.tuner import LocFTLinear


@pytest.fixture
def adapt():
    """Put an adapter into a model; return the modules' names and the config as it is then."""

    def adapt(model, **settings):
        adapted = get_peft_model(model, LocFTConfig(**settings))
        return adapted.targeted_module_names, adapted.peft_config["default"]

    return adapt


@pytest.fixture
def refused(make_model):
    """Return the message with which a config is refused, by the tiny Llama if no other model is given."""

    def refused(model=None, error=ValueError, **settings) -> str:
        with pytest.raises(error) as raised:
            get_peft_model(model or make_model(), LocFTConfig(**settings))
        return str(raised.value)

    return refused


@pytest.fixture
def build():
    """Build a model without a config from the names of its linear modules."""

    def build(*names: str) -> nn.Module:
        root = nn.Module()
        for name in names:
            *parents, last = name.split(".")
            module = root
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.Module())
                module = getattr(module, parent)
            module.add_module(last, nn.Linear(2, 2))
        return root

    return build


@pytest.fixture
def uneven(build):
    """Three layers, of which the middle one has no ordinary MLP, as in mixtures of experts."""
    return build("model.layers.0.mlp.down_proj", "model.layers.1.moe.router", "model.layers.2.mlp.down_proj", "head")


@pytest.fixture
def make_layer():
    """Build a layer from 5 to 3 features with random adapters `a` and `b`, of which `a` is active."""

    def make(kind: type = nn.Linear, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> LocFTLinear:
        torch.manual_seed(1)
        base = (nn.Linear(5, 3) if kind is nn.Linear else Conv1D(3, 5)).to(dtype)
        layer = LocFTLinear(base, "a", LocFTConfig())
        layer.update_layer("b", LocFTConfig())
        for name in ("a", "b"):
            delta = layer.locft_delta[name].to(torch.float32)
            nn.init.normal_(delta.weight, std=scale)
        return layer

    return make


@pytest.fixture
def make_adapted(make_model):
    """Build a tiny model with a random delta in layer 1."""

    def make(architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes):
        model = make_model(architecture, **changes).to(dtype)
        torch.manual_seed(2)
        return get_peft_model(model, LocFTConfig(layers=[1], init_weights=False)).eval()

    return make


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def python():
    """Run code in a fresh process, in which nothing is imported yet, and return what it printed."""

    def run(code: str, *arguments: object) -> str:
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run
