"""Saving from a model that FSDP wraps, also where it wraps every layer by itself."""

import functools

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_locft import LocFTConfig


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("nested", [False, True])
def test_a_wrapped_model_saves_the_adapter_under_its_plain_names(nested, make_adapted, make_model, process_group):
    model = make_adapted()
    expected = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    wrapped = FSDP(model, use_orig_params=True, auto_wrap_policy=policy if nested else None, device_id="cpu")
    saved = get_peft_model_state_dict(wrapped)
    assert saved.keys() == expected.keys() and len(saved) == 1
    assert all(torch.equal(saved[key].view(expected[key].shape), expected[key]) for key in expected)
    fresh = get_peft_model(make_model(), LocFTConfig(layers=[1]))
    set_peft_model_state_dict(fresh, expected)
    ids = torch.tensor([[5, 3, 7]])
    assert torch.allclose(fresh(ids).logits, wrapped(ids).logits, atol=1e-5)
