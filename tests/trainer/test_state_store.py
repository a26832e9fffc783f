"""A prefix cache larger than its budget is a file: equal to the one in memory, found again, never another's."""

import json
import os
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from peft_locft import EditConfig, EditTrainer, LocFTConfig
from peft_locft.trainer import state_store
from peft_locft.trainer.data import tokenize_edits
from peft_locft.trainer.prefix_cache import build_prefix_cache, find_prefix
from peft_locft.trainer.state_store import StateStore, prefix_key


@pytest.fixture
def dataset(edits, tokenizer):
    return tokenize_edits(edits, tokenizer, None)


@pytest.fixture
def wrapped(make_model):
    return lambda layer=1, **changes: get_peft_model(make_model(**changes), LocFTConfig(layers=[layer])).eval()


def config(tmp_path, **settings):
    return EditConfig(output_dir=str(tmp_path / "run"), report_to="none", disable_tqdm=True, **settings)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_file_holds_what_memory_would(wrapped, dataset, tmp_path, dtype):
    model = wrapped()
    memory = build_prefix_cache(model, dataset, config(tmp_path), 0, dtype)
    file = build_prefix_cache(model, dataset, config(tmp_path, prefix_cache_memory=0), 0, dtype)
    assert not (tmp_path / "run" / "prefix_cache").exists() or file.store.dtype == (dtype or torch.float32)
    edits, positions = torch.arange(8)[:, None].expand(8, 3), torch.arange(3).expand(8, 3)
    states = file.states_at(edits, positions)
    assert states.shape == (8, 3, 64) and states.dtype == (dtype or torch.float32)
    assert torch.equal(states, memory.states_at(edits, positions)) and states.float().std() > 0.01
    assert os.path.getsize(tmp_path / "run" / "prefix_cache" / "states.bin") == file.store.bytes


def test_the_states_are_those_of_each_edit_alone(wrapped, dataset, tmp_path):
    model = wrapped()
    cache = build_prefix_cache(model, dataset, config(tmp_path, prefix_cache_memory=0), 0)
    for row in list(dataset):
        ids = torch.tensor([row["input_ids"]])
        entered = model(ids, output_hidden_states=True).hidden_states[1]  # what leaves layer 0
        positions = torch.arange(ids.shape[1])[None]
        stored = cache.states_at(torch.full_like(positions, row["index"]), positions)
        torch.testing.assert_close(stored, entered, rtol=1e-5, atol=1e-5)


def test_the_key_tells_model_place_tokens_and_weights_apart(wrapped, dataset, make_model):
    def key(model, data=dataset):
        return prefix_key(model, find_prefix(model).first, data)

    model = wrapped()
    same = key(model)
    assert key(wrapped()) == same
    keys = {same, key(wrapped(layer=2)), key(wrapped(rms_norm_eps=1e-3)), key(model, dataset.select(range(7)))}
    rows = dataset.to_list()
    rows[3]["input_ids"][0] += 1
    keys.add(key(model, type(dataset).from_list(rows)))
    base = model.get_base_model().model
    for weight in (base.embed_tokens.weight, base.layers[0].mlp.up_proj.weight):
        weight.data[3, 3] += 1e-6
        keys.add(key(model))
    assert len(keys) == 7
    # What lies above the cut has no part in the states.
    before = key(model)
    base.layers[2].mlp.up_proj.weight.data += 1
    base.layers[1].mlp.down_proj.locft_delta["default"].weight.data += 1
    assert key(model) == before


def test_a_complete_file_is_used_again_and_an_incomplete_one_is_not(wrapped, dataset, tmp_path):
    model, passes = wrapped(), []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    settings = config(tmp_path, prefix_cache_memory=0, per_device_eval_batch_size=2)
    first = build_prefix_cache(model, dataset, settings, 0)
    assert len(passes) == 4
    passes.clear()
    again = build_prefix_cache(model, dataset, settings, 0)
    assert len(passes) == 1  # which tells the shape
    tokens = torch.arange(first.store.shape[0])
    assert torch.equal(again.store.read(tokens), first.store.read(tokens))
    folder = tmp_path / "run" / "prefix_cache"
    for spoil in (
        lambda: (folder / "key.json").unlink(),
        lambda: (folder / "key.json").write_text(
            json.dumps(json.loads((folder / "key.json").read_text()) | {"key": "x"})
        ),
        lambda: os.truncate(folder / "states.bin", 100),
    ):
        spoil()
        passes.clear()
        build_prefix_cache(model, dataset, settings, 0)
        assert len(passes) == 4


def test_what_does_not_fit_the_disk_turns_the_cache_off(wrapped, dataset, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(state_store.shutil, "disk_usage", lambda folder: usage(free=1024))
    with pytest.warns(
        UserWarning, match=r"the prefix cache is off, .*OSError: its 0.0 GiB do not fit the 0.0 GiB that"
    ):
        assert build_prefix_cache(wrapped(), dataset, config(tmp_path, prefix_cache_memory=0), 0) is None


class Look(TrainerCallback):
    def __init__(self, look):
        self.look = look

    def on_epoch_end(self, args, state, control, **kwargs):
        self.look()


def test_training_from_a_file_is_bit_for_bit_that_from_memory(make_model, tokenizer, edits, tmp_path):
    deltas, files = [], []
    for memory in (4, 0):
        output = tmp_path / str(memory)
        trainer = EditTrainer(
            model=make_model(),
            args=EditConfig(
                output_dir=str(output),
                num_train_epochs=3,
                report_to="none",
                disable_tqdm=True,
                prefix_cache_memory=memory,
            ),
            train_dataset=edits,
            processing_class=tokenizer,
            peft_config=LocFTConfig(layers=[1]),
        )
        trainer.add_callback(
            Look(lambda output=output: files.append((output / "prefix_cache" / "states.bin").exists()))
        )
        trainer.train()
        assert not (output / "prefix_cache").exists()  # of no use to anyone once training has ended
        deltas.append([parameter.detach() for parameter in trainer.model.parameters() if parameter.requires_grad])
    assert files == [False] * 3 + [True] * 3
    assert all(torch.equal(memory, file) for memory, file in zip(*deltas, strict=True))


RUN = """
import os, signal, sys, torch
from peft_locft import EditConfig, EditTrainer, LocFTConfig
from peft_locft.trainer import prefix_cache
torch.set_num_threads(1)
model, edits, output, killed = sys.argv[1:]
trainer = EditTrainer(
    model=model,
    args=EditConfig(output_dir=output, num_train_epochs=3, disable_tqdm=True, report_to="none", prefix_cache_memory=0,
        per_device_eval_batch_size=2, learning_rate=0.03),
    train_dataset=edits, peft_config=LocFTConfig(layers=[1]),
)
passes = []
trainer.model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: passes.append(1))
step = trainer.training_step
def training_step(*args, **kwargs):
    if killed == "killed" and trainer.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **kwargs)
trainer.training_step = training_step
trainer.train(resume_from_checkpoint=None if killed == "killed" else True)
print("passes", len(passes))
"""


def test_a_killed_run_finds_its_file_again(model_folder, edits, tmp_path):
    edits.save(tmp_path / "edits.jsonl")

    def run(what):
        arguments = [model_folder, tmp_path / "edits.jsonl", tmp_path / "run", what]
        return subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True)

    assert run("killed").returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "prefix_cache" / "states.bin").exists()
    done = run("resumed")
    assert done.returncode == 0, done.stderr
    assert "passes 2" in done.stdout.splitlines()  # one for the shape and one to check; computed anew there would be 5
    assert not (tmp_path / "run" / "prefix_cache").exists()


def test_a_budget_below_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`prefix_cache_memory` is -1.0, expected 0 or more"):
        config(tmp_path, prefix_cache_memory=-1.0)


def test_in_memory_nothing_is_written(tmp_path):
    store = StateStore((4, 2), torch.float32, 0)
    store.write(torch.tensor([1, 3]), torch.ones(2, 2))
    store.finish()
    assert store.read(torch.tensor([[3], [1]])).tolist() == [[[1.0, 1.0]], [[1.0, 1.0]]] and store.bytes == 32
