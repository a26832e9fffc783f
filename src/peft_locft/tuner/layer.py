"""What the layers of all kinds have in common: deltas by adapter, merging in float32, and taking it back bit for bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from .config import LocFTConfig
from .quantization import backend_of, check_quantizes_again, readable_weight, stored_as


class LocFTLayer(nn.Module, BaseTunerLayer):
    """A module with dense deltas on its weights, one for each adapter.

    A delta is a module and no bare parameter: `cast_adapter_dtype` would make every bare parameter trainable, and
    FSDP's automatic wrapping needs modules. It stays in float32 whatever the base weight's dtype is, unless its user
    casts it.

    Args:
        base_layer (`torch.nn.Module`):
            The module.
        get_apply_tensor_subclass (`Callable`, *optional*):
            How torchao is to quantise a merged weight again.
    """

    adapter_layer_names = ("locft_delta",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, get_apply_tensor_subclass: Callable | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = backend_of(self.get_base_layer(), get_apply_tensor_subclass)
        self.locft_delta = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        self._originals: tuple | None = None  # the base layer's weights as they were before the first merge

    def update_layer(
        self, adapter_name: str, config: LocFTConfig, inference_mode: bool = False, **kwargs: Any
    ) -> None:
        """Add an adapter to this layer.

        Args:
            adapter_name (`str`):
                The name of the adapter.
            config ([`LocFTConfig`]):
                Its configuration.
            inference_mode (`bool`, *optional*, defaults to `False`):
                Whether to leave the delta frozen.
            kwargs (`dict`):
                `rank` for a compressed delta, or `experts`, those to edit by parameter.
        """
        self._add_delta(adapter_name, config.init_weights, **kwargs)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def edited(self, adapter_name: str) -> tuple[str, ...]:
        """Return the base layer's parameters that an adapter edits.

        Args:
            adapter_name (`str`):
                The name of the adapter.

        Returns:
            `tuple[str, ...]`: Their names; none where the layer does not have the adapter.
        """
        return ("weight",) if adapter_name in self.locft_delta else ()

    def get_delta_weight(self, adapter: str, parameter: str = "weight") -> torch.Tensor:
        """Return the delta in the shape and orientation of the base layer's own weight.

        Args:
            adapter (`str`):
                The name of the adapter.
            parameter (`str`, *optional*, defaults to `"weight"`):
                The base layer's parameter.

        Returns:
            `torch.Tensor`: Zero where the layer does not have the adapter.
        """
        raise NotImplementedError

    def set_delta_weight(self, adapter: str, delta: torch.Tensor, parameter: str = "weight") -> None:
        """Set the delta of an adapter that is not compressed.

        Args:
            adapter (`str`):
                The name of the adapter.
            delta (`torch.Tensor`):
                In the shape and orientation of the base layer's own weight.
            parameter (`str`, *optional*, defaults to `"weight"`):
                The base layer's parameter.
        """
        self.locft_delta[adapter].weight.data.copy_(delta)

    def base_weight_of(self, adapter_name: str, parameter: str) -> torch.Tensor | None:
        """Return what an adapter edits of a base weight, as floating-point numbers.

        Args:
            adapter_name (`str`):
                The name of the adapter.
            parameter (`str`):
                The base layer's parameter.

        Returns:
            `torch.Tensor` or `None`: As it was before any merge. `None` where the weight is not at hand: not loaded,
            partitioned, or in a quantised form that cannot be read or has been merged into.
        """
        if self.quantization_backend is not None:
            readable = self.quantization_backend.supports_merge and not self.merged
            return self.get_base_weight() if readable else None
        weight = (
            getattr(self.get_base_layer(), parameter) if self._originals is None else self._originals[1][parameter]
        ).detach()
        return None if weight.is_meta or weight.numel() == 0 else weight

    def get_base_weight(self) -> torch.Tensor:
        """Return the base layer's weight as it is now, as floating-point numbers.

        Returns:
            `torch.Tensor`: In the shape and orientation of the base layer's own weight.
        """
        if self.quantization_backend is not None:
            return readable_weight(self.quantization_backend, self.get_base_layer())
        return super().get_base_weight()

    def stored_as(self, parameter: str) -> str:
        """Return how a base weight is stored.

        Args:
            parameter (`str`):
                The base layer's parameter.

        Returns:
            `str`: Its dtype, such as `"bfloat16"`, or the name of its quantisation.
        """
        if self.quantization_backend is not None:
            return stored_as(self.quantization_backend, self.get_base_layer())
        return str(getattr(self.get_base_layer(), parameter).dtype).removeprefix("torch.")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add deltas to the base weights: in float32, from the weights as they were before any merge, rounded once.

        The base layer gets new parameters, so that a weight that shares its old one, as a tied embedding does, stays
        as it was.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`):
                Whether to check the result for values that are not finite before anything is changed.
            adapter_names (`list[str]`, *optional*):
                The adapters to merge. Defaults to the active ones.

        Raises:
            `ValueError`: If `safe_merge` finds values that are not finite.
            `TypeError`: If the base layer is quantised in a form that cannot be merged into.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if self.edited(name)]
        if not names:
            return
        merged = self.merged_weights(self.merged_adapters + names, safe_merge)
        if self._originals is None:
            self._originals = self._read_originals()
        for parameter, weight in merged.items():
            self._set_weight(parameter, weight)
        self.merged_adapters.extend(names)

    def check_merge(self) -> None:
        """Make sure that adapters can be merged into this layer.

        Raises:
            `TypeError`: If the base layer is quantised in a form that cannot be merged into.
        """
        if self.quantization_backend is None:
            return
        if not self.quantization_backend.supports_merge:
            raise TypeError(
                f"the base layer is a quantised {type(self.get_base_layer()).__name__}, expected floating-point "
                "weights: load the base model without quantisation to merge, or leave the adapter unmerged"
            )
        if self.merged:
            raise TypeError(
                f"adapters {self.merged_adapters} are merged into quantised weights: unmerge them, and merge all "
                "adapters at once"
            )
        check_quantizes_again(self.quantization_backend)

    def merged_weights(self, adapter_names: list[str], safe_merge: bool = False) -> dict[str, torch.Tensor]:
        """Return the base weights with deltas added, and change nothing.

        Args:
            adapter_names (`list[str]`):
                The adapters to add, to the weights as they were before any merge.
            safe_merge (`bool`, *optional*, defaults to `False`):
                Whether to check the result for values that are not finite.

        Returns:
            `dict[str, torch.Tensor]`: In the base weight's dtype, or in float32 for a quantised one, by parameter.

        Raises:
            `ValueError`: If `safe_merge` finds values that are not finite.
            `TypeError`: If the base layer is quantised in a form that cannot be merged into.
        """
        merged = {}
        for parameter in dict.fromkeys(p for name in adapter_names for p in self.edited(name)):
            original = self._unmerged_weight(parameter)
            weight = original.to(torch.promote_types(original.dtype, torch.float32))
            # In the dtype in which it will be stored: what is finite in float32 may not be in float16.
            dtype = weight.dtype if self.quantization_backend is not None else original.dtype
            deltas = {
                name: self.get_delta_weight(name, parameter).detach().to(weight.device, weight.dtype)
                for name in adapter_names
                if parameter in self.edited(name)
            }
            merged[parameter] = (weight + sum(deltas.values())).to(dtype)
            if safe_merge and not torch.isfinite(merged[parameter]).all():
                if not torch.isfinite(original).all():
                    raise ValueError(
                        f"NaNs detected in the base weight {parameter!r}, before anything is merged into it"
                    )
                alone = [
                    name for name, delta in deltas.items() if not torch.isfinite((weight + delta).to(dtype)).all()
                ]
                names = ", ".join(alone or deltas)
                raise ValueError(f"NaNs detected in the merged weights. The adapter {names} seems to be broken")
        return merged

    def unmerge(self) -> None:
        """Put the base weights back as they were before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base_layer, parameters, beside = self._originals
        if self.quantization_backend is None:
            for name, parameter in parameters.items():
                # Where and as what the weight is now: the model may have been moved or cast while it was merged.
                now = getattr(base_layer, name)
                if parameter.device != now.device or parameter.dtype != now.dtype:
                    parameter.data = parameter.data.to(now)
                setattr(base_layer, name, parameter)
        else:
            self.base_layer = base_layer  # HQQ replaces the whole layer
            base_layer._parameters.update(parameters)
            for holder, attributes in beside:
                holder.__dict__.update(attributes)
        self._originals = None
        self.merged_adapters.clear()

    def _add_delta(self, adapter_name: str, zero: bool, **kwargs: Any) -> None:
        raise NotImplementedError

    def _read_originals(self) -> tuple:
        base_layer = self.get_base_layer()
        parameters = {name: value for name, value in base_layer._parameters.items() if value is not None}
        # bitsandbytes keeps scales beside its weights, and PEFT marks the old 4-bit weight as not quantised yet.
        states = {name: value for name, value in vars(base_layer).items() if name in ("state", "quant_state")}
        if "state" in states:
            states["state"] = copy.copy(states["state"])  # changed in place by a merge
        marks = [(p, {"bnb_quantized": True}) for p in parameters.values() if getattr(p, "bnb_quantized", False)]
        return base_layer, parameters, [(base_layer, states), *marks]

    def _unmerged_weight(self, parameter: str) -> torch.Tensor:
        if self.quantization_backend is not None:
            self.check_merge()
            return self.get_base_weight().detach().clone()
        base_layer, parameters, _ = self._originals or self._read_originals()
        return parameters[parameter].detach()

    def _set_weight(self, parameter: str, weight: torch.Tensor) -> None:
        base_layer = self.get_base_layer()
        if self.quantization_backend is not None:
            self.quantization_backend.set_base_weight(self, weight.to(self.get_base_weight().dtype))
            return
        old = getattr(base_layer, parameter)
        setattr(base_layer, parameter, nn.Parameter(weight.to(old), requires_grad=old.requires_grad))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would cast the delta to the base weight's dtype too: here it only ever gets finer.
        base_layer = self.get_base_layer()
        tensor = next(iter([*base_layer.parameters(), *base_layer.buffers()]), None)
        if tensor is None:
            return
        device = device or tensor.device
        hook = getattr(base_layer, "_hf_hook", None)
        if device.type == "meta" and getattr(hook, "offload", False):
            device = torch.device(hook.execution_device)  # the weight is on the disk until it is needed
        dtype = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else torch.float32
        for name in self.adapter_layer_names:
            deltas = getattr(self, name)
            if adapter_name in deltas and not any(p.is_meta for p in deltas[adapter_name].parameters()):
                deltas[adapter_name].to(device, dtype)

    def cast_delta_like_base(self, adapter_name: str) -> None:
        """Give a delta the dtype of the base weight, if that is a floating-point one.

        Args:
            adapter_name (`str`):
                The name of the adapter.
        """
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        if dtype is not None and dtype.is_floating_point:
            for name in self.adapter_layer_names:
                if adapter_name in getattr(self, name):
                    getattr(self, name)[adapter_name].to(dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def extra_repr(self) -> str:
        backend = self.quantization_backend
        return "" if backend is None else f"quantization_backend={backend.backend_name!r}"

    def __repr__(self) -> str:
        return "locft." + super().__repr__()
