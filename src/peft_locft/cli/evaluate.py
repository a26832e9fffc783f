"""`locft evaluate`: score an adapter's edits, before and after."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import hf_hub_download
from trl import TrlParser

from ..edits import LEDGER_NAME, EditSet, load_edits
from ..edits.contexts import CONTEXTS, check_contexts
from ..evaluation import RESULTS_NAME, evaluate_edits
from ..hub import load_adapter
from .checks import check_output
from .tables import print_results


@dataclass
class EvaluateArguments:
    """Which adapter to score, and on which edits."""

    adapter: str = field(metadata={"help": "The adapter: its folder, or its repository on the Hub."})
    model: str | None = field(
        default=None, metadata={"help": "The base model, if not the one that the adapter names."}
    )
    edits: str | None = field(default=None, metadata={"help": "Other edits to score than the adapter's own ledger."})
    output: str | None = field(
        default=None,
        metadata={
            "help": "The folder to write the results to. Default: the adapter's, if it is scored on its ledger."
        },
    )
    contexts: list[str] = field(
        default_factory=lambda: list(CONTEXTS[:1]),
        metadata={"help": "The contexts to ask the questions in: bare, question, chat, prefix."},
    )
    batch_size: int = field(default=32, metadata={"help": "How many questions to ask at once."})


def main(arguments: list[str]) -> None:
    """Run `locft evaluate`.

    Args:
        arguments (`list[str]`):
            The options.
    """
    (options,) = TrlParser(EvaluateArguments, prog="locft evaluate").parse_args_and_config(arguments)
    check_contexts(options.contexts)  # before the model is loaded
    if options.output is not None:
        check_output(options.output)
    if options.batch_size < 1:
        raise ValueError(f"`--batch_size` is {options.batch_size}, expected at least 1")
    edits = load_edits(options.edits) if options.edits else ledger_of(options.adapter)
    model, tokenizer = load_adapter(options.adapter, options.model)
    results = evaluate_edits(model, tokenizer, edits, contexts=options.contexts, batch_size=options.batch_size)
    print_results(results)
    output = options.output
    if output is None and options.edits is None and Path(options.adapter).is_dir():
        output = options.adapter
    if output is None:
        return
    if (Path(output) / RESULTS_NAME).is_file():
        # The run's own settings and losses stay: only the answers are new. The summary alone is read, because an
        # adapter that PEFT itself saved has no table of answers.
        earlier = json.loads((Path(output) / RESULTS_NAME).read_text(encoding="utf-8"))
        asked = list(earlier.get("contexts") or CONTEXTS[:1])
        if options.output is None and set(asked) != set(options.contexts):
            print(
                f"The adapter's own results, in the contexts {', '.join(asked)}, stay as they are, and so does its card: give "
                "`--output` to write these."
            )
            return
        results.settings, results.epoch_losses = earlier["settings"], earlier["epoch_losses"]
        results.times = {**earlier["times"], **results.times}
    results.save(output)
    print(f"The results are in {Path(output) / RESULTS_NAME}.")


def ledger_of(adapter: str) -> EditSet:
    """Return the edits that an adapter holds, from its ledger.

    Args:
        adapter (`str`):
            The adapter's folder or its repository on the Hub.

    Returns:
        [`EditSet`]: The edits.

    Raises:
        `ValueError`: If there is no such folder or repository, or no ledger in it.
    """
    if Path(adapter).is_dir():
        return load_edits(adapter)
    try:
        ledger = hf_hub_download(adapter, LEDGER_NAME)
    except (OSError, ValueError) as error:  # of which the Hub's many errors are
        raise ValueError(
            f"{adapter} is no folder here, and no ledger {LEDGER_NAME} was found under this name on the Hub ({error})"
        ) from error
    return load_edits(ledger)
