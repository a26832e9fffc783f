"""`search_locations`: train every place a little, the best of them more, and tell where to edit."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..edits import EditSet, load_edits
from ..edits.tokens import load_tokenizer
from ..trainer import EditConfig
from ..trainer.augmentation import without_edits
from ..trainer.samples import fill_samples, read_texts
from ..trainer.setup import check_decoder, load_model
from ..trainer.state_store import weights_hash
from ..tuner.fingerprint import tokenizer_fingerprint
from ..tuner.temporary import evaluating, trained_as_before
from .journal import JOURNAL_NAME, Journal
from .places import GROUPS, find_places
from .results import SearchResults
from .rungs import plan_rungs
from .scoring import Scorer, check_metrics
from .sweep import Sweep
from .text_states import TextStates


# Arguments of a run that change nothing of what it finds, in full or, with an underscore at the end, by their beginning.
_WITHOUT_EFFECT = re.compile(
    "(output_dir|report_to|run_name|project|disable_tqdm|prefix_cache|prefix_cache_memory|"
    "(logging|log|trackio|hub|push|save|load_best|eval|do|per_device_eval|dataloader|resume|skip_memory|include)_.*)"
)
_WORK_NAME = ".search_work"


def search_locations(
    model: str | PreTrainedModel,
    edits: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layers: Sequence[int] | None = None,
    groups: Sequence[str] = GROUPS,
    sample: int = 100,
    texts: Sequence[str] | None = None,
    metrics: Mapping[str, Callable[[PreTrainedModel], float]] | None = None,
    rungs: int = 3,
    args: EditConfig | None = None,
    output_dir: str | os.PathLike | None = None,
) -> SearchResults:
    """
    Search the place to edit: every layer times five groups of modules, as in section 4.2 of LocFT-BF ([arXiv
    2509.22072](https://arxiv.org/abs/2509.22072)), by successive halving ([arXiv
    1502.07943](https://arxiv.org/abs/1502.07943)).

    All places are trained for a few epochs on a part of the sample; the best quarter of them again, from the start, on
    twice the edits for twice the epochs, and so on; the last rung trains on the whole sample for all epochs of `args`. A
    place is ranked by the mean of its scores: reliability, generalization, locality, portability and capability, as far as
    the edits have such questions and texts or metrics are given. A trial is the same as a run of [`EditTrainer`] with its
    place, edits, epochs and rate. The model is loaded once, the unedited model is asked once, in each rung one forward
    pass gives the states that enter every layer, and texts are read from the edited layer on.

    Without a `learning_rate` in `args`, a place is trained at the automatic rate of the [`EditTrainer`] for it.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model: its name on the Hub, its folder, or a loaded model. Its weights are the same afterwards.
        edits ([`EditSet`], `str` or whatever else [`load_edits`] makes edits of):
            The edits.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. Defaults to the model's own.
        layers (`Sequence[int]`, *optional*):
            The layers; negative ones count from the last. Defaults to all.
        groups (`Sequence[str]`, *optional*):
            Some of `"layer"` (all modules of the layer), `"attention"`, `"mlp"`, `"up"` and `"down"` (the MLP's up and down
            projection). Defaults to all five.
        sample (`int`, *optional*, defaults to `100`):
            How many of the edits to search with, drawn with the seed of `args`.
        texts (`Sequence[str]`, *optional*):
            Plain texts, whose perplexity is measured for capability.
        metrics (`Mapping[str, Callable[[PreTrainedModel], float]]`, *optional*):
            Further measures of capability by name: functions that take the edited model and return a number, of which more
            is better.
        rungs (`int`, *optional*, defaults to `3`):
            How many rungs there are at most. With 1, every place is trained to its end.
        args ([`EditConfig`], *optional*):
            How to train. Its `num_train_epochs` are those of the last rung. Defaults to the published procedure.
        output_dir (`str` or `os.PathLike`, *optional*):
            Where to append each trial to `search.jsonl`, from which a search that was stopped goes on.

    Returns:
        [`SearchResults`]: Every trial, the ranking, and the config to use.

    Raises:
        `ValueError`: If a layer or group does not exist, the arguments do not go with a search, or `output_dir` holds
            another search.

    Examples:

    ```python
    >>> results = search_locations("HuggingFaceTB/SmolLM2-135M-Instruct", "edits.jsonl", output_dir="places")
    >>> trainer = EditTrainer(model, train_dataset="edits.jsonl", peft_config=results.best)
    ```
    """
    args = copy.copy(args) if args is not None else EditConfig()
    _check(model, args, sample, rungs, output_dir)
    check_metrics(metrics)
    edits = load_edits(edits)
    if isinstance(model, str):
        model, tokenizer = load_model(model, args, tokenizer)
    check_decoder(model)
    tokenizer = tokenizer or load_tokenizer(model)
    places = find_places(model, layers, groups)
    edits = EditSet([edits[i] for i in random.Random(args.seed).sample(range(len(edits)), min(sample, len(edits)))])
    for name in ("preservation_prompts", "preservation_texts"):
        # Read here, so that a search is told from one with another text in the same file.
        if isinstance(given := getattr(args, name), str):
            setattr(args, name, read_texts(given, name))
    if args.preservation_prompts is not None:
        # What is held to is asked once for all rungs, the later of which have more edits.
        args.preservation_prompts = without_edits(args.preservation_prompts, edits) or None
    plan = plan_rungs(len(places), len(edits), math.ceil(args.num_train_epochs), rungs)
    settings = {
        "edits": _hash(edits.to_jsonl()),
        "places": [[place.layer, place.module] for place in places],
        "rungs": [list(rung) for rung in plan],
        "texts": _hash("\0".join(texts)) if texts is not None else None,
        "metrics": sorted(metrics or {}),
        **{name: _brief(value) for name, value in args.to_dict().items() if not _WITHOUT_EFFECT.fullmatch(name)},
    }
    with ExitStack() as stack:
        journal = None
        if output_dir is not None:
            weights = weights_hash([*model.named_parameters(), *model.named_buffers()])
            identity = {"model": weights, "tokenizer": tokenizer_fingerprint(tokenizer), **settings}
            journal = Journal(Path(output_dir) / JOURNAL_NAME, identity)
        # For states that are too many for the memory. A search that was killed may have left it.
        work = Path(output_dir) / _WORK_NAME if output_dir is not None else Path(tempfile.mkdtemp())
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        stack.enter_context(trained_as_before(model))
        stack.enter_context(evaluating(model))
        if not hasattr(model, "hf_device_map"):
            model.to(args.device)
        args.output_dir = str(work)
        fill_samples(args, edits, model, tokenizer)
        states = None
        if args.prefix_cache:
            states = TextStates({place.layer for place in places}, args.prefix_cache_memory * 2**30)
        scorer = Scorer(model, tokenizer, edits, texts, metrics, args.per_device_eval_batch_size, states)
        rows = Sweep(model, tokenizer, edits, args, scorer, journal).run(places, plan)
    name = getattr(model.config, "_name_or_path", "")
    found = {"model": name, "edits": len(edits), "seed": args.seed, "rungs": [rung._asdict() for rung in plan]}
    return SearchResults(rows, scorer.before, found)


def _check(model: Any, args: EditConfig, sample: int, rungs: int, output_dir: str | os.PathLike | None) -> None:
    if isinstance(model, PeftModel):
        raise ValueError("`model` is a PeftModel: give the base model, on which the search puts adapters of its own")
    for name, value in (("sample", sample), ("rungs", rungs)):
        if type(value) is not int or value < 1:
            raise ValueError(f"`{name}` is {value!r}, expected an integer of at least 1")
    if output_dir is not None and Path(output_dir).is_file():
        raise ValueError(f"`output_dir` is {output_dir}, which is a file: give a folder")
    if args.recipe == "locaedit":
        raise ValueError(
            "`recipe` is 'locaedit', which chooses layers by tracing and trains LoRA, so that there is no place to search for: "
            "give 'paper' or 'careful', or its KL term alone, `kl_weight=1`"
        )
    if args.max_steps > 0:
        raise ValueError(
            f"`max_steps` is {args.max_steps}: a search shares epochs out, so give `num_train_epochs` instead"
        )
    if args.offload_prefix:
        raise ValueError(
            "`offload_prefix` is True: a search trains in all layers, so none can stay outside the device. Leave it out"
        )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _brief(value: Any) -> str:
    """An argument as text, of which a long one, such as a thousand questions, is told by its hash."""
    text = str(value)
    return text if len(text) <= 200 else _hash(text)
