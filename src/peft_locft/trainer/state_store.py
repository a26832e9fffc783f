"""Where the states of the prefix cache are kept: in memory, or in a file that outlives a restart."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..edits import write_atomically


FOLDER_NAME = "prefix_cache"
# More than this is hashed in pieces, so that a large tensor is not copied whole.
_PIECE = 2**26


class StateStore:
    """States of tokens, of shape (tokens, hidden).

    Args:
        shape (`tuple[int, int]`):
            How many tokens, and how wide a state is.
        dtype (`torch.dtype`):
            What to keep them in.
        outputs (`int`):
            How many outputs a layer of the model returns, in a tuple; 0 for a tensor alone.

    Attributes:
        bytes (`int`):
            The size of all states, in bytes.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, outputs: int):
        self.shape, self.dtype, self.outputs = shape, dtype, outputs
        self.bytes = shape[0] * shape[1] * dtype.itemsize
        self._states: torch.Tensor | None = None
        self._folder: Path | None = None
        self._key = ""

    def open_file(self, folder: Path, key: str) -> bool:
        """Keep the states in a file instead of in memory.

        Args:
            folder (`Path`):
                The folder of the run.
            key (`str`):
                Tells the model, place, tokenizer and edits that the states belong to from all others.

        Returns:
            `bool`: Whether the file is there already, complete and of that key.

        Raises:
            `OSError`: If the file does not fit the disk.
        """
        self._folder, self._key = folder / FOLDER_NAME, key
        try:
            found = json.loads((self._folder / "key.json").read_text(encoding="utf-8"))
            if found == self._description() and self._path.stat().st_size == self.bytes:
                return True
        except (OSError, ValueError):
            pass
        self.delete()
        self._folder.mkdir(parents=True)
        free = shutil.disk_usage(self._folder).free
        if self.bytes > free:
            raise OSError(
                f"its {self.bytes / 2**30:.1f} GiB do not fit the {free / 2**30:.1f} GiB that are free in {folder}"
            )
        return False

    @property
    def _path(self) -> Path:
        return self._folder / "states.bin"

    def _description(self) -> dict:
        return {"key": self._key, "shape": list(self.shape), "dtype": str(self.dtype), "outputs": self.outputs}

    def _open(self) -> torch.Tensor:
        if self._folder is None:
            if self._states is None:
                self._states = torch.empty(self.shape, dtype=self.dtype)
            return self._states
        # Mapped anew each time, so that what was read does not stay in the memory of the process.
        size = self.shape[0] * self.shape[1]
        return torch.from_file(str(self._path), shared=True, size=size, dtype=self.dtype).view(self.shape)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return states.

        Args:
            tokens (`torch.Tensor`):
                The tokens' places, of any shape.

        Returns:
            `torch.Tensor`: Of shape (*tokens, hidden).
        """
        return self._open()[tokens]

    def write(self, tokens: torch.Tensor, states: torch.Tensor) -> None:
        """Keep states.

        Args:
            tokens (`torch.Tensor`):
                The tokens' places, of shape (tokens,).
            states (`torch.Tensor`):
                Of shape (tokens, hidden).
        """
        self._open()[tokens] = states.to("cpu", self.dtype)

    def finish(self) -> None:
        """Say that all states are there, so that another run may use them."""
        if self._folder is not None:
            write_atomically(self._folder / "key.json", json.dumps(self._description()))

    def delete(self) -> None:
        """Delete the file, if there is one."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def lengths_of(dataset: Dataset) -> torch.Tensor:
    """Return the lengths of tokenised edits, in tokens, of shape (edits,)."""
    table = dataset.with_format("arrow")[:]
    return torch.tensor(pc.list_value_length(table["input_ids"]).to_numpy(), dtype=torch.long)


@torch.no_grad()
def prefix_key(model: PeftModel, first: nn.Module, dataset: Dataset) -> str:
    """Return a hash of all that the states depend on: every weight that is not trained and not in the lowest trained
    layer or above, the model's config, the tokens, the place, and the versions of the libraries.

    Args:
        model ([`~peft.PeftModel`]):
            The model.
        first (`torch.nn.Module`):
            The lowest trained layer.
        dataset ([`~datasets.Dataset`]):
            The tokenised edits.

    Returns:
        `str`: The hash.
    """
    base = model.get_base_model()
    place = next(name for name, module in base.named_modules() if module is first)
    said = [place, str(model.device), base.config.to_json_string(), transformers.__version__, torch.__version__]
    digest = hashlib.sha256("\n".join(said).encode())
    for batch in dataset.select_columns(["input_ids"]).with_format("arrow").iter(1000):
        digest.update(repr(batch["input_ids"].to_pylist()).encode())
    stack, _, lowest = place.rpartition(".")
    for name, value in [*base.named_parameters(), *base.named_buffers()]:
        above = name.startswith(f"{stack}.") and int(name[len(stack) + 1 :].split(".")[0]) >= int(lowest)
        if above or value.requires_grad:
            continue
        digest.update(name.encode())
        _update_with(digest, _value(base, name, value))
    return digest.hexdigest()


@torch.no_grad()
def weights_hash(weights: Iterable[tuple[str, torch.Tensor]], count: int | None = None) -> str:
    """Return a hash of weights, and of their names, shapes and dtypes.

    Args:
        weights (`Iterable[tuple[str, torch.Tensor]]`):
            Names and weights. Of one that accelerate has offloaded to disk, its values do not count.
        count (`int`, *optional*):
            How many values of each weight count, from its first. Defaults to all.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, value in weights:
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if value.device.type != "meta":
            _update_with(digest, value, count)
    return digest.hexdigest()


def _update_with(digest: Any, value: torch.Tensor, count: int | None = None) -> None:
    """Add a tensor's bytes to a hash, or those of its first numbers, in pieces, so that a large weight is not copied whole."""
    if is_traceable_wrapper_subclass(value):  # torchao's quantised weights, which have no view
        for name in value.__tensor_flatten__()[0]:
            _update_with(digest, getattr(value, name), count)
        return
    for piece in value.detach().reshape(-1)[:count].split(_PIECE):
        digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())


def _value(base: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """Return a parameter that may have been offloaded by accelerate, which leaves an empty one in its place."""
    if value.device.type != "meta":
        return value
    module, _, leaf = name.rpartition(".")
    return base.get_submodule(module)._hf_hook.weights_map[leaf]
