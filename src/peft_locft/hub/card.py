"""The model card of an edit adapter."""

from __future__ import annotations

import json
import os

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig

from ..edits import EditSet
from ..evaluation import METRICS, EditResults
from ..tuner import LocFTConfig


_TAGS = ["peft-locft", "model-editing", "knowledge-editing"]
_SHOWN_EDITS = 10
_MEANING = {
    "reliability": "prompts answered with their targets",
    "generalization": "rephrased prompts answered with the targets",
    "locality": "questions beside the edits answered as before",
    "portability": "questions that follow from the edits answered right",
}
_CITATION = """\
```bibtex
@article{locftbf2025,
    title  = {Fine-tuning Done Right in Model Editing},
    year   = {2025},
    eprint = {2509.22072},
    archivePrefix = {arXiv},
    url    = {https://arxiv.org/abs/2509.22072}
}
```"""


def edit_card(
    name: str,
    edits: EditSet,
    peft_config: PeftConfig,
    results: EditResults | None = None,
    tags: list[str] | None = None,
) -> str:
    """Write the card of an adapter: what it changes, how well, how to load it, how it was made.

    Args:
        name (`str`):
            The adapter's title, or the name of its repository, which then stands in the loading code.
        edits ([`EditSet`]):
            The edits.
        peft_config ([`~peft.PeftConfig`]):
            The adapter's config.
        results ([`EditResults`], *optional*):
            The results of an evaluation.
        tags (`list[str]`, *optional*):
            Further tags.

    Returns:
        `str`: The text of `README.md`.
    """
    base = peft_config.base_model_name_or_path
    # A folder on the author's machine is no name that anyone else, or the Hub's own checks, could resolve.
    published = base if base and not os.path.isdir(base) and _is_repo_id(base) else None
    method = getattr(peft_config.peft_type, "value", peft_config.peft_type)
    data = ModelCardData(
        base_model=published,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=sorted(
            {*_TAGS, method.lower(), *(tags or []), *([f"base_model:adapter:{published}"] if published else [])}
        ),
    )
    shown = published or (os.path.basename(os.path.normpath(base)) if base else "its base model")
    needs_import = isinstance(peft_config, LocFTConfig)
    sections = [
        f"# {name.split('/')[-1]}",
        f"This {method} adapter teaches {_linked(shown, published)} new answers to {len(edits)} prompts. How far it "
        "gives them, and how much of the rest stayed as it was, is told below. It was made with `peft-locft` by "
        "breadth-first fine-tuning ([arXiv 2509.22072](https://arxiv.org/abs/2509.22072)).",
        "## How well the edits hold",
        _scores(results),
        "## What it changes",
        _examples(edits, results),
        "## How to load it",
        _loading_code(name, published or "path/to/the/base/model", needs_import),
        "## How it was made",
        _settings(peft_config, results),
        "## Files",
        "- `adapter_model.safetensors`, `adapter_config.json`: the adapter\n"
        "- `edits.jsonl`: the ledger, every edit that the adapter holds"
        + ("\n- `edit_results.json`: the scores before and after, and the settings of the run" if results else ""),
        "## Citation",
        _CITATION,
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _linked(shown: str, published: str | None) -> str:
    return f"[{shown}](https://huggingface.co/{published})" if published else f"`{shown}`"


def _scores(results: EditResults | None) -> str:
    if results is None:
        return "It was not evaluated."
    rows = [
        f"| {metric} | {_MEANING[metric]} | {results.before[metric]:.3f} | **{results.after[metric]:.3f}** |"
        for metric in METRICS
        if results.after[metric] is not None
    ]
    return (
        "| score | share of | before | after |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n\nScored by free, "
        "greedy generation: an answer is right when the text up to the end token is the expected one and nothing else."
        + _scores_by_context(results)
    )


def _scores_by_context(results: EditResults) -> str:
    contexts = results.by_context()
    if len(contexts) < 2:
        return ""
    shown = [metric for metric in METRICS if results.after[metric] is not None]
    rows = [
        f"| {context} | " + " | ".join(f"{scores['after'][metric]:.3f}" for metric in shown) + " |"
        for context, scores in contexts.items()
    ]
    return (
        "\n\nEvery question was asked in several contexts, of which these are the scores after:\n\n"
        f"| context | {' | '.join(shown)} |\n| --- |{' --- |' * len(shown)}\n" + "\n".join(rows)
    )


def _examples(edits: EditSet, results: EditResults | None) -> str:
    shown = edits[:_SHOWN_EDITS]
    before: dict[str, str] = {}
    for row in results.rows if results else []:
        if len(before) == len(shown):
            break
        if row["metric"] == "reliability" and any(row["edit_id"] == edit.id for edit in shown):
            before.setdefault(row["edit_id"], row["before"])
    rows = [f"| {_cell(edit.prompt)} | {_cell(before.get(edit.id, ''))} | {_cell(edit.target)} |" for edit in shown]
    rest = len(edits) - len(rows)
    return (
        "| prompt | before | new answer |\n| --- | --- | --- |\n"
        + "\n".join(rows)
        + (f"\n\n{rest} more are in [edits.jsonl](edits.jsonl)." if rest else "")
    )


def _loading_code(adapter: str, base: str, needs_import: bool) -> str:
    install = "```\npip install peft-locft\n```\n\n" if needs_import else ""
    first = "import peft_locft  # registers the method with PEFT: without it, loading fails with KeyError: 'LOCFT'\n"
    return (
        install
        + "```python\n"
        + (first if needs_import else "")
        + "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        + f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        + f'tokenizer = AutoTokenizer.from_pretrained("{base}")\n'
        + f"model = PeftModel.from_pretrained(base, {json.dumps(adapter, ensure_ascii=False)})\n```"
    )


def _settings(peft_config: PeftConfig, results: EditResults | None) -> str:
    targets = peft_config.target_modules
    settings = {
        "layers": getattr(peft_config, "layers_to_transform", None),
        "modules": ", ".join(sorted(targets)) if isinstance(targets, (set, list)) else targets,
        **(results.settings if results else {}),
    }
    skipped = {"model", "peft_type", "layers", "target_modules"}
    rows = [
        f"| {name.replace('_', ' ')} | {_cell(str(value))} |"
        for name, value in settings.items()
        if value is not None and (name not in skipped or name == "layers")
    ]
    return "| setting | value |\n| --- | --- |\n" + "\n".join(rows)


def _cell(text: str) -> str:
    """Keep a text inside its table cell: no line breaks, no pipes, no markup of its own."""
    text = " ".join(text.split())
    for character in "\\|`*_~<[&":
        text = text.replace(character, f"\\{character}")
    return text
