"""A picture of a run: the loss by epoch, and the scores before and after."""

from __future__ import annotations

import os

from ..plotting import new_figure
from .questions import METRICS
from .results import EditResults


_BEFORE, _AFTER = "#9aa5b1", "#1f6feb"


def plot_results(results: EditResults, path: str | os.PathLike, stop_loss: float | None = None) -> None:
    """Draw the loss by epoch and the scores before and after, and save the picture.

    Args:
        results ([`EditResults`]):
            The results.
        path (`str` or `os.PathLike`):
            The file to write; its ending chooses the format.
        stop_loss (`float`, *optional*):
            The epoch loss at which training stops, drawn as a line.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    figure = new_figure(figsize=(10, 4))
    scores = figure.add_subplot(1, 2, 2) if results.epoch_losses else figure.add_subplot()
    if results.epoch_losses:
        loss = figure.add_subplot(1, 2, 1)
        loss.semilogy(range(1, len(results.epoch_losses) + 1), results.epoch_losses, marker="o", ms=4, color=_AFTER)
        if stop_loss:
            loss.axhline(stop_loss, color=_BEFORE, linestyle="--")
            loss.annotate("stop", (1, stop_loss), color="#57606a", va="bottom")
        loss.set(title="Mean loss of the edits", xlabel="epoch", ylabel="loss (log scale)")
        loss.xaxis.get_major_locator().set_params(integer=True)
        loss.grid(alpha=0.3)
    before, after = results.before, results.after
    shown = [metric for metric in METRICS if after[metric] is not None]
    for offset, values, color, label in ((-0.2, before, _BEFORE, "before"), (0.2, after, _AFTER, "after")):
        bars = scores.bar(
            [i + offset for i in range(len(shown))], [values[m] for m in shown], width=0.38, color=color, label=label
        )
        scores.bar_label(bars, fmt="%.2f", padding=2)
    scores.set_xticks(range(len(shown)), shown)
    scores.set(title="Answers by free generation", ylabel="share of right answers", ylim=(0, 1.12))
    scores.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
    scores.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
