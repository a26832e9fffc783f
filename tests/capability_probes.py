"""Does a PEFT method do a thing? One probe for each row of the table in docs/guide/capabilities.md.

A probe builds a tiny model, does the thing, and checks its effect; an error of the kind that says "not supported" is a no.
"""

import copy
import warnings
from collections.abc import Callable

import torch
from peft import (
    LNTuningConfig,
    LoraConfig,
    OSFConfig,
    PeftModel,
    ShiraConfig,
    SupertuningConfig,
    convert_to_lora,
    get_peft_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from peft_locft import LocFTConfig


METHODS: dict[str, Callable] = {
    "LocFT": LocFTConfig,
    "LoRA": LoraConfig,
    "LN-tuning": LNTuningConfig,
    "SHiRA": lambda **settings: ShiraConfig(r=8, **settings),
    "Supertuning": lambda **settings: SupertuningConfig(sparsity=0.0, **settings),
    "OSF": lambda **settings: OSFConfig(effective_rank=8, **settings),
}
IDS = torch.tensor([[5, 3, 7, 2, 9], [1, 8, 4, 6, 2]])
DOWN = {"target_modules": ["mlp.down_proj"]}
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 2, "vocab_size": 64}
_CONFIGS = {
    "llama": LlamaConfig(**_SIZES, initializer_range=0.2),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.2),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4, initializer_range=0.2),
}
_UNSUPPORTED = (AttributeError, AssertionError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def base(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(_CONFIGS[kind])).eval()


def logits(model: nn.Module, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **kwargs).logits


def adapted(method: str, kind: str = "llama", model: nn.Module | None = None, **settings: object) -> PeftModel:
    """A model with an adapter that changes what it says."""
    model = get_peft_model(model or base(kind), METHODS[method](**settings)).eval()
    disturb(model, "default")
    return model


def disturb(model: PeftModel, adapter: str, seed: int = 1) -> None:
    """Move an adapter's weights, so that it is no identity."""
    model.set_adapter(adapter)
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert parameters
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.allclose(one, other, atol=1e-4)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-3, rtol=1e-3)


def linear(method: str) -> bool:
    return differs(logits(adapted(method, **DOWN)), logits(base()))


def conv1d(method: str) -> bool:
    return differs(logits(adapted(method, "gpt2", target_modules=["mlp.c_proj"])), logits(base("gpt2")))


def embedding(method: str) -> bool:
    return differs(logits(adapted(method, target_modules=["embed_tokens"])), logits(base()))


def fused_experts(method: str) -> bool:
    settings = {"target_modules": ["mlp.experts.down_proj" if method == "LocFT" else "mlp.experts"]}
    if method == "LoRA":
        settings = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    return differs(logits(adapted(method, "mixtral", **settings)), logits(base("mixtral")))


def one_expert(method: str) -> bool:
    model = adapted(method, "mixtral", target_modules=["mlp.experts.1.down_proj"])
    return differs(logits(model), logits(base("mixtral")))


def layers_by_index(method: str) -> bool:
    settings = {"layers_to_transform": [1]}
    return adapted(method, **DOWN, **settings).base_model.targeted_module_names == ["model.layers.1.mlp.down_proj"]


def quantised_base(method: str) -> bool:
    """Of bitsandbytes, in 4 bits: the adapter works, and the base weights are not touched."""
    import bitsandbytes as bnb

    model = base()
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        layer.mlp.down_proj = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32)
        layer.mlp.down_proj.weight = bnb.nn.Params4bit(weight.data, requires_grad=False)
        layer.mlp.down_proj.to("cpu")
    before = logits(model)
    raw = model.model.layers[0].mlp.down_proj.weight.data.clone()
    model = adapted(method, model=model, **DOWN)
    stays = torch.equal(model.base_model.model.model.layers[0].mlp.down_proj.get_base_layer().weight.data, raw)
    return stays and differs(logits(model), before)


def several_adapters(method: str) -> bool:
    model = adapted(method, **DOWN)
    first = logits(model)
    model.add_adapter("second", METHODS[method](**DOWN))
    disturb(model, "second", seed=2)
    second = logits(model)
    model.set_adapter("default")
    return torch.equal(logits(model), first) and differs(first, second)


def several_active(method: str) -> bool:
    model = adapted(method, **DOWN)
    model.add_adapter("second", METHODS[method](target_modules=["mlp.up_proj"]))
    disturb(model, "second", seed=2)
    single = logits(model)
    model.base_model.set_adapter(["default", "second"])
    return differs(logits(model), single)


def mixed_batches(method: str) -> bool:
    model = adapted(method, **DOWN)
    first = logits(model)
    model.add_adapter("second", METHODS[method](**DOWN))
    disturb(model, "second", seed=2)
    second = logits(model)
    mixed = logits(model, adapter_names=["default", "second"])
    return close(mixed[0], first[0]) and close(mixed[1], second[1]) and differs(first[0], second[0])


def merging(method: str) -> bool:
    model = adapted(method, **DOWN)
    expected = logits(model)
    return close(logits(model.merge_and_unload()), expected) and differs(expected, logits(base()))


def exact_unmerging(method: str) -> bool:
    """In bfloat16: after merging and unmerging, the base weights are the same, bit for bit."""
    model = adapted(method, model=base().to(torch.bfloat16), **DOWN)
    module = model.base_model.model.model.layers[1].mlp.down_proj
    before = module.get_base_layer().weight.data.clone()
    model.merge_adapter()
    merged = module.get_base_layer().weight.data.clone()
    model.unmerge_adapter()
    return not torch.equal(merged, before) and torch.equal(module.get_base_layer().weight.data, before)


def lora_conversion(method: str) -> bool:
    config, state = convert_to_lora(adapted(method, **DOWN), rank=64)
    return config.r == 64 and len(state) == 6


def weighted_adapters(method: str) -> bool:
    model = adapted(method, **DOWN)
    expected = logits(model)
    model.add_adapter("second", METHODS[method](**DOWN))
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    return close(logits(model), expected)


def full_copies(method: str) -> bool:
    """`modules_to_save`: whole modules trained and saved beside the adapter."""
    model = adapted(method, **DOWN, modules_to_save=["lm_head"])
    return any("lm_head.modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)


PROBES: dict[str, Callable[[str], bool]] = {
    "linear layers": linear,
    "Conv1D (GPT-2)": conv1d,
    "embeddings": embedding,
    "fused experts": fused_experts,
    "one expert of them": one_expert,
    "layers by index": layers_by_index,
    "4-bit base": quantised_base,
    "several adapters": several_adapters,
    "several active at once": several_active,
    "mixed batches": mixed_batches,
    "merging": merging,
    "exact unmerging": exact_unmerging,
    "conversion to LoRA": lora_conversion,
    "weighted adapters": weighted_adapters,
    "auxiliary modules": full_copies,
}


def can(method: str, capability: str) -> bool:
    """Whether a method has a capability in the installed versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return PROBES[capability](method)
        except _UNSUPPORTED:
            return False
