"""Successive halving: many places get little training, and only the best of them get more."""

from __future__ import annotations

from typing import NamedTuple


# How many times fewer places each rung has than the one before it, for as many times the training of each of them
# (Jamieson & Talwalkar, arXiv 1502.07943, halve; with a quarter and three rungs, all rungs cost about the same and the
# search a fifth of training every place to its end). The training grows by twice the edits and twice the epochs.
_FACTOR = 4


class Rung(NamedTuple):
    """One round of the search.

    Args:
        places (`int`):
            How many places are trained.
        edits (`int`):
            On how many edits of the sample.
        epochs (`int`):
            For how many epochs at most.
    """

    places: int
    edits: int
    epochs: int

    @property
    def visits(self) -> int:
        """How many times an edit is visited, in the training of all places (`int`)."""
        return self.places * self.edits * self.epochs


def plan_rungs(places: int, edits: int, epochs: int, rungs: int) -> list[Rung]:
    """Share the training out among rounds. The last one trains on all edits of the sample for all epochs.

    Args:
        places (`int`):
            How many places there are.
        edits (`int`):
            How many edits the sample has.
        epochs (`int`):
            The most epochs that a place is trained for.
        rungs (`int`):
            How many rounds there may be. A round that would leave no place out is left out itself.

    Returns:
        `list[Rung]`: At least one, with ever fewer places.
    """
    planned: list[Rung] = []
    for number in range(rungs):
        behind = rungs - 1 - number
        remaining = -(-places // _FACTOR**number)
        share = int(_FACTOR**0.5) ** behind
        # A batch has at least two edits.
        rung = Rung(remaining, min(max(-(-edits // share), 2), edits), -(-epochs // share))
        if planned and planned[-1].places == remaining:
            planned.pop()  # it would choose nothing
        planned.append(rung)
    return planned
