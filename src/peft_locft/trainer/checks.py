"""What is refused before anything is trained or written, and why."""

from __future__ import annotations

import json
import os
from itertools import zip_longest
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import TrainingArguments

from ..edits import LEDGER_NAME, EditSet
from ..tuner.messages import shown
from .augmentation import scored_prompts


# Of LoRA, the initialisations that take out of the base weight what they put into the adapter.
_CHANGING_STARTS = ("pissa", "corda", "olora", "loftq", "lora_ga")
# Any of these says that a folder holds a run.
_RUN_FILES = ("adapter_config.json", "adapter_model.safetensors", "edit_results.json", LEDGER_NAME)


def step_size(args: TrainingArguments) -> int:
    """Return how many edits make a step.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The arguments.

    Returns:
        `int`: The edits of all processes and accumulation steps together.
    """
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * max(args.world_size, 1)


def check_start(config: PeftConfig | None) -> None:
    """Refuse an adapter whose start changes the weights beside it: the unedited model would be gone.

    Args:
        config ([`~peft.PeftConfig`], *optional*):
            Of the adapter that is to be trained.

    Raises:
        `ValueError`: If it does.
    """
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(_CHANGING_STARTS):
        raise ValueError(
            f"`init_lora_weights` is {start!r}, which changes the base model's own weights, expected a start that leaves them, "
            "such as True or 'gaussian': answers before and after, and what the model is held to, are those of the unedited model"
        )


def check_breadth_first(args: TrainingArguments, num_edits: int) -> None:
    """Refuse arguments under which an epoch would not visit every edit once, in shuffled mini-batches.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The arguments.
        num_edits (`int`):
            How many edits there are.

    Raises:
        `ValueError`: Naming everything that defeats breadth-first training.
    """
    batch = step_size(args)
    steps = -(-num_edits // batch)
    faults = []
    if batch == 1 and num_edits > 1:
        faults.append(
            f"a batch of one edit (`per_device_train_batch_size=1`) for {num_edits} edits, expected at least 2: single "
            "edits overwrite each other"
        )
    if 0 < args.max_steps < steps:
        faults.append(
            f"`max_steps={args.max_steps}`, expected at least the {steps} steps that an epoch has: under that, some "
            "edits are never trained"
        )
    if args.max_steps <= 0 and args.num_train_epochs < 1:
        faults.append(
            f"`num_train_epochs={args.num_train_epochs}`, expected at least 1: under that, some edits are never trained"
        )
    if args.train_sampling_strategy == "sequential":
        faults.append("`train_sampling_strategy='sequential'`, expected 'random': every epoch has to be shuffled")
    if args.dataloader_drop_last:
        faults.append("`dataloader_drop_last=True`, expected False: it leaves out the last edits of every epoch")
    if faults:
        raise ValueError(
            "LocFT-BF trains breadth-first, in epochs that visit every edit once in shuffled mini-batches (LocFT-BF, "
            "section 3). This is defeated by " + "; by ".join(faults)
        )


def check_output_dir(output_dir: str | os.PathLike) -> None:
    """Refuse a folder that holds another run.

    Args:
        output_dir (`str` or `os.PathLike`):
            Where the run is to be written.

    Raises:
        `FileExistsError`: If it holds a run already.
        `NotADirectoryError`: If it is a file.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"the output folder {folder} is a file: choose another one")
    found = sorted(name for name in _RUN_FILES if (folder / name).exists())
    found += sorted(path.name for path in folder.glob("checkpoint-*"))
    if found:
        raise FileExistsError(
            f"the output folder {folder} holds another run ({', '.join(found)}), expected an empty or new one: choose "
            "another folder, go on with that run by `resume_from_checkpoint=True`, or delete it"
        )


def find_checkpoint(output_dir: str | os.PathLike) -> Path:
    """Return the newest complete checkpoint. One that was being written when its process was killed is passed over.

    Args:
        output_dir (`str` or `os.PathLike`):
            The folder of the run.

    Returns:
        `Path`: The checkpoint's folder.

    Raises:
        `FileNotFoundError`: If there is none.
    """
    found = sorted(
        (path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()),
        key=lambda path: int(path.name.split("-")[-1]),
        reverse=True,
    )
    for path in found:
        if read_state(path) is not None:
            return path
    raise FileNotFoundError(
        f"there is no complete checkpoint in {output_dir}: start the run anew, without `resume_from_checkpoint`"
    )


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """Return a checkpoint's trainer state, or None if it is incomplete: the state is the last thing that is written.

    Args:
        checkpoint (`Path`):
            The checkpoint's folder.

    Returns:
        `dict[str, Any]` or `None`: The state.
    """
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def check_same_edits(checkpoint: Path, edits: EditSet) -> None:
    """Refuse to resume a run with other edits than it was begun with.

    Args:
        checkpoint (`Path`):
            The checkpoint's folder.
        edits ([`EditSet`]):
            The edits given now.

    Raises:
        `ValueError`: If they differ.
    """
    ledger = checkpoint / LEDGER_NAME
    if not ledger.is_file():
        return
    with ledger.open(encoding="utf-8") as lines:
        is_same = all(line == given for line, given in zip_longest(lines, edits.iter_jsonl()))
    if not is_same:
        raise ValueError(
            f"the checkpoint {checkpoint} was trained on other edits than the {len(edits)} given now (see its "
            f"{LEDGER_NAME}): resume with the same edits in the same order, or start a new run in another folder"
        )


def check_same_place(checkpoint: Path, model: PeftModel) -> None:
    """Refuse to resume a run with an adapter of other weights than it was begun with, of which nothing would be loaded.

    Args:
        checkpoint (`Path`):
            The checkpoint's folder.
        model ([`~peft.PeftModel`]):
            The model that is trained now.

    Raises:
        `ValueError`: If they differ.
    """
    path = checkpoint / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    with safe_open(path, "pt") as file:
        saved = list(file.keys())
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    # Only what the adapter adds: PEFT saves whole embeddings beside it, where it thinks they were changed.
    before, now = ({name for name in names if model.base_model.prefix in name} for names in (saved, state))
    if now != before:
        raise ValueError(
            f"the checkpoint {checkpoint} holds {shown(sorted(before), 3)}, and what is trained now is {shown(sorted(now), 3)}: resume "
            "with the `peft_config` and the recipe that the run was begun with, or start a new run in another folder"
        )


def describe_taught(edits: EditSet) -> str | None:
    """Say which edits' probes are trained on after all, because they are prompts of edits, their own or others.

    Args:
        edits ([`EditSet`]):
            The edits.

    Returns:
        `str` or `None`: One sentence, or `None` if there are none.
    """
    trained = {text for edit in edits for text in (edit.prompt, *edit.train_rephrases)}
    taught = [f"{prompt!r} of {edit.id}" for edit in edits for prompt in scored_prompts(edit) if prompt in trained]
    if not taught:
        return None
    return (
        f"{len(taught)} of the edits' rephrases and probes are trained on as prompts of edits, and say nothing about what was "
        f"not trained: {shown(taught, 3)}. Leave them out, to be scored on the others alone"
    )
