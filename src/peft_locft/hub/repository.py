"""What stands in an adapter's repository beside the weights, and loading an edited model from it."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..edits import LEDGER_NAME, EditSet
from ..evaluation import RESULTS_NAME, EditResults
from ..tuner import LocFTConfig, check_tokenizer
from .card import edit_card


def repository_files(
    name: str,
    edits: EditSet,
    peft_config: PeftConfig,
    results: EditResults | None = None,
    tags: list[str] | None = None,
) -> dict[str, str | EditSet]:
    """Return card, ledger and, if there are any, results, as [`write_atomically`] writes them beside an adapter.

    Args:
        name (`str`):
            The adapter's title or repository.
        edits ([`EditSet`]):
            The edits it holds.
        peft_config ([`~peft.PeftConfig`]):
            Its config.
        results ([`EditResults`], *optional*):
            The results of an evaluation.
        tags (`list[str]`, *optional*):
            Further tags for the card.

    Returns:
        `dict[str, str | EditSet]`: Content by file name. The ledger is the edits themselves, because its text would fill
        the memory.
    """
    files = {"README.md": edit_card(name, edits, peft_config, results, tags), LEDGER_NAME: edits}
    if results is not None:
        files[RESULTS_NAME] = results.to_json()
    return files


def load_adapter(
    adapter: str, model: str | None = None, *, strict: bool | None = None, **model_kwargs
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load an edited model: the adapter, the base model it names, and the tokenizer.

    Args:
        adapter (`str`):
            The adapter's folder or its repository on the Hub.
        model (`str`, *optional*):
            The base model, if not the one that the adapter names.
        strict (`bool`, *optional*):
            Whether a base model or tokenizer that the adapter was not trained on is an error. Otherwise it is a
            warning, a [`BaseMismatchWarning`]. Defaults to what the adapter's config says.
        model_kwargs (`dict`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`].

    Returns:
        `tuple[PeftModel, PreTrainedTokenizerBase]`: The edited model, in evaluation mode, and the tokenizer.

    Raises:
        `ValueError`: If there is no adapter, or it names no base model, or one in a folder that does not exist here;
            if `strict` and the base model is not the adapter's own.
    """
    config = PeftConfig.from_pretrained(adapter)
    base = model or config.base_model_name_or_path
    if not base:
        raise ValueError(f"the adapter {adapter} does not name its base model: give it as `model`")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"the adapter {adapter} was made on the base model in the folder {base}, which does not exist here: give "
            "the base model as `model`"
        )
    base_model = AutoModelForCausalLM.from_pretrained(base, **model_kwargs)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if isinstance(config, LocFTConfig):
        config = LocFTConfig.from_pretrained(adapter)  # with what stands beside the weights
        if strict is not None:
            config.strict = strict
        check_tokenizer(config, tokenizer)
    return PeftModel.from_pretrained(base_model, adapter, config=config).eval(), tokenizer
