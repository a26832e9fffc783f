"""Results as tables in the terminal."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..evaluation import METRICS, EditResults


def print_results(results: EditResults, most_edits: int = 8) -> None:
    """Print the scores before and after, and some of the answers.

    Args:
        results ([`EditResults`]):
            The results.
        most_edits (`int`, *optional*, defaults to `8`):
            How many edits to show.
    """
    console = Console()
    contexts = results.by_context()
    first = next(iter(contexts), None)
    shown = islice(
        (row for row in results.rows if row["metric"] == "reliability" and row["context"] == first), most_edits
    )
    answers = Table(title="Some of the edits", title_justify="left")
    for name in ("prompt", "before", "after", "expected"):
        answers.add_column(name, overflow="fold")
    for row in shown:
        style = "green" if row["correct_after"] else "red"
        answers.add_row(
            Text(row["prompt"]),
            shown_answer(row["before"], "dim"),
            shown_answer(row["after"], style),
            Text(row["answer"]),  # as a plain string, rich would take its brackets for markup
        )
    console.print(answers)

    scores = Table(title="Scores by free generation", title_justify="left")
    for name in ("score", "before", "after", "questions"):
        scores.add_column(name, justify="left" if name == "score" else "right")
    before, after = results.before, results.after
    counts = Counter(row["metric"] for row in results.rows)
    for metric in METRICS:
        if after[metric] is not None:
            scores.add_row(metric, f"{before[metric]:.2f}", Text(f"{after[metric]:.2f}", "bold"), str(counts[metric]))
    console.print(scores)
    if len(contexts) < 2:
        return
    separate = Table(title="After, by context", title_justify="left")
    separate.add_column("context")
    named = [metric for metric in METRICS if after[metric] is not None]
    for metric in named:
        separate.add_column(metric, justify="right")
    for context, found in contexts.items():
        separate.add_row(context, *(f"{found['after'][metric]:.2f}" for metric in named))
    console.print(separate)


def shown_answer(text: str, style: str = "") -> Text:
    """Return an answer for a table: in one line, and an empty one made visible.

    Args:
        text (`str`):
            The answer.
        style (`str`, *optional*):
            A rich style.

    Returns:
        [`~rich.text.Text`]: The answer.
    """
    return Text(" ".join(text.split()), style) if text else Text("(nothing)", "dim italic")
