"""The classic picture of causal tracing: heat maps of average effects, by role and layer."""

from __future__ import annotations

import os

from ..plotting import new_figure
from .facts import ROLES
from .tracing_results import TracingResults


_COLOURS = {"states": "Purples", "mlp": "Greens", "attention": "Reds"}


def plot_tracing(results: TracingResults, path: str | os.PathLike) -> None:
    """Draw one heat map for each kind, side by side, and save the picture. Effects below 0 are as pale as 0.

    Args:
        results ([`TracingResults`]):
            The results.
        path (`str` or `os.PathLike`):
            The file to write; its ending chooses the format.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    window = results.settings["window"]
    titles = {
        "states": "One restored state",
        "mlp": f"Restored MLPs, window of {window}",
        "attention": f"Restored attentions, window of {window}",
    }
    figure = new_figure(figsize=(5.2 * len(results.effects), 3.2))
    axes = figure.subplots(1, len(results.effects), sharey=True, squeeze=False)[0]
    for axis, (kind, values) in zip(axes, results.effects.items()):
        image = axis.imshow(values.numpy(), cmap=_COLOURS[kind], vmin=0, aspect="auto", interpolation="nearest")
        axis.set_facecolor("#eaeef2")  # seen where no token has the role
        axis.set(title=titles[kind], xlabel="layer" if kind == "states" else "centre of the window, a layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis, extend="min" if values.nan_to_num().min() < 0 else "neither")
    axes[0].set_yticks(range(len(ROLES)), [f"{role} ({results.tokens[role]})" for role in ROLES])
    figure.suptitle(
        f"Average indirect effect of {results.num_facts} facts on the probability of the answer: "
        f"{results.clean_probability:.2f} clean, {results.corrupted_probability:.2f} corrupted"
    )
    figure.savefig(path, dpi=150)
