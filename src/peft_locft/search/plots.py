"""The map of a search: layers times groups, one panel a score."""

from __future__ import annotations

import os

from ..plotting import new_figure
from .places import GROUPS
from .results import SearchResults


def plot_search(results: SearchResults, path: str | os.PathLike) -> None:
    """Draw the scores of all places as heat maps, one panel a score, as in figure 5 of LocFT-BF (arXiv 2509.22072), and
    save the picture. A place that stopped before the last rung has a dot, and the best place a frame.

    Args:
        results ([`SearchResults`]):
            The results.
        path (`str` or `os.PathLike`):
            The file to write; its ending chooses the format.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    ranked, names = results.ranked(), results.score_names()
    layers = sorted({row.layer for row in ranked})
    groups = [group for group in GROUPS if any(row.group == group for row in ranked)]
    width = max(0.3 * len(layers) + 2.5, 5.5)
    figure = new_figure(figsize=(width, len(names) * (0.3 * len(groups) + 0.8) + 0.4))
    from matplotlib.patches import Rectangle  # installed, if a figure could be made

    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names):
        values = [[float("nan")] * len(layers) for _ in groups]
        for row in ranked:
            values[groups.index(row.group)][layers.index(row.layer)] = row.scores.get(name, float("nan"))
        # Of perplexity, less is better: bright is good in all panels. A ruined model's is larger by powers of ten.
        colors, scale = ("viridis_r", "log") if name == "perplexity" else ("viridis", "linear")
        image = axes.imshow(values, aspect="auto", cmap=colors, norm=scale, interpolation="nearest")
        stopped = [row for row in ranked if row.rung < ranked[0].rung]
        axes.scatter(
            [layers.index(row.layer) for row in stopped],
            [groups.index(row.group) for row in stopped],
            s=5,
            color="white",
            edgecolors="black",
            linewidths=0.4,
        )
        best = layers.index(ranked[0].layer) - 0.5, groups.index(ranked[0].group) - 0.5
        axes.add_patch(Rectangle(best, 1, 1, fill=False, edgecolor="#e5484d", linewidth=2, clip_on=False))
        axes.set_title(f"{name} (less is better)" if name == "perplexity" else name, loc="left", fontsize=10)
        axes.set_yticks(range(len(groups)), groups, fontsize=8)
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
        figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05).ax.tick_params(labelsize=7)
    axes.set_xlabel("layer")
    figure.supxlabel("frame: the best place; dot: stopped early, after fewer edits and epochs", fontsize=8)
    figure.savefig(path, dpi=150)
