"""`plan_edit`: what an edit will take, before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedConfig

from ..trainer.config import EditConfig
from ..trainer.prefix_cache import Prefix, find_prefix
from ..trainer.setup import automatic_batch_size
from .cards import CardFit, card_fits
from .lengths import edit_lengths
from .meta_model import build_model, dtype_of, load_config
from .passes import Cost, cache_cost, cut, evaluation_cost, training_cost


_READ_AT_ONCE = EditConfig.per_device_eval_batch_size
# As `evaluate_edits` limits answers: the expected tokens and one more, but at least 8.
_LEAST_ANSWER = 8
# Adam keeps a mean and a mean square of each gradient (arXiv 1412.6980), fused, without copies while it steps.
_MOMENTS = 2
# While a checkpoint is written, the two that are kept are still there.
_CHECKPOINTS = EditConfig.save_total_limit + 1
_MOST_IN_MEMORY = EditConfig.prefix_cache_memory * 2**30  # more than that is kept in a file


@dataclass(frozen=True)
class Phase:
    """What a phase takes at its peak, in bytes, by what takes them.

    Args:
        name (`str`):
            `"load"`, `"build cache"`, `"train"`, `"evaluate"` or `"save"`.
        device (`dict[str, int]`):
            On the accelerator. Where there is none, add it to `cpu`.
        cpu (`dict[str, int]`):
            In the computer's own memory.
        disk (`dict[str, int]`):
            On the disk.
    """

    name: str
    device: dict[str, int]
    cpu: dict[str, int]
    disk: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """
    What an edit takes, made by [`plan_edit`]. Sizes are in bytes. Operations are floating-point operations of matrix
    products, a multiplication and an addition counted as two.

    Args:
        model (`str`):
            The model's name, or its architecture.
        parameters (`int`):
            How many weights the model has, tied ones counted once.
        trained_parameters (`int`):
            How many weights the adapter trains.
        dtype (`str`):
            The dtype that the model is loaded in.
        weights (`dict[str, int]`):
            The size of the model's weights by part: `"embeddings"`, `"below"` (the layers below the lowest trained one),
            `"above"` (the trained layers and all above, and whatever else there is) and `"head"`, 0 if it is tied to the
            embeddings. Without a prefix cache, all layers are `"above"`.
        num_edits (`int`):
            How many edits there are.
        tokens (`int`):
            How many tokens they have together, with EOS.
        batch_size (`int`):
            How many edits make a batch.
        prefix_cache (`bool`):
            Whether the layers below the lowest trained one are computed once only.
        offload_prefix (`bool`):
            Whether `phases` are those of a run with `offload_prefix`.
        phases (`tuple[Phase, ...]`):
            The phases in their order, each with `name`, `device`, `cpu` and `disk`: what is taken there, by what takes it.
        cache_flops (`int`):
            The operations of building the cache.
        epoch_flops (`int`):
            The operations of one epoch over all edits.
        cards (`tuple[CardFit, ...]`):
            For common cards: `card`, `memory`, and whether the edit fits, `plain` or `offloaded`.
    """

    model: str
    parameters: int
    trained_parameters: int
    dtype: str
    weights: dict[str, int]
    num_edits: int
    tokens: int
    batch_size: int
    prefix_cache: bool
    offload_prefix: bool
    phases: tuple[Phase, ...]
    cache_flops: int
    epoch_flops: int
    cards: tuple[CardFit, ...]

    @property
    def device_bytes(self) -> int:
        """What the accelerator has to hold in the phase that takes most (`int`)."""
        return _peak(self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON.

        Returns:
            `dict[str, Any]`: The fields, and `device_bytes`.
        """
        return {**asdict(self), "device_bytes": self.device_bytes}


@dataclass(frozen=True)
class _Sizes:
    # What the phases are made of, in bytes.
    weights: dict[str, int]
    loaded: int
    checkpoint: int
    copies: int
    largest_below: int
    adapter: int
    states: int
    costs: dict[str, Cost]


def plan_edit(
    config_or_model_name: PreTrainedConfig | str | os.PathLike,
    peft_config: PeftConfig | None = None,
    *,
    num_edits: int,
    tokens_per_edit: int | Sequence[int] = 20,
    target_tokens: int | Sequence[int] = 5,
    batch_size: int | None = None,
    dtype: str | torch.dtype | None = None,
    frozen_dtype: str | torch.dtype | None = None,
    offload_prefix: bool = False,
    prefix_cache: bool = True,
) -> Plan:
    """Say what an edit will take, from the model's config alone: no weight is loaded and no memory allocated for one.

    The passes of an edit are run with the real model and adapter on torch's meta device, where tensors have a shape and
    no values, and operations and live tensors are counted. The memory of training is that of the longest edits together
    in one batch. Padding is not counted there, because edits share rows where the model allows it: a model that does not
    takes more, if its edits differ much in length. A run that leaves learned edits out takes fewer operations.

    Args:
        config_or_model_name ([`~transformers.PreTrainedConfig`], `str` or `os.PathLike`):
            The model: its config, its name on the Hub, or its folder, of which only `config.json` is read.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Where and how to train, as for [`EditTrainer`]. Defaults to [`LocFTConfig.recommended`].
        num_edits (`int`):
            How many edits there are.
        tokens_per_edit (`int` or `Sequence[int]`, *optional*, defaults to `20`):
            How many tokens an edit has, with target and EOS: the same for all, or one number for each. The default is
            a short factual sentence.
        target_tokens (`int` or `Sequence[int]`, *optional*, defaults to `5`):
            How many of these are target and EOS, which are learned.
        batch_size (`int`, *optional*):
            How many edits make a batch. Defaults to what [`EditTrainer`] chooses: 100, or less for few edits.
        dtype (`str` or `torch.dtype`, *optional*):
            The dtype that the model is loaded in. Defaults to the config's own, or float32 if it names none.
        frozen_dtype (`str` or `torch.dtype`, *optional*):
            What frozen float32 weights are rounded to for training, as for [`EditConfig`]. The float32 ones are kept
            beside, because the model gets them back. Defaults to no rounding. The delta, its gradient and Adam's moments
            are in float32 in any case.
        offload_prefix (`bool`, *optional*, defaults to `False`):
            Whether the layers below the lowest trained one stay on the CPU: brought to the accelerator one at a time
            while the cache is built and in evaluation, and not there in training.
        prefix_cache (`bool`, *optional*, defaults to `True`):
            Whether these layers are computed only once for each edit.

    Returns:
        [`Plan`]: The plan.

    Raises:
        `ValueError`: If there is no such model, it is none that can be edited, or the numbers do not fit together.

    Examples:

    ```python
    >>> plan = plan_edit("Qwen/Qwen2.5-72B", LocFTConfig(layers=[60]), num_edits=1000)
    >>> plan.device_bytes / 2**30  # GiB
    >>> [fit.card for fit in plan.cards if fit.plain]
    ```
    """
    lengths = edit_lengths(num_edits, tokens_per_edit, target_tokens)
    batch_size = _batch_size(batch_size, num_edits)
    is_config = isinstance(config_or_model_name, PreTrainedConfig)
    config = config_or_model_name if is_config else load_config(config_or_model_name)
    lengths.check_context(config)
    loaded = dtype_of(dtype, config)
    rounded = None if frozen_dtype is None else dtype_of(frozen_dtype, config, "frozen_dtype")
    model = build_model(config, peft_config, loaded)
    prefix = find_prefix(model) if prefix_cache else None
    if offload_prefix and prefix is None:
        reason = "no layer is below the trained ones" if prefix_cache else "`prefix_cache` is False"
        raise ValueError(
            f"`offload_prefix` is True and {reason}, so there is nothing to offload: train a higher layer, with the prefix "
            "cache, or leave `offload_prefix` out"
        )

    base = model.get_base_model()
    frozen_count = sum(p.numel() for p in base.parameters() if not p.requires_grad)
    weights = _weights(model, prefix)
    adapter = sum(_size(p) for p in base.parameters() if p.requires_grad)
    read = min(_READ_AT_ONCE, num_edits)
    answer = max(lengths.most_targets, _LEAST_ANSWER)
    costs = {"evaluate": evaluation_cost(model, read, lengths.longest_prompt + answer)}
    states = cache_flops = 0
    if prefix is not None:
        costs["build cache"], entering, outputs = cache_cost(model, prefix, read, lengths.longest)
        typical = costs["build cache"]
        if lengths.mean != lengths.longest:
            typical = cache_cost(model, prefix, read, lengths.mean)[0]
        cache_flops = round(typical.flops / read * num_edits)
        is_rounded = rounded is not None and entering.dtype == torch.float32
        states = lengths.total * entering.shape[-1] * (rounded if is_rounded else entering.dtype).itemsize
        cut(prefix, outputs)
    copies = _round_frozen(model, prefix, rounded) if rounded is not None else 0
    largest, mean = lengths.largest_batch(batch_size), (lengths.mean, lengths.mean_targets)
    costs["train"] = typical = training_cost(model, batch_size, *largest)
    if mean != largest:
        typical = training_cost(model, batch_size, *mean)

    sizes = _Sizes(
        weights=weights,
        loaded=frozen_count * loaded.itemsize,
        checkpoint=frozen_count * dtype_of(None, config).itemsize,
        copies=copies,
        largest_below=max((sum(map(_size, layer.parameters())) for layer in prefix.below), default=0) if prefix else 0,
        adapter=adapter,
        states=states,
        costs=costs,
    )
    plain = _phases(sizes, False)
    offloaded = None if prefix is None else _phases(sizes, True)
    return Plan(
        model=type(base).__name__ if is_config else str(config_or_model_name),
        parameters=frozen_count,
        trained_parameters=sum(p.numel() for p in base.parameters() if p.requires_grad),
        dtype=str(loaded).removeprefix("torch."),
        weights=weights,
        num_edits=num_edits,
        tokens=lengths.total,
        batch_size=batch_size,
        prefix_cache=prefix is not None,
        offload_prefix=offload_prefix,
        phases=offloaded if offload_prefix else plain,
        cache_flops=cache_flops,
        epoch_flops=round(typical.flops / batch_size * num_edits),
        cards=card_fits(_peak(plain), None if offloaded is None else _peak(offloaded)),
    )


def _batch_size(batch_size: int | None, num_edits: int) -> int:
    if batch_size is None:
        return min(automatic_batch_size(num_edits, 1), num_edits)
    least = min(2, num_edits)
    if not isinstance(batch_size, int) or batch_size < least:
        raise ValueError(
            f"`batch_size` is {batch_size} for {num_edits} edits, expected at least {least}: how many edits make a batch"
        )
    return min(batch_size, num_edits)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _weights(model: PeftModel, prefix: Prefix | None) -> dict[str, int]:
    base = model.get_base_model()
    parts = {"embeddings": [base.get_input_embeddings()], "below": prefix.below if prefix is not None else []}
    parts |= {"head": [base.get_output_embeddings()], "above": [base]}
    sizes, counted = {}, set()
    for part, modules in parts.items():  # what is in several, as a tied head, counts in the first
        own = {p for module in modules if module is not None for p in module.parameters() if not p.requires_grad}
        sizes[part] = sum(map(_size, own - counted))
        counted |= own
    return {part: sizes[part] for part in ("embeddings", "below", "above", "head")}


def _round_frozen(model: PeftModel, prefix: Prefix | None, dtype: torch.dtype) -> int:
    """Round the frozen float32 weights that training runs, and return how many bytes the rounded ones take."""
    unused = {id(p) for layer in (prefix.below if prefix is not None else []) for p in layer.parameters()}
    size = 0
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 and not parameter.requires_grad and id(parameter) not in unused:
            parameter.data = parameter.data.to(dtype)
            size += _size(parameter)
    return size


def _phases(sizes: _Sizes, offload: bool) -> tuple[Phase, ...]:
    costs, below = sizes.costs, sizes.weights["below"]
    whole = sum(sizes.weights.values())
    left = whole - below if offload else whole
    # What passes through brings one lower layer at a time.
    passing = left + sizes.largest_below if offload else whole
    aside = {"layers below": below} if offload else {}
    states = {"cached states": sizes.states} if sizes.states else {}
    in_memory, in_file = (states, {}) if sizes.states <= _MOST_IN_MEMORY else ({}, states)
    adapter = {"adapter": sizes.adapter}
    trained = {**adapter, "Adam's moments": _MOMENTS * sizes.adapter}
    phases = [Phase("load", {"weights": left}, {"weights": sizes.loaded}, {"the model's files": sizes.checkpoint})]
    if "build cache" in costs:
        device = {"weights": passing, **adapter, "activations": costs["build cache"].peak}
        phases.append(Phase("build cache", device, {**in_memory, **aside}, in_file))
    rounded = {"rounded weights": sizes.copies} if sizes.copies else {}
    device = {"weights": left, **rounded, **trained, "activations and gradient": costs["train"].peak}
    checkpoints = {"checkpoints": _CHECKPOINTS * sum(trained.values())}
    phases.append(Phase("train", device, {**in_memory, **aside}, {**in_file, **checkpoints}))
    device = {"weights": passing, **trained, "activations with keys and values": costs["evaluate"].peak}
    phases.append(Phase("evaluate", device, aside, {}))
    # The adapter is brought to the CPU to be written.
    phases.append(Phase("save", {"weights": left, **trained}, {**adapter, **aside}, adapter))
    return tuple(phases)


def _peak(phases: Sequence[Phase]) -> int:
    return max(sum(phase.device.values()) for phase in phases)
