"""Changes to a model that are taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from peft import PeftModel
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context, a model is in evaluation mode. Afterwards, each module is in the mode it was in.

    Args:
        model (`torch.nn.Module`):
            The model.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def unedited(model: PeftModel) -> Iterator[None]:
    """Within this context, a model is as it was before its adapters. Afterwards, what was frozen is frozen: PEFT's
    `disable_adapter` lets every active adapter be trained when it ends.

    Args:
        model ([`~peft.PeftModel`]):
            The model.
    """
    with trained_as_before(model), model.disable_adapter():
        yield


@contextmanager
def trained_as_before(model: nn.Module) -> Iterator[None]:
    """After this context, the parameters that could be trained before it can be, and no others.

    Args:
        model (`torch.nn.Module`):
            The model.
    """
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Within this context, modules compute something else.

    Args:
        forwards (`Mapping[torch.nn.Module, Callable]`):
            By module, what stands in for its `forward`.
    """
    own = {module: vars(module).get("forward") for module in forwards}  # accelerate's hooks put one there
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
