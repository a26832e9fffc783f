"""`LocFTConfig`: where the dense delta goes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.peft_types import PeftType
from torch import nn
from transformers import PreTrainedConfig

from ..edits import EditSet, write_atomically
from .config_checks import as_layers, check_names, check_patterns, check_ranks
from .messages import cut


# What stands beside the weights in an adapter's repository, and has to travel with them.
COMPANION_FILES = ("edits.jsonl", "edit_results.json", "README.md")
_TYPES = {
    "init_weights": (bool, "True or False"),
    "strict": (bool, "True or False"),
    "inference_mode": (bool, "True or False"),
    "task_type": (str, "a name such as 'CAUSAL_LM'"),
    "base_model_name_or_path": ((str, os.PathLike), "a name or a folder"),
    "revision": (str, "a branch, a tag or a commit"),
}


@dataclass
class LocFTConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`LocFTModel`]: plain fine-tuning of a few
    well-chosen weights, held as one dense delta for each targeted module, `y = W x + ΔW x`, with `ΔW` zero at start.
    The method is LocFT-BF ([Fine-tuning Done Right in Model Editing](https://arxiv.org/abs/2509.22072)).

    Args:
        layers (`list[int]` or `int`, *optional*):
            The decoder layers to edit, counted from 0; negative ones count from the last. Another name for PEFT's
            `layers_to_transform`. If left out, every layer is edited.
        target_modules (`list[str]` or `str`, *optional*):
            The modules to edit in these layers. Each entry of a list is

            - a name, whole or its end: `"mlp.down_proj"`, `"embed_tokens"`;
            - a part of the model, of which all linear layers are meant: `"self_attn"`, `"mlp.shared_expert"`;
            - a group, whatever the architecture calls it: `"mlp"`, `"attention"` or `"layer"` (section 4.2 of the
              paper);
            - fused experts of a mixture: `"mlp.experts.down_proj"` for all, `"mlp.experts.3.down_proj"` for one.

            In a model of several towers the text model is meant, unless an entry begins with the name of another one:
            `"vision_tower.mlp.fc1"`. A string is a regular expression that matches the whole name (in another tower,
            only if it contains that one's name), or `"all-linear"`, and goes without `layers`. Defaults to the down
            projection of the MLP, the place that disturbs a model least (section 4.2 of the paper).
        exclude_modules (`list[str]` or `str`, *optional*):
            Modules to leave out, in the same notation.
        init_weights (`bool`, *optional*, defaults to `True`):
            `True` starts with a delta of zero, so that nothing is changed before training. `False` starts with a
            random delta, for tests only.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train and save as full copies.
        layers_to_transform (`list[int]` or `int`, *optional*):
            PEFT's own name for `layers`.
        layers_pattern (`list[str]` or `str`, *optional*):
            The name of the list of layers, needed only where PEFT does not find it.
        strict (`bool`, *optional*, defaults to `False`):
            Whether loading the adapter on another base model than it was trained on is an error. Otherwise it is a
            warning.
        base_fingerprint (`dict[str, dict]`, *optional*):
            What the edited weights of the base model looked like, by name. Filled in when the adapter is made.
        tokenizer_fingerprint (`str`, *optional*):
            The same for the tokenizer. Filled in by [`EditTrainer`].
        rank_pattern (`dict[str, int]`, *optional*):
            The modules whose delta is held as a product of two matrices of this rank. Filled in by
            [`save_compressed`].

    Raises:
        `ValueError`: If a field has a value that it cannot have. A config from the Hub is untrusted, so the same
            holds for one that is loaded.

    Examples:

    ```python
    >>> from peft import get_peft_model
    >>> model = get_peft_model(base, LocFTConfig(layers=[6], target_modules=["mlp.down_proj"]))
    ```
    """

    layers: list[int] | int | None = field(
        default=None, metadata={"help": "The decoder layers to edit; negative ones count from the last."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "The modules to edit. Defaults to the down projection of the model's MLP."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    init_weights: bool = field(
        default=True, metadata={"help": "Whether the delta starts at zero (True) or at random (False, for tests)."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save as full copies."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "PEFT's name for `layers`."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the list of layers, where PEFT does not find it."}
    )
    strict: bool = field(default=False, metadata={"help": "Whether another base model is an error, not a warning."})
    base_fingerprint: dict[str, dict] | None = field(
        default=None, metadata={"help": "What the edited weights of the base model looked like. Filled in."}
    )
    tokenizer_fingerprint: str | None = field(
        default=None, metadata={"help": "What the tokenizer looked like. Filled in."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "The ranks of modules whose delta is compressed. Filled in."}
    )

    def __post_init__(self):
        for name, (kind, expected) in _TYPES.items():
            value = getattr(self, name)
            is_missing = value is None and kind is not bool
            # The length, because PEFT's own message would repeat a task type of any length.
            if not is_missing and (not isinstance(value, kind) or len(str(value)) > 4096):
                raise ValueError(f"`{name}` is {cut(value)}, expected {expected}")
        super().__post_init__()
        self.peft_type = PeftType.LOCFT
        for name in ("target_modules", "exclude_modules"):
            modules = getattr(self, name)
            if isinstance(modules, (list, tuple, set)):
                check_names(modules, name)
                setattr(self, name, set(modules))
            elif modules is not None and not isinstance(modules, str):
                raise ValueError(f"`{name}` is {cut(modules)}, expected a list of names or a regular expression")
        if self.modules_to_save is not None:
            check_names(self.modules_to_save, "modules_to_save")
        check_ranks(self.rank_pattern)
        check_patterns(self.layers_pattern)
        layers = as_layers(self.layers, "layers")
        to_transform = as_layers(self.layers_to_transform, "layers_to_transform")
        if layers is not None and to_transform is not None and layers != to_transform:
            raise ValueError(
                f"`layers` is {cut(layers)} and `layers_to_transform` is {cut(to_transform)}: they mean the same, give "
                "one of them"
            )
        self.layers = layers if layers is not None else to_transform
        if layers is not None or not isinstance(self.layers_to_transform, int):
            self.layers_to_transform = self.layers  # PEFT keeps a single integer as it is
        if self.layers is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"`layers` is {cut(self.layers)} and `target_modules` is the string {cut(self.target_modules)}, which is "
                "a regular expression over whole names, in which PEFT takes no layers: give a list, as in "
                f"`target_modules=[{cut(self.target_modules)}]`, or put the layers into the expression"
            )
        if self.layers_pattern and self.layers is None:
            raise ValueError("When `layers_pattern` is specified, `layers` must also be specified.")
        # What the config means in the model that it was last put into: see `resolve_targets`.
        self._targets: dict[str, dict[str, tuple[int, ...] | None]] = {}
        self._excluded: set[str] = set()
        self._is_loaded = False
        # What was asked for, and what became of it in the model that the config was last put into.
        self._requested = self._resolved = self.places()
        self._has_filled_fingerprint = False
        self._companions: dict[str, str | EditSet] | None = None
        self._origin: tuple[str, str | None, dict] | None = None
        self._reason: str | None = None

    @classmethod
    def recommended(cls, model: nn.Module | PreTrainedConfig) -> LocFTConfig:
        """Return the config for the place that is recommended for a model, which is the default of [`EditTrainer`].

        For the models that the paper names (Llama-3-8B, Mistral-7B-v0.1, Qwen2.5-7B, Qwen1.5-MoE-A2.7B) it is the paper's
        place, for larger members of these families the proportional layer, and for all others the down projection of a
        late layer. The config's `reason` says which of these, and why. What a model is, is told by the fields of its
        config: type, number of layers, hidden size and vocabulary.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~transformers.PreTrainedConfig`]):
                The model to be edited, or its config. From a config, no weights are loaded.

        Returns:
            [`LocFTConfig`]: With one layer and one entry in `target_modules`.

        Raises:
            `TypeError`: If `model` is neither a model nor a config.
            `ValueError`: If the config does not tell the number of layers, or no down projection is found.

        Examples:

        ```python
        >>> from transformers import AutoConfig
        >>> config = LocFTConfig.recommended(AutoConfig.from_pretrained("Qwen/Qwen2.5-72B"))
        >>> config.layers, config.target_modules
        ([19], {'mlp.down_proj'})
        ```
        """
        from .recommendation import recommended_place  # which imports this file

        place = recommended_place(model)
        config = cls(layers=[place.layer], target_modules=[place.module], task_type="CAUSAL_LM")
        config.set_reason(place.reason)
        return config

    @property
    def reason(self) -> str | None:
        """Why this place, in words (`str`); `None` for a config that was made otherwise. Not saved."""
        return self._reason

    def set_reason(self, reason: str) -> None:
        """Say why this place.

        Args:
            reason (`str`):
                In words.
        """
        self._reason = reason

    def set_layers(self, layers: list[int]) -> None:
        """Set the layers under both of their names.

        Args:
            layers (`list[int]`):
                The layers.
        """
        self.layers = self.layers_to_transform = layers

    def to_dict(self) -> dict[str, Any]:
        # One name on disk: `layers_to_transform` is the one that PEFT's own conversions read.
        return {name: value for name, value in super().to_dict().items() if name != "layers"}

    @property
    def targets(self) -> dict[str, dict[str, tuple[int, ...] | None]]:
        """By module and parameter of the model that the config was last put into, the experts that it edits, or `None`
        for a weight without experts (`dict[str, dict[str, tuple[int, ...] | None]]`)."""
        return self._targets

    def set_targets(self, targets: dict[str, dict[str, tuple[int, ...] | None]], excluded: set[str]) -> None:
        """Set what the config means in a model.

        Args:
            targets (`dict[str, dict[str, tuple[int, ...] | None]]`):
                By module and parameter, the experts to edit.
            excluded (`set[str]`):
                The modules that are left out.
        """
        self._targets, self._excluded = targets, excluded

    def places(self) -> tuple:
        """Return where the config edits (`tuple`: layers, the pattern of their list, and modules)."""
        return self.layers, self.layers_pattern, self.target_modules

    def remember_model(self, requested: tuple) -> None:
        """Remember what was asked for, before a model's layers and modules were filled in.

        Args:
            requested (`tuple`):
                The places that were asked for.
        """
        self._requested, self._resolved = requested, self.places()

    def forget_model(self) -> None:
        """Take back what was filled in for another model, so that one config can be used for several."""
        if self.places() == self._resolved:
            self.layers, self.layers_pattern, self.target_modules = self._requested
            self.layers_to_transform = self.layers
        if self._has_filled_fingerprint:
            self.base_fingerprint, self._has_filled_fingerprint = None, False

    def fill_fingerprint(self, fingerprint: dict[str, dict] | None) -> None:
        """Fill in the fingerprint of the base weights that a new adapter is put on.

        Args:
            fingerprint (`dict[str, dict]`, *optional*):
                By the weight's name.
        """
        self.base_fingerprint, self._has_filled_fingerprint = fingerprint, True

    @property
    def is_new(self) -> bool:
        """Whether the adapter is made here, and not loaded (`bool`)."""
        return not self._is_loaded and not self.inference_mode

    def renew(self) -> None:
        """Make the config that of a new adapter: without files, fingerprint and ranks of the one that it was made from."""
        self._is_loaded = self.inference_mode = False
        self.base_fingerprint, self.rank_pattern = None, {}
        self.set_companions({})

    def excludes(self, module: str) -> bool:
        """Whether `exclude_modules` or `modules_to_save` takes something of a module out.

        Args:
            module (`str`):
                The module's full name.

        Returns:
            `bool`: Whether it does.
        """
        return module in self._excluded

    def set_companions(self, files: dict[str, str | EditSet]) -> None:
        """Set the files that are saved and published beside the weights: card, ledger and results.

        Args:
            files (`dict[str, str | EditSet]`):
                Content by file name, each one of `COMPANION_FILES`. Edits are written as JSON Lines.
        """
        self._companions = dict(files)

    def companions(self) -> dict[str, str | EditSet]:
        """Return the files that belong beside the weights; those of an adapter from the Hub are downloaded.

        Returns:
            `dict[str, str | EditSet]`: Content by file name, empty for an adapter that has none.
        """
        if self._companions is None:
            self._companions = self._fetch_companions()
        return self._companions

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        super().save_pretrained(str(save_directory), **kwargs)
        for name, content in self.companions().items():
            write_atomically(Path(save_directory) / name, content)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if kwargs.get("strict") is not None:
            config.strict = kwargs["strict"]  # PEFT lets the file win over the caller
        config._is_loaded = True
        source = Path(pretrained_model_name_or_path, subfolder or "")
        if source.is_dir():
            if (source / WEIGHTS_NAME).exists() and not (source / SAFETENSORS_WEIGHTS_NAME).exists():
                _refuse_pickle(str(source))
            # At once, because the folder may be gone by the time the adapter is saved.
            files = [source / name for name in COMPANION_FILES]
            config.set_companions({path.name: _text(path) for path in files if path.is_file()})
        else:
            # The companions are fetched only when they are needed, on saving: most loads never save.
            # The token is not kept: the config is pickled and copied with the model.
            hub_kwargs = {name: value for name, value in cls._split_kwargs(kwargs)[0].items() if name != "token"}
            config._origin = (str(pretrained_model_name_or_path), subfolder, hub_kwargs)
            if _has_only_pickle(str(pretrained_model_name_or_path), subfolder, cls._split_kwargs(kwargs)[0]):
                _refuse_pickle(str(pretrained_model_name_or_path))
        return config

    def _fetch_companions(self) -> dict[str, str]:
        if self._origin is None:
            return {}
        source, subfolder, kwargs = self._origin
        files = {}
        for name in COMPANION_FILES:
            try:
                path = hf_hub_download(source, name, subfolder=subfolder, **kwargs)
                files[name] = _text(Path(path))
            except LocalEntryNotFoundError:
                raise  # the Hub cannot be reached: to go on would lose the ledger in silence
            except EntryNotFoundError:
                continue  # a repository that was made by other means has no ledger
        return files


def _text(path: Path) -> str:
    # A card that is no UTF-8 must not keep an adapter from loading.
    return path.read_text(encoding="utf-8", errors="replace")


def _has_only_pickle(repo: str, subfolder: str | None, kwargs: dict[str, Any]) -> bool:
    pickled, safe = (f"{subfolder}/{name}" if subfolder else name for name in (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME))
    try:
        if not kwargs.get("local_files_only"):
            asked = {name: kwargs.get(name) for name in ("repo_type", "revision", "token")}
            return file_exists(repo, pickled, **asked) and not file_exists(repo, safe, **asked)
    except Exception:  # whatever kept the Hub from answering: PEFT then takes what it has in the cache
        pass
    cached = {name: kwargs.get(name) for name in ("repo_type", "revision", "cache_dir")}
    is_cached = [isinstance(try_to_load_from_cache(repo, name, **cached), str) for name in (pickled, safe)]
    return is_cached == [True, False]


def _refuse_pickle(source: str) -> None:
    raise ValueError(
        f"{source} has its weights in {WEIGHTS_NAME}, which is a pickle and can hold code, expected "
        f"{SAFETENSORS_WEIGHTS_NAME}: ask its author for that file, or convert it with safetensors where you trust it"
    )
