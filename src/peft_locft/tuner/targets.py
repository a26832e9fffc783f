"""Which weights of a model a config means: by name, by group, by layer, by expert; what matches nothing is an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from peft.utils.constants import DUMMY_TARGET_MODULES, INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel

from .config import LocFTConfig
from .expressions import match_names
from .messages import raise_layers_out_of_range, raise_missing_layers, raise_unmatched, shown
from .weights import (
    Weight,
    find_weights,
    fused_experts,
    in_layer,
    is_linear,
    language_tower,
    layer_index,
    layer_list,
    layers_name,
    num_layers,
    other_tower,
)


# The names that architectures give the last projection of their MLP, the most specific first.
DOWN_PROJECTIONS = (
    "mlp.down_proj",  # Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3, OLMo, Cohere, Granite, SmolLM3, GLM, ...
    "mlp.c_proj",  # GPT-2, GPT-Neo, GPTBigCode, StarCoder2, Qwen
    "mlp.dense_4h_to_h",  # GPT-NeoX, BLOOM, Falcon
    "mlp.fc_out",  # GPT-J, CodeGen
    "mlp.fc2",  # Phi
    "fc2",  # OPT, BioGPT, XGLM
    "ffn.down_proj",  # MPT
    "feed_forward.down_proj",  # Llama 4's and Jamba's dense layers
    "feed_forward.w2",  # LFM2
    "mlp.shared_expert.down_proj",  # Qwen2-MoE
    "mlp.shared_experts.down_proj",  # DeepSeek
    "shared_mlp.output_linear",  # GraniteMoeShared
    "mlp.experts.down_proj",  # Mixtral, Qwen3-MoE, gpt-oss: all experts
    "block_sparse_moe.experts.down_proj",  # GraniteMoe
    "feed_forward.experts.down_proj",  # Jamba
)
# LocFT-BF, section 4.2: the groups of modules that the paper's search goes through, beside single projections.
GROUP_PATTERNS = {
    "layer": re.compile(""),
    "attention": re.compile(r"attn|attention", re.I),
    # Not behind "attention": JetMoE's attention has experts too.
    "mlp": re.compile(r"^(?:(?!attn|attention).)*?(?:mlp|feed_forward|ffn|moe|expert)|^fc\d", re.I),
}
EDITABLE = "a `torch.nn.Linear`, a `transformers.pytorch_utils.Conv1D`, a `torch.nn.Embedding`, or fused experts"
_ROUTERS = {"gate", "router", "shared_expert_gate"}  # they choose experts and hold no facts


class _Found(NamedTuple):
    weight: Weight
    expert: int | None = None  # one of the weight's experts, or None for the whole weight


Targets = dict[str, dict[str, "tuple[int, ...] | None"]]


def resolve_targets(config: LocFTConfig, model: nn.Module) -> tuple[Targets, set[str]]:
    """Find the weights that a config means; fill in its default modules and turn its layers into indices from 0.

    Args:
        config ([`LocFTConfig`]):
            The config, changed in place.
        model (`torch.nn.Module`):
            The model to be adapted.

    Returns:
        `tuple[dict[str, dict[str, tuple[int, ...] | None]], set[str]]`: By module and parameter, the experts to edit,
        `None` for a weight without experts; and the modules of which `exclude_modules` or `modules_to_save` takes out
        something.

    Raises:
        `ValueError`: If no default is known, or if a layer, a module or an expert matches nothing.
    """
    if config.target_modules == DUMMY_TARGET_MODULES:
        return {}, set()
    weights = find_weights(model)
    language = language_tower(model)
    _check_left_out(config, model, weights, language)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config.target_modules = _all_linear(model, weights, language)
    if config.target_modules is None:
        if config.layers is not None:
            config.set_layers(_resolve_layers(config, model, _of_tower(weights, None, language), language))
        config.target_modules = {default_module(model, config.layers, config.layers_pattern)}
    is_expression = isinstance(config.target_modules, str)
    specs = [config.target_modules] if is_expression else sorted(config.target_modules)
    by_spec = {spec: _find(spec, weights, language, config.layers_pattern, is_expression) for spec in specs}
    unmatched = [spec for spec, found in by_spec.items() if not found]
    if unmatched:
        _check_kinds(unmatched, model)
        raise_unmatched(unmatched, weights, language, is_expression)
    if language is None and not is_expression:
        _check_one_stack(by_spec, model)
    if config.layers is not None:
        towers = {other_tower(found.weight.name, language) for spec in by_spec.values() for found in spec}
        if len(towers) > 1:
            raise ValueError(
                f"`layers` is {config.layers} and `target_modules` {specs} are in several towers of the model, "
                f"{sorted(tower or language for tower in towers)}: make one adapter for each tower"
            )
        config.set_layers(_resolve_layers(config, model, _of_tower(weights, towers.pop(), language), language))
        by_spec = {spec: _in_layers(spec, found, config, weights) for spec, found in by_spec.items()}
    # What `exclude_modules` or `modules_to_save` leaves out is taken off last, so that it counts as no missing match.
    excluded = set(_single(_excluded(config, weights, language)))
    targets = _targets(one for found in by_spec.values() for one in _single(found) if one not in excluded)
    return targets, {one.weight.module for one in excluded}


def expanded_expression(config: LocFTConfig, model: nn.Module) -> set[str] | str | None:
    """Return a config's `target_modules`, with the full names that match in the place of a regular expression.

    Args:
        config ([`LocFTConfig`]):
            The config.
        model (`torch.nn.Module`):
            The model to be adapted.

    Returns:
        `set[str]`, `str` or `None`: The names; what is no regular expression is returned as it is.

    Raises:
        `ValueError`: If the expression is faulty, takes too long, or matches nothing.
    """
    modules = config.target_modules
    if not isinstance(modules, str) or modules == DUMMY_TARGET_MODULES:
        return modules
    if modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return modules
    weights, language = find_weights(model), language_tower(model)
    found = _expression(modules, weights, language, "target_modules")
    if not found:
        others = [weight.name for weight in weights if other_tower(weight.name, language)]
        towers = sorted({other_tower(name, language) for name in match_names(modules, others, "target_modules")})
        if towers:
            raise ValueError(
                f"`target_modules` {shown([modules])} matches only in {shown(towers)}, and the language tower {language} "
                f"is edited unless another is named: write '{towers[0].rpartition('.')[2]}' in the expression"
            )
        _check_kinds([modules], model)
        raise_unmatched([modules], weights, language, is_expression=True)
    return {weight.name if expert is None else weight.expert_name(expert) for weight, expert in found}


def default_module(
    model: nn.Module, layers: list[int] | None = None, layers_pattern: str | Iterable[str] | None = None
) -> str:
    """Return the name of the MLP's down projection, one that all the given layers have.

    Args:
        model (`torch.nn.Module`):
            The model.
        layers (`list[int]`, *optional*):
            The layers that must have it. If left out, at least one layer has to.
        layers_pattern (`str` or `Iterable[str]`, *optional*):
            The names that the list of layers may have.

    Returns:
        `str`: The end of the module's name, such as `"mlp.down_proj"`.

    Raises:
        `ValueError`: If the model has no module of a known name.
    """
    language = language_tower(model)
    names = [w.name for w in _of_tower(find_weights(model), None, language) if w.kind != "embedding"]
    for module in DOWN_PROJECTIONS:
        having = {layer_index(name, layers_pattern) for name in names if name.endswith(f".{module}")} - {None}
        if having and having.issuperset(layers or ()):
            return module
    where = "" if layers is None else f" in layers {layers}"
    raise ValueError(
        f"Please specify `target_modules` in `peft_config`: {type(model).__name__} has no down projection of a known "
        f"name{where}. Its linear modules are {shown(dict.fromkeys(map(in_layer, names)))}"
    )


def _excluded(config: LocFTConfig, weights: list[Weight], language: str | None) -> Iterator[_Found]:
    is_expression = isinstance(config.exclude_modules, str)
    for spec in [config.exclude_modules] if is_expression else sorted(config.exclude_modules or ()):
        yield from _find(spec, weights, language, config.layers_pattern, is_expression, field="exclude_modules")
    for module in config.modules_to_save or ():
        yield from (_Found(weight) for weight in weights if f".{module}." in f".{weight.name}.")


def _single(found: Iterable[_Found]) -> Iterator[_Found]:
    """Whole fused weights as their single experts, so that these can be compared."""
    for weight, expert in found:
        if weight.num_experts is None or expert is not None:
            yield _Found(weight, expert)
        else:
            yield from (_Found(weight, expert) for expert in range(weight.num_experts))


def _find(
    spec: str,
    weights: list[Weight],
    language: str | None,
    layers_pattern: str | list[str] | None,
    is_expression: bool,
    field: str = "target_modules",
) -> list[_Found]:
    """What an entry means, the first of these that there is: a group, a weight, an expert, a part of the model."""
    if is_expression:
        return _expression(spec, weights, language, field)
    tower, rest = _asked_tower(spec, weights, language)
    weights = _of_tower(weights, tower, language)
    if not rest:
        return [_Found(w) for w in weights if w.kind != "embedding"]
    if rest in GROUP_PATTERNS:
        return [_Found(w) for w in weights if _is_in_group(rest, w, layers_pattern)]
    named = [_Found(w) for w in weights if _is_end(rest, w.name)]
    return named or [*_named_experts(rest, weights, field)] or [_Found(w) for w in weights if _is_part(rest, w)]


def _is_end(spec: str, name: str) -> bool:
    return name == spec or name.endswith(f".{spec}")


def _is_part(spec: str, weight: Weight) -> bool:
    """Whether a spec names a module around the weight, such as `self_attn` or `mlp.shared_expert`."""
    return weight.kind != "embedding" and f".{spec}." in f".{weight.name}."


def _is_in_group(group: str, weight: Weight, layers_pattern: str | list[str] | None) -> bool:
    if weight.kind == "embedding" or layer_index(weight.name, layers_pattern) is None:
        return False
    part = in_layer(weight.name)
    # A router may be a module of its own, as JetMoE's `mlp.router.layer`.
    return _ROUTERS.isdisjoint(part.split(".")) and bool(GROUP_PATTERNS[group].search(part))


def _named_experts(spec: str, weights: list[Weight], field: str) -> Iterator[_Found]:
    """One expert of fused weights, called as in a list of modules: `mlp.experts.3.down_proj`, or `mlp.experts.3`."""
    for match in re.finditer(r"(?:^|\.)(-?\d+)(?=\.|$)", spec):
        before, after = spec[: match.start()], spec[match.end() :].removeprefix(".")
        number = int(match[1])
        for weight in weights:
            if weight.num_experts is None or not before or not _is_end(before, weight.module):
                continue
            if after and (after != weight.parameter or weight.parameter == "weight"):
                continue
            if not -weight.num_experts <= number < weight.num_experts:
                raise ValueError(
                    f"`{field}` has {spec!r}, but {weight.name} has the {weight.num_experts} experts 0 to "
                    f"{weight.num_experts - 1} (or -{weight.num_experts} to -1 from the last)"
                )
            yield _Found(weight, number % weight.num_experts)


def _expression(expression: str, weights: list[Weight], language: str | None, field: str) -> list[_Found]:
    """A regular expression over whole names, which says itself whether another tower is meant."""
    names: dict[str, _Found] = {}
    for weight in weights:
        tower = other_tower(weight.name, language)
        if tower is not None and tower.rpartition(".")[2] not in expression:
            continue
        names.update({weight.expert_name(expert): _Found(weight, expert) for expert in range(weight.num_experts or 0)})
        names[weight.name] = _Found(weight)
    found = [names[name] for name in match_names(expression, list(names), field)]
    whole = {weight for weight, expert in found if expert is None}
    return [one for one in found if one.expert is None or one.weight not in whole]


def _all_linear(model: nn.Module, weights: list[Weight], language: str | None) -> set[str]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    left_out = {name for name, module in model.named_modules() if module is head and head is not None}
    return {w.name for w in _of_tower(weights, None, language) if w.kind == "linear" and w.name not in left_out}


def _asked_tower(spec: str, weights: list[Weight], language: str | None) -> tuple[str | None, str]:
    """The tower that a spec begins with, if it is not the text model, and the rest of the spec."""
    towers = {other_tower(weight.name, language) for weight in weights} - {None}
    for tower in sorted(towers, key=len, reverse=True):
        if spec.startswith(f"{tower}."):
            return tower, spec  # a full name
        last = tower.rpartition(".")[2]
        if spec in (tower, last) or spec.startswith(f"{last}."):
            return tower, "" if spec in (tower, last) else spec.removeprefix(f"{last}.")
    return None, spec


def _of_tower(weights: list[Weight], tower: str | None, language: str | None) -> list[Weight]:
    return [weight for weight in weights if other_tower(weight.name, language) == tower]


def _resolve_layers(config: LocFTConfig, model: nn.Module, weights: list[Weight], language: str | None) -> list[int]:
    names = [weight.name for weight in weights]
    present = {layer_index(name, config.layers_pattern) for name in names} - {None}
    if not present:
        pattern = f", which is {repr(config.layers_pattern)[:200]}" if config.layers_pattern else ""
        raise ValueError(
            f"`layers` is {shown(config.layers)}, but {type(model).__name__} has no numbered layers: leave `layers` "
            f"out, or name their list in `layers_pattern`{pattern}"
        )
    # The longest list is not always the decoder's, so the config counts; other towers are counted as they are.
    is_text = all(other_tower(name, language) is None for name in names)
    count = (num_layers(getattr(model, "config", None)) if is_text else None) or max(present) + 1
    missing = [layer for layer in config.layers if not -count <= layer < count]
    if missing:
        raise_layers_out_of_range(missing, count)
    if not config.layers_pattern:
        # PEFT finds the layers of a bare decoder, whose names begin with "layers.", only if told what they are called.
        lists = [layer_list(name) for name in names if layer_index(name) is not None]
        if all(lists):
            config.layers_pattern = sorted(set(lists))
    return sorted({layer % count for layer in config.layers})


def _in_layers(spec: str, found: list[_Found], config: LocFTConfig, weights: list[Weight]) -> list[_Found]:
    def layer_of(weight: Weight) -> int | None:
        return layer_index(weight.name, config.layers_pattern)

    inside = [one for one in found if layer_of(one.weight) in config.layers]
    if any(one.weight.name == spec and one not in inside for one in found):
        raise ValueError(
            f"`target_modules` has {spec!r}, which is a module outside of `layers` {config.layers}: give the end of its "
            "name to choose by layer, or leave `layers` out"
        )
    missing = sorted(set(config.layers) - {layer_of(one.weight) for one in inside})
    if missing:
        having = sorted({layer_of(one.weight) for one in found} - {None})
        there = [weight.name for weight in weights if weight.kind != "embedding" and layer_of(weight) in missing]
        raise_missing_layers(spec, missing, having, there)
    return inside


def _targets(found: Iterable[_Found]) -> dict[str, dict[str, tuple[int, ...] | None]]:
    targets: dict[str, dict[str, tuple[int, ...] | None]] = {}
    for weight, expert in found:
        parameters = targets.setdefault(weight.module, {})
        before = parameters.get(weight.parameter) or ()
        parameters[weight.parameter] = None if expert is None else tuple(sorted({*before, expert}))
    return targets


def _check_kinds(unmatched: list[str], model: nn.Module) -> None:
    for name, module in model.named_modules():
        # What is of a kind that can be edited is in another tower, or a copy that an adapter saves.
        editable = isinstance(module, nn.Embedding) or is_linear(module) or fused_experts(module)
        if editable or next(module.children(), None) is not None:
            continue
        if any(_is_end(spec, name) for spec in unmatched):
            raise TypeError(
                f"the target module {name!r} is a {type(module).__name__}, expected {EDITABLE}: name other "
                "`target_modules`"
            )


def _check_one_stack(by_spec: dict[str, list[_Found]], model: nn.Module) -> None:
    """Refuse ends of names that modules of several lists of layers have, as of a decoder and an encoder of images."""
    if not isinstance(model, PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        return
    for spec, found in by_spec.items():
        stacks = sorted({layers_name(one.weight.name) for one in found if one.weight.name != spec} - {None})
        if len(stacks) > 1:
            raise ValueError(
                f"`target_modules` has {spec!r}, which means modules in several lists of layers, {shown(stacks)}: say "
                f"which, by full names or by an expression such as {re.escape(stacks[0]) + r'.*'!r} and what follows"
            )


def _check_left_out(config: LocFTConfig, model: nn.Module, weights: list[Weight], language: str | None) -> None:
    """Refuse names of `modules_to_save` and `exclude_modules` that nothing in the model has."""
    names = [name for name, _ in model.named_modules() if name]
    everything = [Weight(name, "linear") for name in names]
    # PEFT itself adds heads of classifiers, of which a model has one.
    asked = [module for module in config.modules_to_save or () if module not in SEQ_CLS_HEAD_NAMES]
    missing = [module for module in asked if not any(_is_end(module, name) for name in names)]
    if missing:
        raise_unmatched(missing, everything, None, what="`modules_to_save`")
    if config.exclude_modules and not isinstance(config.exclude_modules, str):
        missing = [
            spec
            for spec in sorted(config.exclude_modules)
            if not any(f".{spec}." in f".{name}." for name in names)
            and not _find(spec, weights, language, config.layers_pattern, False, field="exclude_modules")
        ]
        if missing:
            raise_unmatched(missing, everything, None, what="`exclude_modules`")
