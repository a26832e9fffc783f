"""`locft trace`: which tokens and layers carry the facts of a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from ..edits import load_edits
from ..location import TracingResults, layers_from_tracing, plot_tracing, trace_edits
from ..location.tracing_results import TRACING_NAME
from .checks import check_model, check_output


PICTURE_NAME = "tracing.png"


@dataclass
class TraceArguments:
    """Which model, which facts, and where to."""

    model: str = field(metadata={"help": "The model: its name on the Hub, or its folder."})
    edits: str = field(
        metadata={"help": "The facts: a file of edits or a dataset on the Hub, with a subject for each prompt."}
    )
    output: str = field(metadata={"help": f"The folder to write {TRACING_NAME} and {PICTURE_NAME} to."})
    answers: str = field(
        default="model",
        metadata={
            "help": "Which answers to trace: 'model', what the model itself says next; or 'target', the targets, which "
            "are true facts then, and of which those are left out that the model does not say."
        },
    )
    window: int = field(default=10, metadata={"help": "How many layers of MLPs or attentions to restore together."})
    copies: int = field(default=10, metadata={"help": "How many corrupted runs a fact has."})
    noise: float | None = field(
        default=None,
        metadata={"help": "The noise's standard deviation. Default: three times that of the subjects' embeddings."},
    )
    batch_size: int = field(default=250, metadata={"help": "How many rows to compute at once."})
    seed: int = field(default=0, metadata={"help": "What the noise depends on."})


def main(arguments: list[str]) -> None:
    """Run `locft trace`.

    Args:
        arguments (`list[str]`):
            The options.
    """
    (options,) = TrlParser(TraceArguments, prog="locft trace").parse_args_and_config(arguments)
    check_model(options.model)
    check_output(options.output)
    edits = load_edits(options.edits, on_conflict="first")  # two answers to one prompt are one fact to trace
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    results = trace_edits(
        model,
        tokenizer,
        edits,
        answers=options.answers,
        noise=options.noise,
        copies=options.copies,
        window=options.window,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    results.save(options.output)
    written = [TRACING_NAME]
    try:
        plot_tracing(results, Path(options.output) / PICTURE_NAME)
        written.append(PICTURE_NAME)
    except ImportError as error:
        print(f"There is no picture: {error}")
    _print(results, f"{' and '.join(written)} {'are' if len(written) > 1 else 'is'} in {options.output}.")


def _print(results: TracingResults, written: str) -> None:
    console = Console()
    table = Table(title="Where restoring has the highest average indirect effect", title_justify="left")
    for name in ("restored", "token", "layer", "effect"):
        table.add_column(name, justify="right" if name in ("layer", "effect") else "left")
    for kind, peak in results.peaks.items():
        table.add_row(kind, peak.role, str(peak.layer), f"{peak.effect:.3f}")
    console.print(table)
    lines = [
        f"Traced {results.num_facts} of {len(results.rows)} facts; their answers' probability is "
        f"{results.clean_probability:.2f}, and {results.corrupted_probability:.2f} corrupted."
    ]
    lines += [f"Left out: {count} with the reason '{reason}'." for reason, count in results.left_out.items()]
    if "mlp" in results.effects and results.tokens["last subject token"]:
        layers = " ".join(map(str, layers_from_tracing(results)))
        lines.append(f"Layers proposed by the MLPs at the last subject token: {layers}.")
    lines.append("Tracing shows where facts pass by, and is no proof of where to edit.")
    for line in [*lines, written]:
        console.print(line, markup=False, highlight=False)
