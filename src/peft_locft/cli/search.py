"""`locft search`: which layer and which modules to edit."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from trl import TrlParser

from ..edits import load_edits
from ..search import GROUPS, SearchResults, plot_search, search_locations
from ..trainer import EditConfig
from ..trainer.samples import read_texts
from .checks import check_model, check_output


_SHOWN = 10
# Of as small a share of the edits that were learned at the best place, there is something to be told.
_LEARNED = 0.5
# What a run has of its own, or a command should not show.
_OF_THE_SEARCH = ("recipe", "output_dir", "hub_token")


@dataclass
class SearchArguments:
    """Which model and edits, which places, and where to."""

    model: str = field(metadata={"help": "The model to edit: its name on the Hub, or its folder."})
    edits: str = field(metadata={"help": "The edits: a JSON, JSONL, CSV or Parquet file, or a dataset on the Hub."})
    output: str = field(metadata={"help": "The folder to write the results to, and to go on from."})
    layers: list[int] | None = field(
        default=None, metadata={"help": "The layers to try; negative ones count from the last. Default: all."}
    )
    groups: list[str] = field(
        default_factory=lambda: list(GROUPS),
        metadata={"help": "The groups of modules to try: some of layer, attention, mlp, up and down. Default: all."},
    )
    sample: int = field(default=100, metadata={"help": "How many of the edits to search with."})
    texts: str | None = field(
        default=None,
        metadata={"help": "A file of plain texts, one a line or with empty lines between, for the perplexity."},
    )
    num_texts: int = field(
        default=8, metadata={"help": "How many of the texts to measure, spread evenly over the file."}
    )
    rungs: int = field(
        default=3,
        metadata={"help": "How many rounds, each with the best quarter of the last. 1 trains all to the end."},
    )
    on_conflict: str = field(
        default="raise",
        metadata={
            "help": "Of two edits of one prompt with different targets, keep the 'first' or 'last', or 'raise'."
        },
    )


def main(arguments: list[str]) -> None:
    """Run `locft search`.

    Args:
        arguments (`list[str]`):
            The options.
    """
    options, config = TrlParser((SearchArguments, EditConfig), prog="locft search").parse_args_and_config(arguments)
    check_output(options.output, config)
    check_model(options.model)
    results = search_locations(
        options.model,
        load_edits(options.edits, on_conflict=options.on_conflict),
        layers=options.layers,
        groups=options.groups,
        sample=options.sample,
        texts=sampled_texts(options.texts, options.num_texts) if options.texts is not None else None,
        rungs=options.rungs,
        args=config,
        output_dir=options.output,
    )
    folder = Path(options.output)
    results.save(folder)
    results.best.save_pretrained(folder / "config")
    try:
        plot_search(results, folder / "search.png")
    except ImportError as error:
        print(f"There is no picture: {error}")
    _print(results, options, _passed_on(config))


def _passed_on(config: EditConfig) -> list[str]:
    """The options of training that a run at the place needs as well: those that are not as they would be anyhow."""
    default, options = EditConfig(recipe=config.recipe), []
    if config.recipe != "paper":
        options += ["--recipe", config.recipe]
    for name in (one.name for one in fields(EditConfig) if one.init):
        value = getattr(config, name)
        if value == getattr(default, name) or value is None or name in _OF_THE_SEARCH:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        options += [f"--{name}", *map(_shown, values)]
    return options


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(getattr(value, "value", value))  # of an enumeration


def sampled_texts(path: str, count: int) -> list[str]:
    """Read some of the texts of a file, spread evenly over it.

    Args:
        path (`str`):
            The file, as [`read_texts`] reads it.
        count (`int`):
            How many, at most.

    Returns:
        `list[str]`: The texts.

    Raises:
        `ValueError`: If there are none.
    """
    if count < 1:
        raise ValueError(f"`--num_texts` is {count}, expected at least 1")
    texts = read_texts(path, "--texts")
    count = min(count, len(texts))
    return [texts[number * len(texts) // count] for number in range(count)]


def _print(results: SearchResults, options: SearchArguments, passed_on: list[str]) -> None:
    console = Console()
    ranked, front = results.ranked(), results.pareto_front()
    title = f"The best {min(_SHOWN, len(ranked))} of {len(ranked)} places"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)  # without a frame, it fits 80 columns
    names = [name for name in results.score_names() if name != "perplexity"]  # which is in capability
    for name in ("layer", "group", "rung", *names, "mean"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for row in ranked[:_SHOWN]:
        scores = [f"{row.scores[name]:.2f}" if name in row.scores else "" for name in names]
        mean = Text(f"{row.score:.3f}{'*' if row in front else ' '}", "bold" if row is ranked[0] else "")
        table.add_row(str(row.layer), row.group, str(row.rung), *scores, mean)
    console.print(table)
    learned, kept = results.pareto_axes()
    best = ranked[0]
    lines = []
    if (reliability := best.scores.get("reliability", 1.0)) < _LEARNED:
        lines.append(
            f"The best place learned only {reliability:.0%} of the edits, so that this tells little: give more "
            "`--num_train_epochs`, or another `--learning_rate`."
        )
    command = ["locft", "edit", "--model", options.model, "--edits", options.edits, "--output", "OUTPUT"]
    command += ["--on_conflict", options.on_conflict] if options.on_conflict != "raise" else []
    command += ["--layers", str(best.layer), "--target_modules", best.module, *passed_on]
    lines += [
        f"*: of the last rung, no place has a better {learned} without a worse {kept}.",
        f"The searched places took {sum(row.seconds for row in results.rows):.0f} s. The results are in {options.output}.",
        f"Next: {shlex.join(command)}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
