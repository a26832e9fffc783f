"""Smaller and more portable forms of an adapter: fewer bits, a lower rank, or a LoRA that other servers know."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from ..edits import LEDGER_NAME, load_edits, write_atomically
from ..tuner import LocFTConfig, LocFTLinear
from .card import edit_card


_PREFIX = "base_model.model."
_DELTA = ".locft_delta.weight"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ExportReport:
    """What an export kept of an adapter.

    Args:
        energy (`float`):
            The share of the energy of all deltas that is kept, `1 - ‖ΔW' - ΔW‖² / ‖ΔW‖²`.
        ranks (`dict[str, int | None]`):
            The rank of each module's delta; `None` for one that stayed dense.
        energies (`dict[str, float]`):
            The share of energy kept, by module.
        size (`int`):
            The size of the weights' file, in bytes.
    """

    energy: float
    ranks: dict[str, int | None]
    energies: dict[str, float]
    size: int


def save_compressed(
    model: PeftModel,
    folder: str | os.PathLike,
    *,
    rank: int | float | None = None,
    dtype: torch.dtype | None = None,
    adapter_name: str = "default",
) -> ExportReport:
    """Save a LocFT adapter in a smaller form, which loads as LocFT.

    Args:
        model ([`~peft.PeftModel`]):
            The edited model. It is left as it is.
        folder (`str` or `os.PathLike`):
            Where to.
        rank (`int` or `float`, *optional*):
            The rank of the two matrices that take the place of each dense delta of a linear layer, by a truncated
            singular value decomposition, the best there is of that rank. A float between 0 and 1 is the share of energy
            to keep, from which each layer gets its rank. Deltas that would not get smaller, and those of embeddings and
            experts, stay dense. Defaults to no change.
        dtype (`torch.dtype`, *optional*):
            The dtype to save in: `torch.bfloat16` or `torch.float16` halve the size. Defaults to the deltas' own.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The adapter.

    Returns:
        [`ExportReport`]: What was kept.

    Raises:
        `ValueError`: If there is no such LocFT adapter, or the rank or dtype cannot be.
    """
    config = _locft_config(model, adapter_name)
    _check(rank, dtype)
    state, report = {}, _Energies()
    small = copy.deepcopy(config)
    dense = _state(model, adapter_name)
    for key, tensor in dense.items():
        stem, _, kind = key.partition(".locft_")
        name = stem.removeprefix(_PREFIX)
        if not kind:
            state[key] = _cast(tensor, dtype)  # a full copy of `modules_to_save`
        elif kind == "A.weight" or _is_linear_delta(model, key):
            # A delta that is compressed already has two matrices, of which the first stands for both.
            factors = (tensor, dense[f"{stem}.locft_B.weight"]) if kind == "A.weight" else None
            delta = tensor if factors is None else factors[1].to(torch.float32) @ factors[0].to(torch.float32)
            smaller = _factors(
                delta, rank, largest=delta.numel() if factors is None else sum(f.numel() for f in factors)
            )
            if (smaller or factors) is None:
                state[key] = _cast(tensor, dtype)
                report.add(name, tensor, state[key].to(torch.float32), None)
                continue
            down, up = (_cast(factor, dtype or tensor.dtype) for factor in smaller or factors)
            state[f"{stem}.locft_A.weight"], state[f"{stem}.locft_B.weight"] = down, up
            small.rank_pattern[name] = len(down)
            report.add(name, delta, up.to(torch.float32) @ down.to(torch.float32), len(down))
        elif kind != "B.weight":
            state[key] = _cast(tensor, dtype)
            report.add(key.removeprefix(_PREFIX).removesuffix(_DELTA), tensor, state[key].to(torch.float32), None)
    return _save(folder, state, small, config, report)


def save_as_lora(
    model: PeftModel,
    folder: str | os.PathLike,
    *,
    rank: int | float,
    dtype: torch.dtype | None = None,
    adapter_name: str = "default",
) -> ExportReport:
    """Save a LocFT adapter as a LoRA, for servers and processes that do not know LocFT.

    A dense delta is not low-rank by nature: read the report, and score the LoRA before you serve it (`locft export`
    does). PEFT's own `peft.save_as_lora` makes the same matrices, without report and ledger.

    Args:
        model ([`~peft.PeftModel`]):
            The edited model. It is left as it is.
        folder (`str` or `os.PathLike`):
            Where to.
        rank (`int` or `float`):
            The rank of the LoRA; a float between 0 and 1 is the share of energy to keep, from which each layer gets its
            rank.
        dtype (`torch.dtype`, *optional*):
            The dtype to save in. Defaults to the deltas' own.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The adapter.

    Returns:
        [`ExportReport`]: What was kept.

    Raises:
        `ValueError`: If there is no such LocFT adapter, or the rank or dtype cannot be.
        `TypeError`: If the adapter edits embeddings or fused experts, which have no such form.
    """
    config = _locft_config(model, adapter_name)
    _check(rank, dtype)
    dense = [key for key in _state(model, adapter_name) if ".locft_" in key and not _is_linear_delta(model, key)]
    dense = [key for key in dense if ".locft_A." not in key and ".locft_B." not in key]
    if dense:
        names = [key.removeprefix(_PREFIX).partition(".locft_")[0] for key in dense]
        raise TypeError(
            f"the adapter edits {names}, which are embeddings or fused experts, expected linear layers: merge it instead"
        )
    state, report, transposed = {}, _Energies(), False
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LocFTLinear) or not layer.edited(adapter_name):
            continue
        is_conv1d = isinstance(layer.get_base_layer(), Conv1D)
        delta = layer.get_delta_weight(adapter_name).detach()
        delta = delta.T if is_conv1d else delta  # (out_features, in_features)
        down, up = (_cast(factor, dtype or delta.dtype) for factor in _factors(delta, rank))
        state[f"{_PREFIX}{name}.lora_A.weight"], state[f"{_PREFIX}{name}.lora_B.weight"] = down, up
        report.add(name, delta, up.to(torch.float32) @ down.to(torch.float32), len(down))
        transposed |= is_conv1d
    if not report.ranks:
        raise ValueError(
            f"the adapter {adapter_name!r} edits no linear layer, so that there is nothing to make a LoRA of"
        )
    copies = {key: tensor for key, tensor in _state(model, adapter_name).items() if ".locft_" not in key}
    state.update({key: _cast(tensor, dtype) for key, tensor in copies.items()})
    return _save(folder, state, _lora_config(model, config, report.ranks, transposed), config, report)


class _Energies:
    """Sums up what an export keeps."""

    def __init__(self) -> None:
        self.total = self.lost = 0.0
        self.ranks: dict[str, int | None] = {}
        self.energies: dict[str, float] = {}

    def add(self, name: str, before: torch.Tensor, after: torch.Tensor, rank: int | None) -> None:
        total = before.to(torch.float32).square().sum().item()
        lost = (after - before.to(torch.float32)).square().sum().item()
        self.total, self.lost = self.total + total, self.lost + lost
        self.ranks[name], self.energies[name] = rank, 1 - lost / total if total else 1.0


def _locft_config(model: PeftModel, adapter_name: str) -> LocFTConfig:
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, LocFTConfig):
        there = {name: type(c).__name__ for name, c in getattr(model, "peft_config", {}).items()}
        raise ValueError(f"the model has no LocFT adapter {adapter_name!r}: its adapters are {there}")
    return config


def _check(rank: int | float | None, dtype: torch.dtype | None) -> None:
    is_rank = type(rank) is int and rank > 0
    if rank is not None and not is_rank and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ValueError(f"`rank` is {rank!r}, expected a positive integer, or a share of energy such as 0.95")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"`dtype` is {dtype}, expected one of {list(_DTYPES)}")


def _state(model: PeftModel, adapter_name: str) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {key: tensor.detach().cpu() for key, tensor in state.items()}


def _is_linear_delta(model: PeftModel, key: str) -> bool:
    if not key.endswith(_DELTA):
        return False
    return isinstance(model.get_submodule(key.removesuffix(_DELTA)), LocFTLinear)


def _factors(
    delta: torch.Tensor, rank: int | float | None, largest: int | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The two matrices whose product is nearest to a delta: (rank, in_features) and (out_features, rank).

    `None` where there is no rank, or where they would have as many numbers as `largest` or more.
    """
    if rank is None:
        return None
    u, s, v = torch.linalg.svd(delta.to(torch.float32), full_matrices=False)
    if isinstance(rank, float):
        energy = s.square().cumsum(0)
        # The smallest rank that keeps the share; rounding must not ask for more than there is.
        count = int((energy < rank * energy[-1]).sum()) + 1
    else:
        count = rank
    count = min(count, len(s))
    if largest is not None and count * sum(delta.shape) >= largest:
        return None
    root = s[:count].sqrt()  # shared out evenly, so that neither factor is rounded more than the other
    # Two factors of zero would have no gradients: where there is nothing to share out, one of them stays as it is.
    down = torch.where(root > 0, root, 1.0)[:, None] * v[:count]
    return down.contiguous(), (u[:, :count] * root).contiguous()


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype or tensor.dtype).contiguous()


def _lora_config(model: PeftModel, config: LocFTConfig, ranks: dict[str, int | None], transposed: bool) -> LoraConfig:
    highest = max(ranks.values())
    lower = {name: rank for name, rank in ranks.items() if rank != highest}
    lora = LoraConfig(
        r=highest,
        lora_alpha=highest,  # a scaling of one
        rank_pattern=lower,
        alpha_pattern=dict(lower),
        target_modules=config.target_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=_literal(config.layers_pattern),
        modules_to_save=config.modules_to_save,
        fan_in_fan_out=transposed,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    names = {name for name, _ in model.get_base_model().named_modules()}
    # A string is not tried: it may come from the Hub, and Python's own engine has no timeout.
    if isinstance(config.target_modules, str) or {
        name for name in names if name and check_target_module_exists(lora, name)
    } != set(ranks):
        # PEFT does not know groups, parts and towers: it gets the full names.
        lora.target_modules, lora.layers_to_transform, lora.layers_pattern = set(ranks), None, None
    return lora


def _literal(patterns: str | list[str] | None) -> list[str] | None:
    # For PEFT they are regular expressions, for LocFT names.
    return [re.escape(name) for name in ([patterns] if isinstance(patterns, str) else patterns)] if patterns else None


def _save(
    folder: str | os.PathLike,
    state: dict[str, torch.Tensor],
    saved_config: PeftConfig,
    config: LocFTConfig,
    report: _Energies,
) -> ExportReport:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saved_config.inference_mode = True
    ledger = config.companions().get(LEDGER_NAME)
    if isinstance(saved_config, LocFTConfig):
        saved_config.set_companions({})  # the scores are those of the dense adapter
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    saved_config.save_pretrained(str(folder))
    if ledger is not None:
        write_atomically(folder / LEDGER_NAME, ledger)
        edits = load_edits(folder / LEDGER_NAME)
        write_atomically(folder / "README.md", edit_card(folder.name, edits, saved_config))
    energy = 1 - report.lost / report.total if report.total else 1.0
    return ExportReport(energy, report.ranks, report.energies, (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size)
