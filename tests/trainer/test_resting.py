"""Learned edits leave the epochs, come back, and the stop is only ever called by an epoch that visited all."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from peft_locft import EditConfig, EditTrainer, LocFTConfig
from peft_locft.trainer.loss import EditLosses
from peft_locft.trainer.resting import Resting


def config(tmp_path, **settings):
    settings = {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 5e-2,
        "skip_loss": 0.05,
        "stop_loss": 0.05,
    } | settings
    return EditConfig(output_dir=str(tmp_path / "run"), **settings)


def visit(resting, losses):
    """An epoch in one batch; resting edits are not computed."""
    losses = torch.tensor(losses).masked_fill(resting.now, 0.0)
    return resting.complete(torch.arange(len(losses)), EditLosses(losses, losses < 0.5))


def test_the_schedule_by_hand(tmp_path):
    resting = Resting(4, config(tmp_path, recheck_epochs=2, skip_loss=0.01, stop_loss=0.01))
    visit(resting, [2.0, 0.001, 1.0, 0.005])
    assert resting.end_epoch(0.75) and resting.now.tolist() == [False, True, False, True]
    found = visit(resting, [0.002, 9.0, 1.0, 9.0])  # what edits 1 and 3 have become is not seen
    assert found.per_edit.tolist() == pytest.approx([0.002, 0.001, 1.0, 0.005])
    assert found.learned.tolist() == [True, True, False, True]
    assert not resting.end_epoch(0.25) and resting.now.tolist() == [True, True, False, True]
    visit(resting, [9.0, 9.0, 0.5, 9.0])
    assert not resting.end_epoch(0.13) and not resting.now.any()  # rested two epochs: all are visited again
    found = visit(resting, [0.003, 0.3, 0.2, 0.002])
    assert found.per_edit.tolist() == pytest.approx([0.003, 0.3, 0.2, 0.002])
    assert resting.end_epoch(0.13) and resting.now.tolist() == [True, False, False, True]


def test_a_small_loss_that_rests_on_memory_has_all_visited_next(tmp_path):
    resting = Resting(2, config(tmp_path, recheck_epochs=9, skip_loss=0.01, stop_loss=0.01))
    visit(resting, [0.001, 1.0])
    resting.end_epoch(0.5)
    visit(resting, [9.0, 0.002])
    assert not resting.end_epoch(0.0015) and not resting.now.any()


def test_off_no_edit_ever_rests(tmp_path):
    resting = Resting(2, config(tmp_path))
    assert resting.end_epoch(0.5) and not resting.now.any()


@pytest.fixture
def train(make_model, tokenizer, edits, tmp_path):
    def train(**settings):
        trainer = EditTrainer(
            model=make_model(),
            args=config(tmp_path, num_train_epochs=60, **settings),
            train_dataset=edits,
            processing_class=tokenizer,
            peft_config=LocFTConfig(layers=[1]),
        )
        computed = []
        compute = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: (
            computed.append(len(args[1]["owners"].unique())) or compute(*args, **kwargs)
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "epoch_loss" in entry]
        return trainer, logs, sum(computed)

    return train


def test_the_last_epoch_visited_all_and_its_loss_is_true(train, edits):
    trainer, logs, computed = train(recheck_epochs=3)
    assert logs[-1]["epoch_loss"] < 0.05 and len(logs) < 60
    assert max(entry["edits_resting"] for entry in logs) > 0
    assert computed < len(logs) * len(edits)
    assert all(entry["edits_visited"] == len(edits) for entry in logs)
    trainer.evaluate()
    assert trainer.results.after["reliability"] == 1


def test_resting_edits_count_as_they_were_in_the_batch(train):
    # Batches of all eight: the gradient is the mean over eight, of which the resting ones give none.
    _, logs, _ = train(recheck_epochs=3, per_device_train_batch_size=8)
    assert logs[-1]["epoch_loss"] < 0.05


RUN = """
import os, signal, sys, torch
from peft_locft import EditConfig, EditTrainer, LocFTConfig
torch.set_num_threads(1)
model, edits, output, kill_at, resume = sys.argv[1:]
trainer = EditTrainer(
    model=model,
    args=EditConfig(output_dir=output, num_train_epochs=60, save_strategy="steps", save_steps=3, disable_tqdm=True,
        report_to="none", recheck_epochs=3, learning_rate=5e-2, skip_loss=0.05, stop_loss=0.05),
    train_dataset=edits, peft_config=LocFTConfig(layers=[1]),
)
step = trainer.training_step
def training_step(*args, **kwargs):
    if trainer.state.global_step == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **kwargs)
trainer.training_step = training_step
trainer.train(resume_from_checkpoint=resume == "resume" or None)
trainer.save_model()
"""


def test_a_killed_run_with_resting_edits_resumes_to_the_same_adapter(model_folder, edits, tmp_path, train):
    _, logs, _ = train(recheck_epochs=3)
    first = next(number for number, entry in enumerate(logs, 1) if entry["edits_resting"])
    kill_at = 4 * first + 3  # an epoch has 4 steps; in the next one, some rest
    edits.save(tmp_path / "edits.jsonl")

    def run(output, kill_at=-1, resume="start"):
        arguments = [model_folder, tmp_path / "edits.jsonl", output, kill_at, resume]
        return subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True)

    done = run(tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert run(tmp_path / "killed", kill_at).returncode == -signal.SIGKILL
    newest = max((tmp_path / "killed").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    assert json.loads((newest / "resting_edits.json").read_text())["now"]
    done = run(tmp_path / "killed", resume="resume")
    assert done.returncode == 0, done.stderr
    whole, killed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)


def test_more_than_one_reader_of_edits_is_refused(tmp_path):
    with pytest.raises(ValueError) as caught:
        config(tmp_path, recheck_epochs=2, dataloader_num_workers=2)
    assert str(caught.value) == (
        "`recheck_epochs` is 2 with 2 data loader workers and 1 processes, expected 0 workers and 1 process, which "
        "know what an epoch visits"
    )
    with pytest.raises(ValueError, match=r"`recheck_epochs` is -1, expected 0 \(off\) or more"):
        config(tmp_path, recheck_epochs=-1)
