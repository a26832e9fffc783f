"""Smaller and more portable forms of an adapter, against truncated singular value decompositions computed here."""

import copy
import json
import os
import subprocess
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

from peft_locft import LocFTConfig, save_as_lora, save_compressed


NAME = "model.layers.1.mlp.down_proj"
IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def deltas(model, adapter: str = "default") -> dict[str, torch.Tensor]:
    layers = model.get_base_model().named_modules()
    return {
        name: layer.get_delta_weight(adapter).detach().clone()
        for name, layer in layers
        if getattr(layer, "edited", lambda _: ())(adapter)
    }


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]).float()


def kept(before: torch.Tensor, after: torch.Tensor) -> float:
    return 1 - ((after - before).double().norm() ** 2 / before.double().norm() ** 2).item()


@pytest.fixture
def make(make_model):
    """An edited tiny model, with random deltas."""

    def make(architecture: str = "llama", **settings):
        base = make_model(architecture)
        torch.manual_seed(2)
        config = LocFTConfig(**{"layers": [1], "init_weights": False, "task_type": "CAUSAL_LM"} | settings)
        return get_peft_model(base, config).eval()

    return make


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_lower_rank_is_the_truncated_decomposition(architecture, dtype, make, make_model, tmp_path):
    model = make(architecture)
    ((name, delta),) = deltas(model).items()
    report = save_compressed(model, tmp_path, rank=8, dtype=dtype)
    assert {value.dtype for value in load_file(tmp_path / "adapter_model.safetensors").values()} == {
        dtype or torch.float32
    }
    loaded = PeftModel.from_pretrained(make_model(architecture), tmp_path)
    (found,) = deltas(loaded).values()
    assert torch.allclose(found, truncated(delta, 8), atol=1e-5 if dtype is None else 0.03)
    assert report.energy == report.energies[name] == pytest.approx(kept(delta, found), abs=1e-5)
    assert report.ranks == {name: 8} == loaded.active_peft_config.rank_pattern
    assert report.size == (tmp_path / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_share_of_energy_gets_the_smallest_rank_that_keeps_it(share, make, tmp_path):
    model = make()
    energies = torch.linalg.svdvals(deltas(model)[NAME].double()) ** 2
    rank = next(k for k in range(1, 65) if energies[:k].sum() >= share * energies.sum())
    report = save_compressed(model, tmp_path, rank=share)
    assert report.ranks == {NAME: rank}
    assert report.energy == pytest.approx((energies[:rank].sum() / energies.sum()).item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_alone_rounds_the_delta(dtype, make, make_model, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "full")
    report = save_compressed(model, tmp_path / "half", dtype=dtype)
    (found,) = deltas(PeftModel.from_pretrained(make_model(), tmp_path / "half")).values()
    assert torch.equal(found, deltas(model)[NAME].to(dtype).float())
    assert report.ranks == {NAME: None}
    assert report.energy == pytest.approx(kept(deltas(model)[NAME], found), abs=1e-6) and report.energy < 1
    assert report.size < 0.55 * (tmp_path / "full/adapter_model.safetensors").stat().st_size


def test_a_rank_that_would_not_save_anything_stays_dense(make, tmp_path):
    # 43 * (64 + 128) numbers are more than 64 * 128, and 42 * (64 + 128) are fewer.
    assert save_compressed(make(), tmp_path, rank=43).ranks == {NAME: None}
    assert save_compressed(make(), tmp_path, rank=42).ranks == {NAME: 42}


def test_embeddings_experts_and_full_copies_stay(make, make_model, tmp_path):
    model = make(layers=None, target_modules=["embed_tokens"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    report = save_compressed(model, tmp_path / "e", rank=2)
    assert report.ranks == {"model.embed_tokens": None} and report.energy == 1
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(), tmp_path / "e")), logits(model))
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    base = AutoModelForCausalLM.from_config(MixtralConfig(**sizes))
    fresh = copy.deepcopy(base)
    config = LocFTConfig(layers=[0], target_modules=["mlp.experts.1.down_proj"], init_weights=False)
    model = get_peft_model(base, config)
    assert list(save_compressed(model, tmp_path / "m", rank=2).ranks.values()) == [None]
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / "m")), logits(model))


def test_the_model_is_left_as_it_was(make, tmp_path):
    model = make()
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.active_peft_config.to_dict())
    save_compressed(model, tmp_path / "a", rank=4, dtype=torch.float16)
    save_as_lora(model, tmp_path / "b", rank=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.active_peft_config.to_dict() == config


def test_a_compressed_adapter_goes_on_living(make, make_model, tmp_path):
    model = make()
    delta = deltas(model)[NAME]
    save_compressed(model, tmp_path / "a", rank=16)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "a", is_trainable=True)
    expected = logits(loaded)
    other = make_model()
    other.load_adapter(str(tmp_path / "a"))
    assert torch.allclose(logits(other), expected, atol=1e-5)
    report = save_compressed(loaded, tmp_path / "b", rank=4)
    assert report.ranks == {NAME: 4}
    assert report.energy == pytest.approx(kept(truncated(delta, 16), truncated(delta, 4)), abs=1e-5)
    again = PeftModel.from_pretrained(make_model(), tmp_path / "b")
    assert torch.allclose(deltas(again)[NAME], truncated(delta, 4), atol=1e-5)
    # A higher rank than it has changes nothing, and a dtype alone rounds the two matrices.
    assert save_compressed(loaded, tmp_path / "c", rank=20).ranks == {NAME: 16}
    assert save_compressed(loaded, tmp_path / "d", dtype=torch.bfloat16).ranks == {NAME: 16}
    loaded(IDS, labels=IDS).loss.backward()
    trained = [p for p in loaded.parameters() if p.requires_grad]
    assert len(trained) == 2 and all(p.grad.abs().sum() > 0 for p in trained)
    torch.optim.SGD(trained, 0.1).step()
    loaded.save_pretrained(tmp_path / "f")
    reloaded = PeftModel.from_pretrained(make_model(), tmp_path / "f")
    assert torch.equal(logits(reloaded), logits(loaded))
    assert torch.allclose(logits(loaded.merge_and_unload()), logits(reloaded), atol=1e-4)


def test_the_ledger_goes_along_and_the_card_has_no_scores(make, edits, tmp_path):
    model = make()
    model.active_peft_config.set_companions({"edits.jsonl": edits.to_jsonl(), "edit_results.json": "{}"})
    save_compressed(model, tmp_path / "a", rank=4)
    save_as_lora(model, tmp_path / "b", rank=4)
    for name in ("a", "b"):
        assert (tmp_path / name / "edits.jsonl").read_text() == edits.to_jsonl()
        assert "It was not evaluated." in (tmp_path / name / "README.md").read_text()
        assert not (tmp_path / name / "edit_results.json").exists()


# ---- LoRA ----


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_plain_peft_loads_the_lora(architecture, make, make_model, tmp_path):
    model = make(architecture)
    base = make_model(architecture)
    base.save_pretrained(tmp_path / "base")
    ((name, delta),) = deltas(model).items()
    save_as_lora(model, tmp_path / "lora", rank=8)
    code = (
        "import sys, torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()\n"
        "assert 'peft_locft' not in sys.modules\n"
        "torch.save(model(torch.tensor([[5, 6, 7, 8]])).logits.detach(), sys.argv[3])\n"
    )
    arguments = [str(tmp_path / name) for name in ("base", "lora", "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment, timeout=200)
    with torch.no_grad():
        base.get_submodule(name).weight += truncated(delta, 8)
    assert torch.allclose(torch.load(tmp_path / "out"), logits(base), atol=1e-3)


def test_the_full_rank_is_the_adapter_itself(make, make_model, tmp_path):
    model = make()
    report = save_as_lora(model, tmp_path, rank=64)
    assert report.energy == pytest.approx(1)
    assert torch.allclose(logits(PeftModel.from_pretrained(make_model(), tmp_path)), logits(model), atol=1e-3)


def test_the_config_names_layers_where_peft_reads_it_so_and_else_full_names(make, tmp_path):
    save_as_lora(make(layers=[1, 2]), tmp_path / "a", rank=2)
    config = LoraConfig.from_pretrained(str(tmp_path / "a"))
    assert (config.layers_to_transform, config.target_modules) == ([1, 2], {"mlp.down_proj"})
    for modules in (["attention"], ["self_attn"]):
        save_as_lora(make(target_modules=modules), tmp_path / "b", rank=2)
        config = LoraConfig.from_pretrained(str(tmp_path / "b"))
        assert config.layers_to_transform is None
        assert config.target_modules == {f"model.layers.1.self_attn.{letter}_proj" for letter in "qkvo"}


def test_energy_gives_each_layer_its_rank(make, make_model, tmp_path):
    model = make(target_modules=["mlp.down_proj", "self_attn.k_proj"])
    report = save_as_lora(model, tmp_path, rank=0.5)
    config = LoraConfig.from_pretrained(str(tmp_path))
    low = {name: rank for name, rank in report.ranks.items() if rank < config.r}
    assert low and config.rank_pattern == config.alpha_pattern == low and config.r == max(report.ranks.values())
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    for name, delta in deltas(model).items():
        found = loaded.get_base_model().get_submodule(name).get_delta_weight("default")
        assert torch.allclose(found, truncated(delta, report.ranks[name]), atol=1e-5)


def test_pefts_own_conversion_knows_adapters_on_different_layers(make, make_model, tmp_path):
    model = make()
    model.add_adapter("b", LocFTConfig(layers=[0], init_weights=False, task_type="CAUSAL_LM"))
    for adapter in ("default", "b"):
        peft.save_as_lora(tmp_path / adapter, model, rank=64, adapter_name=adapter)
        model.set_adapter(adapter)
        loaded = PeftModel.from_pretrained(make_model(), tmp_path / adapter)
        assert torch.allclose(logits(loaded), logits(model), atol=1e-3)


@pytest.mark.parametrize("save", [save_compressed, save_as_lora])
@pytest.mark.parametrize("rank", [0, -1, 1.5, True, float("nan"), "4"])
def test_a_rank_that_cannot_be(save, rank, make, tmp_path):
    with pytest.raises(ValueError) as raised:
        save(make(), tmp_path / "out", rank=rank)
    assert str(raised.value) == (f"`rank` is {rank!r}, expected a positive integer, or a share of energy such as 0.95")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save", [save_compressed, save_as_lora])
def test_other_arguments_that_cannot_be(save, make, tmp_path):
    with pytest.raises(ValueError) as raised:
        save(make(), tmp_path / "out", rank=4, adapter_name="b")
    assert str(raised.value) == ("the model has no LocFT adapter 'b': its adapters are {'default': 'LocFTConfig'}")
    with pytest.raises(ValueError) as raised:
        save(make(), tmp_path / "out", rank=4, dtype=torch.int8)
    assert str(raised.value) == (
        "`dtype` is torch.int8, expected one of [torch.float32, torch.float16, torch.bfloat16]"
    )
    assert not (tmp_path / "out").exists()


def test_embeddings_are_no_lora(make, tmp_path):
    with pytest.raises(TypeError) as raised:
        save_as_lora(make(layers=None, target_modules=["embed_tokens"]), tmp_path / "out", rank=4)
    assert str(raised.value) == (
        "the adapter edits ['model.embed_tokens'], which are embeddings or fused experts, expected linear layers: merge "
        "it instead"
    )


def test_a_config_without_anything_to_transform_is_saved_readably(make, tmp_path):
    save_as_lora(make(), tmp_path, rank=2)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["lora_alpha"], saved["task_type"]) == ("LORA", 2, 2, "CAUSAL_LM")


def test_full_copies_of_modules_are_cast_too_and_alone_are_no_lora(make_model, tmp_path):
    model = get_peft_model(
        make_model(), LocFTConfig(layers=[1], target_modules=["mlp.down_proj"], modules_to_save=["lm_head"])
    )
    for save, settings in ((save_compressed, {}), (save_as_lora, {"rank": 4})):
        save(model, tmp_path / save.__name__, dtype=torch.bfloat16, **settings)
        state = load_file(tmp_path / save.__name__ / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
