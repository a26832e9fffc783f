"""The places of the search: a layer, and a group of modules in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..tuner import LocFTConfig, default_module, num_layers
from ..tuner.messages import raise_layers_out_of_range
from ..tuner.targets import resolve_targets
from ..tuner.weights import find_weights, language_tower, layer_index, other_tower


# LocFT-BF, section 4.2: the groups of the paper's study, from the whole layer down to single projections.
GROUPS = ("layer", "attention", "mlp", "up", "down")
# What stands beside a down projection of this name. Where a model computes gate and up in one, that one is meant.
_BESIDE = {
    "down_proj": ("up_proj", "gate_up_proj"),
    "c_proj": ("c_fc",),  # GPT-2, GPT-Neo, GPTBigCode, StarCoder2
    "dense_4h_to_h": ("dense_h_to_4h",),  # GPT-NeoX, BLOOM, Falcon
    "fc_out": ("fc_in",),  # GPT-J, CodeGen
    "fc2": ("fc1",),  # Phi, OPT, BioGPT, XGLM
    "output_linear": ("input_linear",),  # GraniteMoeShared
    "w2": ("w3",),  # LFM2
}


class Place(NamedTuple):
    """Where to train.

    Args:
        layer (`int`):
            The layer, counted from 0.
        group (`str`):
            One of `GROUPS`.
        module (`str`):
            What `target_modules` calls it in this model.
    """

    layer: int
    group: str
    module: str

    @property
    def config(self) -> LocFTConfig:
        """The config that trains here ([`LocFTConfig`])."""
        return LocFTConfig(layers=[self.layer], target_modules=[self.module], task_type="CAUSAL_LM")

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.module if self.module != 'layer' else 'all modules'}"


def find_places(
    model: PreTrainedModel, layers: Sequence[int] | None = None, groups: Sequence[str] = GROUPS
) -> list[Place]:
    """Return the places of a model: some layers times some groups.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        layers (`Sequence[int]`, *optional*):
            The layers; negative ones count from the last. Defaults to all. Of all layers, those that do not have a group
            are left out of it, as attention in a hybrid model.
        groups (`Sequence[str]`, *optional*):
            Some of `GROUPS`. Defaults to all five.

    Returns:
        `list[Place]`: At least one, layer by layer.

    Raises:
        `ValueError`: If a group is unknown, or a layer that was asked for does not exist or does not have a group.
    """
    unknown = [group for group in groups if group not in GROUPS]
    if unknown or not groups:
        raise ValueError(f"`groups` is {list(groups)}, expected some of {list(GROUPS)}")
    count = num_layers(getattr(model, "config", None))
    if not count:
        raise ValueError(
            f"the config of {type(model).__name__} has no `num_hidden_layers`: it has no layers to search"
        )
    if isinstance(layers, int):
        raise ValueError(f"`layers` is {layers}, expected a list of numbers, such as [{layers}]")
    outside = [layer for layer in layers or () if not -count <= layer < count]
    if outside:
        raise_layers_out_of_range(outside, count)
    asked = range(count) if layers is None else sorted({layer % count for layer in layers})
    places = []
    for layer in asked:
        for group in dict.fromkeys(groups):
            try:
                place = Place(layer, group, _module_of(model, layer, group))
                resolve_targets(place.config, model)
                places.append(place)
            except ValueError:
                if layers is not None:
                    raise
    if not places:
        raise ValueError(f"{type(model).__name__} has no modules of the groups {list(groups)} in its layers")
    return places


def _module_of(model: nn.Module, layer: int, group: str) -> str:
    if group not in ("up", "down"):
        return group
    down = default_module(model, [layer])
    return down if group == "down" else up_module(model, layer, down)


def up_module(model: nn.Module, layer: int, down: str) -> str:
    """Return the name of the MLP's up projection.

    Args:
        model (`torch.nn.Module`):
            The model.
        layer (`int`):
            The layer that must have it.
        down (`str`):
            The name of the down projection, of [`default_module`].

    Returns:
        `str`: The end of the module's name, such as `"mlp.up_proj"`.

    Raises:
        `ValueError`: If there is no module of a known name.
    """
    around, dot, name = down.rpartition(".")
    language = language_tower(model)
    names = [
        weight.name
        for weight in find_weights(model)
        if layer_index(weight.name) == layer and other_tower(weight.name, language) is None
    ]
    candidates = [f"{around}{dot}{up}" for up in _BESIDE[name]]
    for candidate in candidates:
        if any(found.endswith(f".{candidate}") for found in names):
            return candidate
    raise ValueError(
        f"layer {layer} of {type(model).__name__} has no up projection of a known name: expected one of {candidates} beside "
        f"its {down}. Leave the group 'up' out"
    )
