"""Pictures, for which matplotlib has to be installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(**kwargs: Any) -> Figure:
    """Return an empty picture, which no window shows.

    Args:
        **kwargs (`Any`):
            Those of `matplotlib.figure.Figure`.

    Returns:
        `matplotlib.figure.Figure`: The picture.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: run `pip install peft-locft[plots]`") from error
    return Figure(layout="constrained", **kwargs)
