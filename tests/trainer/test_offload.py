"""The layers below on disk: the same losses and adapter, and their weights in no memory."""

import pytest
import torch

from peft_locft import EditConfig, EditTrainer, LocFTConfig
from peft_locft.trainer.offload import prefix_device_map


@pytest.fixture
def train(make_model, model_folder, tokenizer, edits, tmp_path):
    def train(way, **settings):
        trainer = EditTrainer(
            model=str(model_folder) if way == "name" else make_model(),
            args=EditConfig(
                output_dir=str(tmp_path / way),
                num_train_epochs=4,
                report_to="none",
                disable_tqdm=True,
                offload_prefix=way != "plain",
                **settings,
            ),
            train_dataset=edits,
            processing_class=tokenizer,
            peft_config=LocFTConfig(layers=[1]),
        )
        trainer.train()
        return trainer

    return train


@pytest.mark.parametrize("way", ["name", "object"])
@pytest.mark.parametrize("memory", [4, 0])
def test_an_offloaded_run_is_that_of_a_plain_one(train, way, memory, tmp_path):
    plain, offloaded = train("plain"), train(way, prefix_cache_memory=memory)
    base = offloaded.model.get_base_model().model
    assert {parameter.device.type for parameter in base.layers[0].parameters()} == {"meta"}
    rest = [*base.layers[1].parameters(), *base.layers[2].parameters(), *base.embed_tokens.parameters()]
    assert {parameter.device.type for parameter in rest} == {"cpu"}
    losses = [
        [entry["epoch_loss"] for entry in trainer.state.log_history if "epoch_loss" in entry]
        for trainer in (plain, offloaded)
    ]
    assert losses[0] == losses[1] and losses[0][0] > losses[0][-1] + 1
    deltas = [
        trainer.model.get_base_model().model.layers[1].mlp.down_proj.locft_delta["default"].weight
        for trainer in (plain, offloaded)
    ]
    assert torch.equal(*deltas)
    ids = torch.tensor([[5, 3, 7, 2]])  # the layers are streamed in where they are needed
    assert torch.equal(plain.model(ids).logits, offloaded.model(ids).logits)
    offloaded.save_model()
    assert (tmp_path / way / "adapter_model.safetensors").is_file()


def test_weights_of_an_earlier_model_in_the_folder_are_not_taken(train, make_model, tmp_path):
    first = train("object")
    with torch.no_grad():
        make = make_model()
        make.model.layers[0].mlp.up_proj.weight += 1
    for path in tmp_path.joinpath("object").glob("*"):
        if path.name != "offload":
            import shutil

            shutil.rmtree(path) if path.is_dir() else path.unlink()
    trainer = EditTrainer(
        model=make,
        args=EditConfig(output_dir=str(tmp_path / "object"), report_to="none", offload_prefix=True),
        train_dataset=first.edits,
        processing_class=first.processing_class,
        peft_config=LocFTConfig(layers=[1]),
    )
    ids = torch.tensor([[5, 3, 7, 2]])
    changed = make_model()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight += 1
    assert torch.equal(trainer.model(ids).logits, changed(ids).logits)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "gemma3"])
@pytest.mark.parametrize(("device", "away"), [("cpu", "disk"), ("cuda", "cpu")])
def test_the_map_covers_every_weight_once(make_model, architecture, device, away):
    from peft import get_peft_model

    model = get_peft_model(make_model(architecture), LocFTConfig(layers=[2]))
    device_map = prefix_device_map(model, torch.device(device))
    base = model.get_base_model()
    for name, _ in [*base.named_parameters(), *base.named_buffers()]:
        found = [part for part in device_map if name == part or name.startswith(f"{part}.")]
        assert len(found) == 1
        assert (device_map[found[0]] == away) == any(f".{layer}." in name for layer in (0, 1))


@pytest.mark.parametrize("way", ["name", "object"])
def test_nothing_below_is_an_error(way, make_model, model_folder, tokenizer, edits, tmp_path):
    with pytest.raises(ValueError) as caught:
        EditTrainer(
            model=str(model_folder) if way == "name" else make_model(),
            args=EditConfig(output_dir=str(tmp_path), report_to="none", offload_prefix=True),
            train_dataset=edits,
            processing_class=tokenizer,
            peft_config=LocFTConfig(layers=[0]),
        )
    assert str(caught.value) == (
        "`offload_prefix` is True, but the lowest layer or the embeddings are trained, expected frozen layers below "
        "the trained ones: leave `offload_prefix` out, or train at a higher layer"
    )


def test_without_the_cache_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`offload_prefix` is True with `prefix_cache=False`: then every step would"):
        EditConfig(output_dir=str(tmp_path), offload_prefix=True, prefix_cache=False)
