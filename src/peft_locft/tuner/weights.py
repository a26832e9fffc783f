"""The weights of a model that can be edited, by name: linear layers, embeddings and fused experts, and their towers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .quantization import backend_of


_LAYER_INDEX = re.compile(r"(?:^|.*?\.)(?P<list>[^.]*)\.(?P<index>\d+)\.")


@dataclass(frozen=True)
class Weight:
    """One editable weight.

    Args:
        module (`str`):
            The full name of the module that holds it.
        kind (`str`):
            `"linear"`, `"embedding"`, or `"experts"`: a 3-D parameter that stacks one matrix for each expert.
        parameter (`str`, *optional*, defaults to `"weight"`):
            The parameter's name in its module.
        num_experts (`int`, *optional*):
            How many experts are stacked; `None` for other kinds.
    """

    module: str
    kind: str
    parameter: str = "weight"
    num_experts: int | None = None

    @property
    def name(self) -> str:
        """What `target_modules` calls it (`str`)."""
        return self.module if self.parameter == "weight" else f"{self.module}.{self.parameter}"

    def expert_name(self, expert: int) -> str:
        """Return what `target_modules` calls one of the experts: as in a list of modules, `experts.3.down_proj`.

        Args:
            expert (`int`):
                Its index.

        Returns:
            `str`: The full name.
        """
        return f"{self.module}.{expert}" + ("" if self.parameter == "weight" else f".{self.parameter}")


def find_weights(model: nn.Module) -> list[Weight]:
    """Return the editable weights of a model, those that adapters already wrap included, under their own names.

    Args:
        model (`torch.nn.Module`):
            The model.

    Returns:
        `list[Weight]`: In the order of the model's modules.
    """
    weights: list[Weight] = []
    wrapped = None
    for name, module in model.named_modules():
        if not name or (wrapped and name.startswith(wrapped)):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrapped = f"{name}."  # what an adapter trains as a full copy is no place for the delta of another one
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped = f"{name}."  # what an adapter wraps and adds goes by the name of the module it adapts
            module = module.get_base_layer()
        if isinstance(module, nn.Embedding):
            weights.append(Weight(name, "embedding"))
        elif is_linear(module):
            weights.append(Weight(name, "linear"))
        else:
            weights.extend(Weight(name, "experts", *found) for found in fused_experts(module).items())
    return weights


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by one matrix: a linear layer, transformers' `Conv1D`, or a quantised one of these.

    Args:
        module (`torch.nn.Module`):
            The module.

    Returns:
        `bool`: Whether it is linear.
    """
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    if next(module.children(), None) is not None:
        return False
    backend = backend_of(module)
    return backend is not None and backend.layer_type == "linear"


def fused_experts(module: nn.Module) -> dict[str, int]:
    """Return the parameters of a module that stack one matrix for each expert of a mixture.

    Args:
        module (`torch.nn.Module`):
            The module.

    Returns:
        `dict[str, int]`: The number of experts by the parameter's name.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}  # whose weights have three dimensions too
    return {
        name: parameter.shape[0]
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.shape[0] > 1 and parameter.is_floating_point()
    }


def layer_index(name: str, layers_pattern: str | Iterable[str] | None = None) -> int | None:
    """Return the layer that a module belongs to: the first number in its name, as PEFT counts.

    Args:
        name (`str`):
            The module's full name.
        layers_pattern (`str` or `Iterable[str]`, *optional*):
            The names that the list of layers may have.

    Returns:
        `int` or `None`: The index, or `None` for a module outside of layers.
    """
    if not layers_pattern:
        match = _LAYER_INDEX.match(name)
        return int(match["index"]) if match else None
    for pattern in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern:
        # A name and no expression: a config from the Hub may hold one that would never end.
        match = re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(?P<index>\d+)\.", name)
        if match:
            return int(match["index"])
    return None


def layer_list(name: str) -> str | None:
    """Return the name of the list of layers with which a module's name begins, as in a bare decoder.

    Args:
        name (`str`):
            The module's full name.

    Returns:
        `str` or `None`: The list's name; `None` where anything stands before it.
    """
    match = _LAYER_INDEX.match(name)
    return match["list"] if match and match.start("list") == 0 else None


def layers_name(name: str) -> str | None:
    """Return the full name of the list of layers that a module is in.

    Args:
        name (`str`):
            The module's full name.

    Returns:
        `str` or `None`: For example `"model.layers"`; `None` for a module outside of layers.
    """
    match = _LAYER_INDEX.match(name)
    return name[: match.end("list")] if match else None


def in_layer(name: str) -> str:
    """Return the part of a name behind the layer's number; the whole name of a module outside of layers.

    Args:
        name (`str`):
            The module's full name.

    Returns:
        `str`: For example `"mlp.down_proj"`.
    """
    return _LAYER_INDEX.sub("", name, count=1)


def base_of(model: nn.Module) -> nn.Module:
    """Return the model that PEFT wraps, with what its adapters put into it; another model as it is.

    Args:
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or [`~peft.PeftMixedModel`]):
            The model.

    Returns:
        `torch.nn.Module`: The transformers model.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def num_layers(config: PreTrainedConfig | None) -> int | None:
    """Return the number of decoder layers that a model's config states.

    Args:
        config ([`~transformers.PreTrainedConfig`], *optional*):
            The model's config.

    Returns:
        `int` or `None`: The number, of the text model where there are several.
    """
    if not isinstance(config, PreTrainedConfig):
        return None
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)


def context_length(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model takes, as its config states.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's config.

    Returns:
        `int` or `None`: The number, of the text model where there are several.
    """
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def language_tower(model: nn.Module) -> str | None:
    """Return the name of the text model inside a model that has other towers too, of images or sound.

    Args:
        model (`torch.nn.Module`):
            The model.

    Returns:
        `str` or `None`: The module's full name, or `None` where there is only one tower.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or getattr(config, "is_encoder_decoder", False):
        return None
    if config.get_text_config(decoder=True) is config:
        return None
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    return next((name for name, module in model.named_modules() if name and module is decoder), None)


def other_tower(name: str, language: str | None) -> str | None:
    """Return the tower that a module is in, if it is not the text model.

    Args:
        name (`str`):
            The module's full name.
        language (`str`, *optional*):
            The text model's name, of [`language_tower`].

    Returns:
        `str` or `None`: The tower's full name; `None` for the text model and for what stands beside all towers.
    """
    if language is None or name == language or name.startswith(f"{language}."):
        return None
    mine, theirs = name.split("."), language.split(".")
    depth = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), len(theirs))
    # What is not a part of anything at that depth, such as the head, belongs to the text.
    return ".".join(mine[: depth + 1]) if len(mine) > depth + 1 else None
