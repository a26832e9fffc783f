"""What torch, accelerate and transformers do to models: the adapter goes along and computes the same."""

import copy
import pickle
import shutil

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig, merge_report
from peft_locft.tuner import LocFTLinear


IDS = torch.arange(24).view(2, 12)
BF16 = torch.bfloat16
DOWN = "model.layers.1.mlp.down_proj"


def layer_of(model) -> LocFTLinear:
    (layer,) = [module for module in model.modules() if isinstance(module, LocFTLinear)]
    return layer


def delta_of(model) -> torch.nn.Parameter:
    return layer_of(model).locft_delta["default"].weight


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def gradient(model, ids: torch.Tensor, batch: int) -> torch.Tensor:
    """The delta's gradient, gathered over batches."""
    model.zero_grad()
    for part in ids.split(batch):
        (model(part, labels=part).loss * len(part) / len(ids)).backward()
    return delta_of(model).grad.clone()


@pytest.fixture
def saved(make_adapted, tmp_path):
    """A random adapter's folder and the logits that it gives."""
    model = make_adapted()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_model_gives_the_same_outputs(backend, make_adapted):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("torch's inductor needs a C++ compiler, and there is no g++ here")
    torch._dynamo.reset()
    model = make_adapted(num_hidden_layers=2)
    active = logits(model)
    with model.disable_adapter():
        base = logits(model)
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(logits(compiled), active, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(compiled), base, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(compiled), active, atol=1e-4, rtol=1e-4)
    assert (active - base).abs().max() > 1e-2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_compiled_model_has_the_same_gradient(make_adapted):
    torch._dynamo.reset()
    model = make_adapted()
    expected = gradient(model, IDS, 2)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled, IDS, 2), expected, atol=1e-6, rtol=1e-4)


def test_gathered_gradients_equal_those_of_one_batch(make_adapted):
    model = make_adapted()
    whole = gradient(model, IDS, 2)
    torch.testing.assert_close(gradient(model, IDS, 1), whole, atol=1e-6, rtol=1e-4)
    assert whole.abs().max() > 1e-3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradient(use_reentrant, make_adapted):
    model = make_adapted()
    model.train()
    expected = gradient(model, IDS, 2)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert model.base_model.model.is_gradient_checkpointing
    torch.testing.assert_close(gradient(model, IDS, 2), expected, atol=1e-6, rtol=1e-5)


def test_autocast_runs_in_bfloat16_and_keeps_the_deltas_dtype(make_adapted):
    model = make_adapted()
    expected = logits(model)
    with torch.autocast("cpu", BF16):
        out = model(IDS, labels=IDS)
        inside = layer_of(model)(torch.randn(2, 128))
    assert inside.dtype is BF16
    assert 0 < (out.logits.float() - expected).abs().max() < 0.05 * expected.abs().max()
    out.loss.backward()
    delta = delta_of(model)
    assert delta.dtype is delta.grad.dtype is torch.float32 and delta.grad.abs().max() > 0
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_loads_with_and_without_the_meta_device(low_cpu_mem_usage, saved, make_model):
    folder, expected = saved
    model = PeftModel.from_pretrained(make_model(), folder, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(model), expected)
    assert delta_of(model).dtype is torch.float32 and not delta_of(model).requires_grad
    model.load_adapter(folder, "again", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("again")
    assert torch.equal(logits(model), expected)


def test_an_adapter_made_with_low_memory_is_on_the_meta_device_until_it_is_loaded(saved, make_model):
    model = get_peft_model(make_model(), LocFTConfig(layers=[1]), low_cpu_mem_usage=True).eval()
    assert delta_of(model).is_meta and not layer_of(model).base_layer.weight.is_meta
    model.load_adapter(saved[0], "default", low_cpu_mem_usage=True)
    assert torch.equal(logits(model), saved[1])


def test_an_adapter_on_a_base_of_the_meta_device_has_the_right_shape(make_model):
    with init_empty_weights():
        base = make_model()
    model = get_peft_model(base, LocFTConfig(layers=[1]))
    assert layer_of(model).base_layer.weight.is_meta
    assert delta_of(model).shape == (64, 128) and delta_of(model).dtype is torch.float32
    assert model.peft_config["default"].base_fingerprint is None


def offload(model, how: str, folder):
    if how == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk":
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
        return model
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(3)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
def test_an_offloaded_base_computes_the_same(how, saved, make_model, tmp_path):
    folder, expected = saved
    base = offload(make_model(), how, tmp_path / "offload")
    assert base.model.layers[1].mlp.down_proj.weight.is_meta
    model = PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(delta_of(model), load_file(folder / "adapter_model.safetensors").popitem()[1])
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
def test_an_offloaded_base_merges_the_same(how, saved, make_model, tmp_path):
    folder, expected = saved
    model = PeftModel.from_pretrained(offload(make_model(), how, tmp_path / "offload"), folder).eval()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    # PEFT dispatches a model with a device map again, and on a machine without a GPU into memory.
    assert layer_of(model).merged and layer_of(model).base_layer.weight.is_meta == (how != "dispatch")
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_the_report_of_an_offloaded_base_equals_that_of_one_in_memory(saved, make_model):
    folder, _ = saved
    here = merge_report(PeftModel.from_pretrained(make_model(), folder), dtype=BF16)
    model = PeftModel.from_pretrained(offload(make_model(), "cpu", None), folder)
    assert merge_report(model, dtype=BF16) == here
    assert layer_of(model).base_layer.weight.is_meta


def test_a_base_saved_in_several_files_takes_the_adapter(saved, make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "base", max_shard_size="100KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, saved[0]).eval()), saved[1])


def test_a_deep_copy_is_equal_and_independent(make_adapted):
    model = make_adapted()
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    delta_of(twin).data.zero_()
    assert torch.equal(logits(model), expected) and not torch.equal(logits(twin), expected)
    model.merge_adapter()
    merged = copy.deepcopy(model)
    merged.unmerge_adapter()
    assert torch.equal(logits(merged), expected) and layer_of(model).merged


def test_config_and_model_can_be_pickled(make_adapted, tmp_path):
    model = make_adapted()
    config = model.peft_config["default"]
    config.set_companions({"edits.jsonl": "{}\n"})
    again = pickle.loads(pickle.dumps(config))
    assert again == config and again.targets == config.targets and again.companions() == {"edits.jsonl": "{}\n"}
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded), logits(model))
    loaded.merge_adapter()
    loaded.unmerge_adapter()
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_loads_the_adapter_and_keeps_it_fine(saved, make_model):
    folder, _ = saved
    base = make_model().to(BF16)
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(base), folder).eval())
    base.load_adapter(str(folder))
    assert delta_of(base).dtype is torch.float32
    (file,) = load_file(folder / "adapter_model.safetensors").values()
    assert torch.equal(delta_of(base), file)
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("autocast", [True, False])
def test_only_without_autocast_the_delta_gets_the_bases_dtype(autocast, saved, make_model):
    made = get_peft_model(make_model().to(BF16), LocFTConfig(layers=[1]), autocast_adapter_dtype=autocast)
    base = make_model().to(BF16)
    loaded = PeftModel.from_pretrained(base, saved[0], autocast_adapter_dtype=autocast).eval()
    expected = torch.float32 if autocast else BF16
    assert delta_of(made).dtype is delta_of(loaded).dtype is expected
    assert logits(loaded).dtype is BF16
