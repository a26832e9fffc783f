"""A model without its weights, from its config alone."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..trainer.setup import check_decoder
from ..tuner import LocFTConfig


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_config(name: str | os.PathLike) -> PreTrainedConfig:
    """Load a model's config, and no weights.

    Args:
        name (`str` or `os.PathLike`):
            The model's name on the Hub, or its folder, of which only `config.json` is read.

    Returns:
        [`~transformers.PreTrainedConfig`]: The config.

    Raises:
        `ValueError`: If there is none.
    """
    folder = Path(name)
    if folder.is_absolute() and not folder.is_dir():
        raise ValueError(f"the model folder {name} does not exist")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"the model folder {name} has no config.json: give the folder of a model, or its name on the Hub"
        )
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        where = "could not be read" if folder.is_dir() else "was found neither in a folder of that name nor on the Hub"
        raise ValueError(f"the config of the model {str(name)!r} {where}: {error}") from error


def dtype_of(value: str | torch.dtype | None, config: PreTrainedConfig, field: str = "dtype") -> torch.dtype:
    """Return a dtype, by default the one that a config names.

    Args:
        value (`str` or `torch.dtype`, *optional*):
            The dtype, or its name.
        config ([`~transformers.PreTrainedConfig`]):
            The model's config.
        field (`str`, *optional*, defaults to `"dtype"`):
            What an error calls the value.

    Returns:
        `torch.dtype`: The dtype; float32 where the config names none.

    Raises:
        `ValueError`: If it is none in which weights are kept.
    """
    if value is None:
        value = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"`{field}` is {name!r}, expected one of {list(DTYPES)}")
    return DTYPES[name]


def build_model(config: PreTrainedConfig, peft_config: PeftConfig | None, dtype: torch.dtype) -> PeftModel:
    """Build a model and its adapter on the meta device, where tensors have a shape and no values.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's config.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Where and how to train. Defaults to [`LocFTConfig.recommended`].
        dtype (`torch.dtype`):
            The dtype of the model's weights.

    Returns:
        [`~peft.PeftModel`]: The model, in evaluation mode.

    Raises:
        `ValueError`: If the config is not that of a decoder, is quantised, or `peft_config` does not fit it.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"the model is an encoder-decoder ({config.model_type}), expected a decoder that continues text: an edit is a "
            "prompt and how the model goes on"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "the model's config has a `quantization_config`, and how large quantised weights are is not known before they "
            "are loaded: plan with the model that it was made of"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"the model is of the type {config.model_type!r}, which transformers' `AutoModelForCausalLM` does not load, "
            "expected a decoder that continues text"
        )
    if peft_config is not None and peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(peft_config).__name__} learns a prompt, expected a PEFT config that changes modules, such as "
            "LocFTConfig or LoraConfig: an edit is a change of the model's weights"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        check_decoder(model)
        peft_config = copy.deepcopy(peft_config) if peft_config is not None else LocFTConfig.recommended(model)
        peft_config.task_type = peft_config.task_type or "CAUSAL_LM"
        return get_peft_model(model, peft_config).eval()
