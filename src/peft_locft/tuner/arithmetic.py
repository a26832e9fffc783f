"""Arithmetic between adapters, through PEFT's own helpers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from peft.utils.other import ModulesToSaveWrapper

from .config import LocFTConfig
from .experts import LocFTExperts
from .layer import LocFTLayer


if TYPE_CHECKING:
    from .model import LocFTModel


_COMBINATIONS = {
    "linear": lambda deltas, weights, density, method: task_arithmetic(deltas, weights),
    "ties": ties,
    "dare_linear": lambda deltas, weights, density, method: dare_linear(deltas, weights, density),
    "dare_ties": dare_ties,
    "magnitude_prune": lambda deltas, weights, density, method: magnitude_prune(deltas, weights, density),
}
_SIGN_METHODS = ("total", "frequency")


def check_weighted_adapter(
    tuner: LocFTModel,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> None:
    """Check the arguments of [`LocFTModel.add_weighted_adapter`].

    Args:
        tuner ([`LocFTModel`]):
            The tuner.
        adapters (`list[str]`):
            The adapters to combine.
        weights (`list[float]`):
            The weight of each.
        adapter_name (`str`):
            The name of the new adapter.
        combination_type (`str`):
            How to combine them.
        density (`float`, *optional*):
            The share of values to keep.
        majority_sign_method (`str`):
            How TIES elects a sign.

    Raises:
        `ValueError`: If they do not fit together.
    """
    missing = [name for name in adapters if name not in tuner.peft_config]
    if missing or not adapters:
        raise ValueError(f"adapters {missing or adapters} do not exist, expected some of {list(tuner.peft_config)}")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"there already is an adapter {adapter_name!r}: delete it first, or give another name")
    if len(adapters) != len(weights):
        raise ValueError(
            f"there are {len(adapters)} adapters and {len(weights)} weights, expected one weight for each"
        )
    if combination_type not in _COMBINATIONS:
        raise ValueError(f"`combination_type` is {combination_type!r}, expected one of {list(_COMBINATIONS)}")
    if combination_type != "linear" and (density is None or not 0 < density <= 1):
        raise ValueError(f"`density` is {density}, expected a share above 0, and 1 at most, for {combination_type!r}")
    if majority_sign_method not in _SIGN_METHODS:
        raise ValueError(f"`majority_sign_method` is {majority_sign_method!r}, expected one of {list(_SIGN_METHODS)}")
    copies = [module for module in tuner.modules() if isinstance(module, ModulesToSaveWrapper)]
    holding = sorted({name for module in copies for name in adapters if name in module.modules_to_save})
    if holding:
        raise ValueError(
            f"adapters {holding} hold full copies of modules (`modules_to_save`), which are no differences that could be "
            "combined: train them without"
        )


def combined_config(tuner: LocFTModel, adapters: list[str]) -> LocFTConfig:
    """Return the config of an adapter that edits all that some others edit.

    Args:
        tuner ([`LocFTModel`]):
            The tuner.
        adapters (`list[str]`):
            The adapters.

    Returns:
        [`LocFTConfig`]: Where they all name the same places, it does so too; otherwise it lists the places one by one.
    """
    configs = [tuner.peft_config[name] for name in adapters]
    config = copy.deepcopy(configs[0])
    config.renew()  # the ledgers are about the others
    if any((c.targets, c.layers) != (config.targets, config.layers) for c in configs):
        names: set[str] = set()
        for module, layer in tuner.model.named_modules():
            if not isinstance(layer, LocFTLayer):
                continue
            for parameter in {p for name in adapters for p in layer.edited(name)}:
                if isinstance(layer, LocFTExperts):
                    end = "" if parameter == "weight" else f".{parameter}"
                    names.update(f"{module}.{expert}{end}" for expert in _union(layer, adapters, parameter))
                else:
                    names.add(module)
        config.target_modules, config.exclude_modules, config.layers_pattern = names, None, None
        config.layers = config.layers_to_transform = None
    return config


@torch.no_grad()
def combine(
    layer: LocFTLayer,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> None:
    """Fill in one layer's deltas of a combined adapter.

    Args:
        layer (`LocFTLayer`):
            The layer, which already has the new adapter.
        adapters (`list[str]`):
            The adapters to combine; those that do not edit the layer are left out.
        weights (`list[float]`):
            The weight of each.
        adapter_name (`str`):
            The name of the new adapter.
        combination_type (`str`):
            How to combine them.
        density (`float`, *optional*):
            The share of values to keep.
        majority_sign_method (`str`):
            How TIES elects a sign.
    """

    def combined(deltas: list[torch.Tensor], factors: list[float]) -> torch.Tensor:
        deltas = [delta.to(torch.float32) for delta in deltas]
        factors = torch.tensor(factors, device=deltas[0].device, dtype=torch.float32)
        return _COMBINATIONS[combination_type](deltas, factors, density, majority_sign_method)

    if not isinstance(layer, LocFTExperts):
        given = [(name, weight) for name, weight in zip(adapters, weights) if layer.edited(name)]
        delta = combined([layer.get_delta_weight(name) for name, _ in given], [weight for _, weight in given])
        layer.set_delta_weight(adapter_name, delta)
        return
    for parameter in layer.edited(adapter_name):
        # One by one, so that an expert that an adapter does not edit counts as no zeros to be pruned.
        for expert in layer.locft_experts[adapter_name][parameter]:
            pairs = [(layer.expert_delta(name, parameter, expert), w) for name, w in zip(adapters, weights)]
            pairs = [(delta, weight) for delta, weight in pairs if delta is not None]
            layer.expert_delta(adapter_name, parameter, expert).copy_(combined(*map(list, zip(*pairs))))


def _union(layer: LocFTExperts, adapters: list[str], parameter: str) -> set[int]:
    return {expert for name in adapters for expert in layer.locft_experts.get(name, {}).get(parameter, ())}
