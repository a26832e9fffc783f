"""What several verbs check before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from ..trainer import EditConfig


def check_model(model: str) -> None:
    """Refuse a model's folder that is not there, which would be looked for on the Hub.

    Args:
        model (`str`):
            The folder, or a name on the Hub.

    Raises:
        `ValueError`: If it is an absolute path, and no folder.
    """
    if Path(model).is_absolute() and not Path(model).is_dir():
        raise ValueError(f"the model folder {model} does not exist")


def check_output(output: str, config: EditConfig | None = None) -> None:
    """Refuse a file to write into, and two folders: a verb's `--output` is what `output_dir` is in Python.

    Args:
        output (`str`):
            The option.
        config ([`EditConfig`], *optional*):
            The training arguments, whose `output_dir` has its default where it was not given.

    Raises:
        `ValueError`: If it is a file, or both were given and differ.
    """
    if Path(output).is_file():
        raise ValueError(f"`--output` is {output}, which is a file: give a folder")
    if config is not None and config.output_dir not in (None, "trainer_output", output):
        raise ValueError(f"`--output` is {output} and `--output_dir` is {config.output_dir}: give `--output` only")
