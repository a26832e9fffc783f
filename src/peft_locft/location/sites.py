"""Where a model's layers, MLPs and attentions are: the modules whose outputs causal tracing restores."""

from __future__ import annotations

import inspect

from torch import nn

from ..tuner.targets import GROUP_PATTERNS
from ..tuner.weights import find_weights, is_linear, language_tower, num_layers


KINDS = ("states", "mlp", "attention")
# By kind and layer, the modules whose outputs are restored together. A layer without an MLP or attention has none.
Sites = dict[str, list[list[nn.Module]]]


def find_sites(base: nn.Module) -> Sites:
    """Find the decoder's layers, and the parts of each that belong to its MLP and to its attention.

    Args:
        base (`torch.nn.Module`):
            The transformers model, without PEFT around it.

    Returns:
        `dict[str, list[list[torch.nn.Module]]]`: By kind, one list of modules a layer.

    Raises:
        `ValueError`: If no list of as many layers as the config states is found.
    """
    count, language = num_layers(getattr(base, "config", None)), language_tower(base)
    tower = base if language is None else base.get_submodule(language)
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        found = sorted({len(module) for module in tower.modules() if isinstance(module, nn.ModuleList)})
        raise ValueError(
            f"{type(base).__name__} has no list of as many decoder layers as its config states: got lists of {found}, "
            f"expected one of {count}. Causal tracing needs a decoder of transformers"
        )
    layers = list(lists[0])  # the outermost one: experts are in lists too
    sites = {"states": [[layer] for layer in layers]}
    for kind in ("mlp", "attention"):
        parts = [_parts(layer, kind) for layer in layers]
        if any(parts):
            sites[kind] = parts
    return sites


def _parts(layer: nn.Module, kind: str) -> list[nn.Module]:
    """The layer's children that belong to a group and hold weights: a norm may be called after what it follows."""
    return [
        _contribution(child)
        for name, child in layer.named_children()
        if GROUP_PATTERNS[kind].search(name) and (is_linear(child) or find_weights(child))
    ]


def _contribution(module: nn.Module) -> nn.Module:
    """The module whose output is added to the residual stream.

    BLOOM's MLP and attention and MPT's MLP get the residual and add it themselves: there, it is their last projection.
    """
    if "residual" not in inspect.signature(module.forward).parameters:
        return module
    return module.get_submodule(find_weights(module)[-1].module)
