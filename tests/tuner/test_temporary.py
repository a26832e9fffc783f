"""Changes to a model that are taken back: also after an error, and one within another."""

import pytest
import torch
from torch import nn

from peft_locft.tuner.temporary import evaluating, replaced_forwards


def test_each_module_is_in_its_own_mode_again():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model.train()
    model[1].eval()

    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError

    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_class_s_own_forward_is_back():
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    expected = module(x)

    with pytest.raises(KeyError), replaced_forwards({module: lambda x: x + 1}):
        assert torch.equal(module(x), x + 1)
        raise KeyError

    assert torch.equal(module(x), expected)
    assert "forward" not in vars(module)


def test_a_forward_that_a_hook_had_put_there_is_back():
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    module.forward = hooked = lambda x: x - 1

    with replaced_forwards({module: lambda x: x + 1}):
        with replaced_forwards({module: lambda x: x + 2}):
            assert torch.equal(module(x), x + 2)
        assert torch.equal(module(x), x + 1)

    assert module.forward is hooked
