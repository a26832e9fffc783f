"""The layers below the lowest trained one, outside the device that trains."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from accelerate import dispatch_model, init_empty_weights
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .config import EditConfig
from .prefix_cache import find_prefix
from .recipes import recipe_config


def load_with_prefix_offloaded(name: str, args: EditConfig, peft_config: PeftConfig | None) -> PreTrainedModel:
    """Load a model whose lower layers stay in the computer's memory, or on disk if there is no accelerator.

    Args:
        name (`str`):
            The model's name on the Hub or its folder.
        args ([`EditConfig`]):
            The training arguments.
        peft_config ([`~peft.PeftConfig`], *optional*):
            What will be trained.

    Returns:
        [`~transformers.PreTrainedModel`]: The model. Its lower layers are streamed in when they are run.
    """
    kwargs = dict(args.model_init_kwargs or {})
    shared = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(name, **shared),
            **{key: value for key, value in shared.items() if key == "trust_remote_code"},
        )
    if peft_config is None and args.recipe == "locaedit":
        raise ValueError(
            "`offload_prefix` is True with `recipe='locaedit'`, which traces all layers to choose some: give `peft_config`, "
            "for example with the layers that `locft trace` proposes"
        )
    peft_config = copy.deepcopy(peft_config) if peft_config is not None else recipe_config(args.recipe, empty)
    device_map = prefix_device_map(get_peft_model(empty, peft_config), args.device)
    offload_folder = str(Path(args.output_dir) / "offload")
    return AutoModelForCausalLM.from_pretrained(
        name, **{"device_map": device_map, "offload_folder": offload_folder, **kwargs}
    )


def offload_prefix(model: PeftModel, args: EditConfig) -> None:
    """Move a loaded model's lower layers into the computer's memory, or to disk if there is no accelerator.

    Args:
        model ([`~peft.PeftModel`]):
            The model.
        args ([`EditConfig`]):
            The training arguments.
    """
    folder = Path(args.output_dir) / "offload"
    shutil.rmtree(folder, ignore_errors=True)  # accelerate would take weights that it finds there for this model's
    device_map = prefix_device_map(model, args.device)
    dispatch_model(model.get_base_model(), device_map, main_device=str(args.device), offload_dir=str(folder))


def prefix_device_map(model: PeftModel, device: torch.device) -> dict[str, str]:
    """Return where each part of a base model goes, in accelerate's form.

    Args:
        model ([`~peft.PeftModel`]):
            The model; it may be empty, on the meta device.
        device (`torch.device`):
            Where to train.

    Returns:
        `dict[str, str]`: A device, or `"disk"`, by the name of a module.

    Raises:
        `ValueError`: If no layer is below the trained ones.
    """
    base, prefix = model.get_base_model(), find_prefix(model)
    if prefix is None:
        raise ValueError(
            "`offload_prefix` is True, but the lowest layer or the embeddings are trained, expected frozen layers below "
            "the trained ones: leave `offload_prefix` out, or train at a higher layer"
        )
    away = "disk" if device.type == "cpu" else "cpu"
    names = {id(module): name for name, module in base.named_modules()}
    device_map = {names[id(layer)]: away for layer in prefix.below}

    def place(module: nn.Module, name: str) -> None:
        if name in device_map:
            return
        if any(below.startswith(f"{name}." if name else "") for below in device_map if device_map[below] == away):
            for child, part in module.named_children():
                place(part, f"{name}.{child}" if name else child)
        else:
            device_map[name] = str(device)

    place(base, "")
    return device_map
