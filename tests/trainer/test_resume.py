"""A run that is killed, at any moment, resumes to the adapter of one that was not."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from peft_locft import EditConfig, EditTrainer, LocFTConfig


RUN = """
import json, os, signal, sys
import torch
from peft import LoraConfig
from peft_locft import EditConfig, EditTrainer
torch.set_num_threads(1)
model, edits, output, method, kill_at, resume = sys.argv[1:]
trainer = EditTrainer(
    model=model,
    args=EditConfig(
        output_dir=output, num_train_epochs=6, save_strategy="steps", save_steps=3, disable_tqdm=True, seed=3,
        **(dict(contexts=3, projector=1.0, output_projector=0.5, kl_weight=0.5, subject_focus=1.0, l2_weight=0.1, max_growth=0.5) if "kept" in method else {}),
    ),
    train_dataset=edits,
    peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules=["down_proj"]) if "lora" in method else None,
)
step = trainer.training_step
def training_step(*args, **kwargs):
    if trainer.state.global_step == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **kwargs)
trainer.training_step = training_step
trainer.train(resume_from_checkpoint=resume == "resume" or None)
trainer.save_model()
losses = [entry["epoch_loss"] for entry in trainer.state.log_history if "epoch_loss" in entry]
json.dump(losses, open(f"{output}/losses.json", "w"))
"""


def run(model_folder, edits_file, output, method, kill_at=-1, resume=False):
    arguments = [model_folder, edits_file, output, method, kill_at, "resume" if resume else "start"]
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True, timeout=600
    )


# An epoch has 4 steps, a checkpoint is made every 3. Killed at step 11, the last one lies inside the third epoch;
# killed at step 13, it is that of the third epoch's last step.
@pytest.mark.parametrize(
    ("method", "kill_at"), [("locft", 11), ("locft", 13), ("lora", 11), ("locft kept", 11), ("lora kept", 13)]
)
def test_a_killed_run_resumes_to_the_same_adapter(model_folder, edits, tmp_path, method, kill_at):
    edits.save(tmp_path / "edits.jsonl")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(model_folder, tmp_path / "edits.jsonl", whole, method)
    assert done.returncode == 0, done.stderr
    dead = run(model_folder, tmp_path / "edits.jsonl", killed, method, kill_at=kill_at)
    assert dead.returncode == -signal.SIGKILL
    assert not (killed / "adapter_model.safetensors").exists()
    # Killed while it wrote its newest checkpoint: the state, written last, is only half there.
    newest = killed / f"checkpoint-{kill_at // 3 * 3}"
    shutil.copytree(newest, killed / "checkpoint-14")
    (killed / "checkpoint-14" / "trainer_state.json").write_text('{"epoch": 2.')
    resumed = run(model_folder, tmp_path / "edits.jsonl", killed, method, resume=True)
    assert resumed.returncode == 0, resumed.stderr

    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, killed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [json.loads((folder / "losses.json").read_text()) for folder in (whole, killed)]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def train(model_folder, edits, output, **settings):
    resume = settings.pop("resume", None)
    trainer = EditTrainer(
        model=str(model_folder),
        args=EditConfig(**{"output_dir": str(output), "num_train_epochs": 3, "disable_tqdm": True, **settings}),
        train_dataset=edits,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def delta(trainer):
    return next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad).detach()


def test_a_run_killed_after_its_last_epoch_has_nothing_left_to_train(model_folder, edits, tmp_path):
    stopped = train(model_folder, edits, tmp_path, stop_loss=100)
    resumed = train(model_folder, edits, tmp_path, stop_loss=100, resume=True)
    assert stopped.state.global_step == resumed.state.global_step == 4
    assert torch.equal(delta(stopped), delta(resumed))
    assert resumed.args.num_train_epochs == 3
    assert resumed.evaluate()["eval_reliability"] == stopped.evaluate()["eval_reliability"]


def test_training_goes_on_in_the_same_trainer_and_for_more_epochs_from_a_checkpoint(model_folder, edits, tmp_path):
    short = train(model_folder, edits, tmp_path, num_train_epochs=2)
    longer = train(model_folder, edits, tmp_path, num_train_epochs=4, resume=True)
    assert [entry["step"] for entry in longer.state.log_history if "epoch_loss" in entry] == [4, 8, 12, 16]
    assert not torch.equal(delta(short), delta(longer))
    straight = train(model_folder, edits, tmp_path / "straight", num_train_epochs=4)
    assert torch.equal(delta(straight), delta(longer))


def test_other_edits_are_refused_on_resuming(model_folder, edits, tmp_path):
    train(model_folder, edits, tmp_path)
    with pytest.raises(ValueError, match="was trained on other edits than the 7 given now"):
        train(model_folder, edits[:7], tmp_path, resume=True)


@pytest.mark.parametrize(
    ("begun", "given", "message"),
    [
        (
            LocFTConfig(layers=[0]),
            LocFTConfig(layers=[1]),
            r"holds .*layers\.0\.mlp.*, and what is trained now is .*layers\.1\.mlp",
        ),
        (LocFTConfig(layers=[0]), LocFTConfig(layers=[0, 1]), "trained now is"),
        (
            LoraConfig(target_modules=["down_proj"], layers_to_transform=[0]),
            LoraConfig(target_modules=["down_proj"], layers_to_transform=[1]),
            "resume with the `peft_config` and the recipe that the run was begun with",
        ),
        (LocFTConfig(layers=[0]), LoraConfig(target_modules=["down_proj"], layers_to_transform=[0]), "lora_A"),
    ],
)
def test_resuming_at_another_place_is_refused(model_folder, edits, tmp_path, begun, given, message):
    args = EditConfig(output_dir=str(tmp_path / "run"), num_train_epochs=1, disable_tqdm=True, report_to="none")
    EditTrainer(str(model_folder), args, edits, peft_config=begun).train()
    with pytest.raises(ValueError, match=message):
        EditTrainer(str(model_folder), args, edits, peft_config=given).train(resume_from_checkpoint=True)


def test_an_output_folder_with_another_run_is_refused_and_left_alone(model_folder, edits, tmp_path):
    train(model_folder, edits, tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        FileExistsError, match=r"holds another run \(checkpoint-12, checkpoint-8\).*resume_from_checkpoint"
    ):
        train(model_folder, edits, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_resuming_without_a_complete_checkpoint_says_so(model_folder, edits, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no complete checkpoint in"):
        train(model_folder, edits, tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="checkpoint-3 is no complete checkpoint"):
        train(model_folder, edits, tmp_path, resume=str(tmp_path / "checkpoint-3"))
