"""Second moments of what enters the edited modules when the model reads ordinary text, and of what their outputs do to it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..edits.tokens import encode_prompts
from ..tuner import layer_index, layers_name
from ..tuner.temporary import evaluating


# Where a run keeps them, in its folder.
FOLDER_NAME = "preservation"


class _Moments(Mapping[str, torch.Tensor]):
    """Second moments by the modules' names, which travel through a file."""

    file_name: str
    term: str

    def __init__(self, moments: dict[str, torch.Tensor], tokens: int):
        self._moments, self.tokens = moments, tokens

    def __getitem__(self, module: str) -> torch.Tensor:
        return self._moments[module]

    def __iter__(self):
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def save(self, folder: str | os.PathLike) -> None:
        """Write them into a folder, as the file `file_name`, which can be published like any other.

        Args:
            folder (`str` or `os.PathLike`):
                The folder.
        """
        save_whole(self._moments, Path(folder) / self.file_name, {"tokens": json.dumps(self.tokens)})

    @classmethod
    def load(cls, source: str | os.PathLike) -> _Moments:
        """Read them.

        Args:
            source (`str` or `os.PathLike`):
                A folder, such as that of a run, or a repository on the Hub.

        Returns:
            [`InputStatistics`] or [`OutputStatistics`]: The statistics.

        Raises:
            `ValueError`: If they are not there.
        """
        folder = Path(source)
        path = next(
            (path for path in (folder / cls.file_name, folder / FOLDER_NAME / cls.file_name) if path.is_file()), folder
        )
        if folder.is_dir() and path == folder:
            raise ValueError(
                f"the folder {source} has no {cls.file_name}, expected that of a run with `{cls.term}`, or what "
                f"`{cls.__name__}.save` writes: leave `statistics` out to have them computed, or turn `{cls.term}` off"
            )
        if not folder.is_dir():
            try:
                path = hf_hub_download(str(source), cls.file_name)
            except (HfHubHTTPError, HFValidationError, OSError) as error:
                raise ValueError(
                    f"the statistics {str(source)!r} are neither a folder nor in a repository on the Hub ({error}): leave "
                    "them out to have them computed"
                ) from error
        with safe_open(path, "pt") as file:
            tokens = json.loads((file.metadata() or {}).get("tokens", "0"))
            return cls({name: file.get_tensor(name) for name in file.keys()}, tokens)


class InputStatistics(_Moments):
    """The second moments C = E[x xᵀ] of the inputs of modules, by the modules' names.

    Args:
        moments (`dict[str, torch.Tensor]`):
            Of shape (in_features, in_features), in float32, by the module's name in the base model.
        tokens (`int`):
            How many tokens they are the mean of.
    """

    file_name, term = "input_statistics.safetensors", "projector"


class OutputStatistics(_Moments):
    """The second moments G = E[g gᵀ] of the gradients at the outputs of modules, by the modules' names: the Fisher
    information of what a model says about the outputs, as in K-FAC ([arXiv 1503.05671](https://arxiv.org/abs/1503.05671),
    section 3).

    Args:
        moments (`dict[str, torch.Tensor]`):
            Of shape (out_features, out_features), in float32, by the module's name in the base model.
        tokens (`int`):
            How many tokens they are the mean of.
    """

    file_name, term = "output_statistics.safetensors", "output_projector"


@torch.no_grad()
def input_statistics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    modules: Sequence[str],
    *,
    max_length: int = 512,
    batch_size: int = 8,
) -> InputStatistics:
    """Compute the second moments of what enters some modules while the model reads texts.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The unedited model. Modules that PEFT has wrapped are known by their names in the model below it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        texts (`Sequence[str]`):
            Ordinary text. What comes after `max_length` tokens is not read.
        modules (`Sequence[str]`):
            The names of the modules, whose inputs have the shape (..., in_features).
        max_length (`int`, *optional*, defaults to `512`):
            How many tokens of a text are read.
        batch_size (`int`, *optional*, defaults to `8`):
            How many texts are read at once.

    Returns:
        [`InputStatistics`]: The statistics.

    Raises:
        `ValueError`: If there is no text.
    """
    encoded = sorted((ids[:max_length] for ids in encode_prompts(tokenizer, texts) if ids), key=len)
    if not encoded:
        raise ValueError(
            f"got {len(texts)} texts with no token in them, expected ordinary text to compute statistics of"
        )
    sums: dict[str, torch.Tensor] = {}
    mask: torch.Tensor | None = None

    def watch(name: str):
        def add(module: nn.Module, args: tuple) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            x = x[mask].float()  # (tokens, in_features)
            moment = x.T @ x
            sums[name] = sums[name] + moment if name in sums else moment

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in modules]
    handles += _stop_behind(model, modules)
    below = f"{model.base_model_prefix}."
    # The head is not asked if it is not watched: its logits would be most of the work.
    decoder = model.base_model if all(name.startswith(below) for name in modules) else model
    try:
        with evaluating(model):
            for begin in range(0, len(encoded), batch_size):
                ids, attention = padded(encoded[begin : begin + batch_size], model.device)
                mask = attention.bool().flatten()
                with suppress(_Enough):
                    decoder(input_ids=ids, attention_mask=attention, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(map(len, encoded))
    return InputStatistics({name: (moment / tokens).cpu() for name, moment in sums.items()}, tokens)


def output_statistics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    modules: Sequence[str],
    *,
    max_length: int = 48,
    batch_size: int = 8,
    seed: int = 42,
) -> OutputStatistics:
    """Compute the second moments of the gradients at the outputs of some modules while the model reads texts.

    The gradients are those of the log probability of tokens that the model itself draws, one behind each token of the texts:
    with the texts' own tokens they would not be the Fisher information
    ([arXiv 1905.12558](https://arxiv.org/abs/1905.12558)).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The unedited model. Modules that PEFT has wrapped are known by their names in the model below it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        texts (`Sequence[str]`):
            Ordinary text. What comes after `max_length` tokens is not read.
        modules (`Sequence[str]`):
            The names of the modules, whose outputs have the shape (batch, sequence, out_features), or (batch · sequence,
            out_features).
        max_length (`int`, *optional*, defaults to `48`):
            How many tokens of a text are read.
        batch_size (`int`, *optional*, defaults to `8`):
            How many texts are read at once.
        seed (`int`, *optional*, defaults to `42`):
            What tells which tokens are drawn.

    Returns:
        [`OutputStatistics`]: The statistics.

    Raises:
        `ValueError`: If there is no text of two tokens.
    """
    encoded = sorted((ids[:max_length] for ids in encode_prompts(tokenizer, texts) if len(ids) > 1), key=len)
    if not encoded:
        raise ValueError(
            f"got {len(texts)} texts, none of two tokens, expected ordinary text to compute statistics of"
        )
    generator = torch.Generator(model.device).manual_seed(seed)
    sums: dict[str, torch.Tensor] = {}
    taps: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def add(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            taps[name] = torch.zeros_like(output, requires_grad=True)
            return output + taps[name]

        return add

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in modules]
    try:
        with evaluating(model), torch.enable_grad():
            for begin in range(0, len(encoded), batch_size):
                ids, mask = padded(encoded[begin : begin + batch_size], model.device)
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
                log_probs = logits.log_softmax(-1)  # (batch, seq, vocabulary)
                drawn = torch.multinomial(log_probs.detach().exp().flatten(0, 1), 1, generator=generator)
                said = log_probs.gather(-1, drawn.view(*ids.shape, 1)).squeeze(-1)
                for name, gradient in zip(taps, torch.autograd.grad((said * mask).sum(), list(taps.values()))):
                    gradient = gradient.reshape(*ids.shape, -1)  # OPT's modules have its first two dimensions in one
                    # All later tokens look at the first one, whatever it is; those of padding have no gradient.
                    g = gradient[:, 1:].flatten(0, 1).float()  # (batch * (seq - 1), out_features)
                    moment = g.T @ g
                    sums[name] = sums[name] + moment if name in sums else moment
                taps.clear()
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(len(ids) - 1 for ids in encoded)
    return OutputStatistics({name: (moment / tokens).cpu() for name, moment in sums.items()}, tokens)


def save_whole(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors into a file so that a reader, or a run killed halfway, sees the old one or the new, never a part.

    Args:
        tensors (`dict[str, torch.Tensor]`):
            The tensors.
        path (`Path`):
            The file. Its folder is made if it is missing.
        metadata (`dict[str, str]`):
            What is said about them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished, metadata=metadata)
    os.replace(unfinished, path)


class _Enough(Exception):
    """All modules that are watched have been passed."""


def _stop_behind(model: PreTrainedModel, modules: Sequence[str]) -> list[RemovableHandle]:
    """Let the model stop behind the last layer that is watched, because the others would only take time."""
    stacks = {layers_name(name) for name in modules}
    if len(stacks) != 1 or None in stacks:
        return []
    layers, last = model.get_submodule(stacks.pop()), max(map(layer_index, modules))

    def stop(layer: nn.Module, args: tuple) -> None:
        raise _Enough

    return [layer.register_forward_pre_hook(stop) for layer in layers[last + 1 : last + 2]]


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay sequences of tokens out as rows, padded on the right.

    Args:
        sequences (`Sequence[Sequence[int]]`):
            The sequences, at least one.
        device (`torch.device`):
            Where to.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The tokens and the attention mask, each of shape (sequences, width).
    """
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)
