"""The tuner that puts LocFT layers into a model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from .additive import BASE
from .arithmetic import check_weighted_adapter, combine, combined_config
from .config import LocFTConfig
from .embedding import LocFTEmbedding
from .experts import LocFTExperts
from .fingerprint import check_base
from .layer import LocFTLayer
from .linear import LocFTLinear
from .targets import EDITABLE, expanded_expression, resolve_targets
from .weights import fused_experts, is_linear


# What FSDP, torch.compile and activation checkpointing put into the names of the modules they wrap.
_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


class LocFTModel(BaseTuner):
    """
    Creates a LocFT model from a pretrained model. Made by [`~peft.get_peft_model`] from a [`LocFTConfig`].

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        peft_config ([`LocFTConfig`]): The configuration of the LocFT model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.

    Returns:
        `torch.nn.Module`: The LocFT model.

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`LocFTConfig`]) -- The configuration of the LocFT model.
    """

    prefix: str = "locft_"
    tuner_layer_cls = LocFTLayer
    # The default is read off the model itself (see `targets.default_module`), so new architectures need no entry.
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        peft_config.set_targets(*resolve_targets(peft_config, self.model))
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        config.forget_model()
        requested = config.places()
        # PEFT would run an expression in Python's own engine, on injecting and on saving, which has no timeout.
        config.target_modules = expanded_expression(config, self.model if model is None else model)
        named = config.target_modules
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if named is not None and not isinstance(named, str):
            # PEFT shortens long lists to what is unique among modules, which experts and groups are not.
            config.target_modules = named
        config.remember_model(requested)
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, LocFTLayer) and module.edited(adapter_name)
        }
        check_base(config, model, layers, adapter_name)

    @staticmethod
    def _check_target_module_exists(peft_config: LocFTConfig, key: str) -> bool | _ExcludedModule:
        if key in peft_config.targets:
            return True
        return _ExcludedModule() if peft_config.excludes(key) else False

    def _create_and_replace(
        self,
        peft_config: LocFTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kwargs: dict[str, Any] = {}
        if isinstance(base_layer, nn.Embedding):
            layer_cls = LocFTEmbedding
        elif is_linear(base_layer):
            layer_cls = LocFTLinear
            kwargs["rank"] = peft_config.rank_pattern.get(current_key)
        elif fused_experts(base_layer) and current_key in peft_config.targets:
            layer_cls = LocFTExperts
            kwargs["experts"] = peft_config.targets[current_key]
        else:
            raise TypeError(
                f"the target module {current_key!r} is a {type(base_layer).__name__}, expected {EDITABLE}: name other "
                "`target_modules`"
            )
        if isinstance(target, LocFTLayer):
            target.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode, **kwargs)
            return
        if layer_cls is LocFTExperts and target is not base_layer:
            raise TypeError(
                f"the fused experts {current_key!r} already have an adapter of the kind {type(target).__name__}: unload "
                "or merge it first"
            )
        if layer_cls is LocFTLinear:
            kwargs.update(get_quantization_kwargs(self.model))
        new_module = layer_cls(target, adapter_name, peft_config, **kwargs)
        if adapter_name not in self.active_adapters:
            # A further adapter is trained only once it is made active.
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Deltas are where the base weights are already, and what is unloaded is whole: PEFT's own would give it a
        # `weight`, which fused experts do not have.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            # Only whoever asks PEFT for it by name gets deltas as coarse as the base weights.
            for layer in self.model.modules():
                if isinstance(layer, LocFTLayer) and layer.edited(adapter_name):
                    layer.cast_delta_like_base(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LocFTConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        for name, layer in model.named_modules():
            key = f"{name}.base_layer.weight"
            if isinstance(layer, LocFTLayer) and layer.merged and layer.edited(adapter_name) and key in state_dict:
                # Of an embedding or a head, PEFT saves the base weight too (it reads it from this dict, later): without
                # the delta, or loading would add it twice.
                original = layer.base_weight_of(adapter_name, "weight")
                if original is not None:
                    state_dict[key] = original
        prefixes = {_WRAPPERS.sub("", prefix) for prefix in _get_tuner_state_dict_key_prefixes(model)}
        unwrapped = {_WRAPPERS.sub("", key): value for key, value in state_dict.items()}
        return _filter_state_dict_by_key_prefixes(unwrapped, prefixes)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, in float32 and rounded once.

        Args:
            adapter_names (`list[str]`, *optional*):
                The adapters to merge. Defaults to the active ones.
            safe_merge (`bool`, *optional*, defaults to `False`):
                Whether to check all layers for values that are not finite before any of them is changed.

        Raises:
            `ValueError`: If `safe_merge` finds values that are not finite.
            `TypeError`: If a base layer is quantised in a form that cannot be merged into; nothing is changed then.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        unknown = sorted(set(adapter_names or ()) - set(self.peft_config))
        if unknown:
            raise ValueError(f"adapters {unknown} do not exist, expected some of {list(self.peft_config)}")
        for layer in self.model.modules():
            if not isinstance(layer, LocFTLayer):
                continue
            names = layer.active_adapters if adapter_names is None else adapter_names
            names = [name for name in names if layer.edited(name) and name not in layer.merged_adapters]
            if not names:
                continue
            layer.check_merge()
            # What is offloaded is checked by the layer itself, once it is at hand.
            if safe_merge and not any(p.is_meta for p in layer.parameters()):
                layer.merged_weights([*layer.merged_adapters, *names], safe_merge=True)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter whose deltas are those of others, combined. A negative weight subtracts an adapter.

        Dense deltas combine exactly: nothing is squeezed into a rank, as for LoRA. Adapters may edit different places;
        the new one edits all of them.

        Args:
            adapters (`list[str]`):
                The adapters to combine.
            weights (`list[float]`):
                The weight of each.
            adapter_name (`str`):
                The name of the new adapter. It is frozen and not active.
            combination_type (`str`, *optional*, defaults to `"linear"`):
                `"linear"` (task arithmetic, [arXiv 2212.04089](https://arxiv.org/abs/2212.04089)), `"ties"`
                ([arXiv 2306.01708](https://arxiv.org/abs/2306.01708)), `"dare_linear"`, `"dare_ties"`
                ([arXiv 2311.03099](https://arxiv.org/abs/2311.03099)) or `"magnitude_prune"`.
            density (`float`, *optional*):
                The share of values to keep, above 0 and at most 1, for all types but `"linear"`.
            majority_sign_method (`str`, *optional*, defaults to `"total"`):
                How TIES elects a sign: `"total"` or `"frequency"`.

        Raises:
            `ValueError`: If an adapter does not exist, the new one does, or the values do not fit together.
        """
        check_weighted_adapter(self, adapters, weights, adapter_name, combination_type, density, majority_sign_method)
        self.peft_config[adapter_name] = combined_config(self, adapters)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for layer in self.model.modules():
            if isinstance(layer, LocFTLayer) and layer.edited(adapter_name):
                combine(layer, adapters, weights, adapter_name, combination_type, density, majority_sign_method)
        self.set_requires_grad(adapter_name, requires_grad=False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT calls this around each forward pass; `adapter_names` says which adapter each row of the batch uses.
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(adapter_names) - set(self.peft_config) - {BASE}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim]
        if inputs and len(inputs[0]) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(inputs[0])} respectively."
            )

        def pass_names(module: nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
            # PEFT looks every name up, also that of an adapter without a full copy of this module.
            known = module._adapters if isinstance(module, AuxiliaryTrainingWrapper) else adapter_names
            return inputs, {**keywords, "adapter_names": [name if name in known else BASE for name in adapter_names]}

        handles = [
            module.register_forward_pre_hook(pass_names, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (LocFTLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
