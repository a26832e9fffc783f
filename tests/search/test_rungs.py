"""Successive halving: how the training is shared out, and who stays."""

import pytest

from peft_locft.search.rungs import plan_rungs
from peft_locft.search.sweep import Sweep


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((150, 100, 25, 3), [(150, 25, 7), (38, 50, 13), (10, 100, 25)]),
        ((150, 100, 25, 1), [(150, 100, 25)]),
        ((4, 8, 6, 3), [(4, 2, 2), (1, 8, 6)]),  # the second rung would choose nothing
        ((1, 8, 6, 3), [(1, 8, 6)]),
        ((150, 3, 1, 3), [(150, 2, 1), (38, 2, 1), (10, 3, 1)]),
        ((5, 1, 25, 2), [(5, 1, 13), (2, 1, 25)]),
    ],
)
def test_the_plan(asked, expected):
    assert plan_rungs(*asked) == expected


def test_the_plan_costs_a_fifth_of_training_all_places_to_the_end():
    assert sum(rung.visits for rung in plan_rungs(150, 100, 25, 3)) < 0.21 * 150 * 100 * 25


def test_the_best_quarter_stays(search, trial, monkeypatch):
    worth = {(0, "up"): 0.5, (0, "down"): 0.9, (1, "up"): 0.7, (1, "down"): 0.6, (2, "up"): 0.1, (2, "down"): 0.8}
    tried = []

    def try_(sweep, place, number, rung):
        tried.append((number, place.layer, place.group, rung.edits, rung.epochs))
        score = worth[place.layer, place.group] if number == 1 else 1 - worth[place.layer, place.group]
        return trial(place.layer, place.group, number, reliability=score)

    monkeypatch.setattr(Sweep, "_try", try_)
    results = search(layers=None, groups=["up", "down"], rungs=2)
    assert tried == [
        *[(1, layer, group, 4, 3) for layer in range(3) for group in ("up", "down")],
        *[(2, layer, group, 8, 6) for layer, group in ((0, "down"), (2, "down"))],
    ]
    # In the last rung the other one was better, and what stopped early stands behind both.
    assert [(row.rung, row.layer, row.group) for row in results.ranked()] == [
        (2, 2, "down"),
        (2, 0, "down"),
        (1, 1, "up"),
        (1, 1, "down"),
        (1, 0, "up"),
        (1, 2, "up"),
    ]
