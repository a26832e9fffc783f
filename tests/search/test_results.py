"""The ranking, the Pareto front, the table, the files and the picture."""

import pytest

from peft_locft import LocFTConfig
from peft_locft.search import SearchResults, load_search, plot_search


@pytest.fixture
def results(trial):
    """Two rungs: the places of layer 0 stopped early, though their scores look better."""
    rows = [
        trial(layer, group, 1, reliability=0.5, generalization=0.9 - layer / 10, capability=1.0)
        for layer in range(3)
        for group in ("up", "down")
    ]
    rows += [
        trial(1, "up", 2, reliability=1.0, generalization=0.6, capability=0.5),
        trial(1, "down", 2, reliability=1.0, generalization=0.4, capability=0.9),
        trial(2, "up", 2, reliability=1.0, generalization=0.4, capability=0.8),  # beaten by the one before
        trial(2, "down", 2, reliability=1.0, generalization=0.7, capability=0.3),
    ]
    return SearchResults(rows, {"perplexity": 12.0}, {"model": "tiny"})


def places(rows):
    return [(row.layer, row.group) for row in rows]


def test_a_later_rung_comes_first(results):
    expected = [(1, "down"), (2, "up"), (1, "up"), (2, "down"), (0, "up"), (0, "down")]
    assert places(results.ranked()) == expected
    assert places(results.finalists) == expected[:4]
    assert results.best == LocFTConfig(layers=[1], target_modules=["mlp.down_proj"], task_type="CAUSAL_LM")


def test_the_pareto_front_is_of_the_last_rung(results):
    assert results.pareto_axes() == ("generalization", "capability")
    assert places(results.pareto_front()) == [(2, "down"), (1, "up"), (1, "down")]


def test_equal_places_are_both_on_the_front(trial):
    rows = [trial(layer, generalization=0.5, capability=0.5) for layer in range(2)]
    assert places(SearchResults(rows).pareto_front()) == [(0, "down"), (1, "down")]


@pytest.mark.parametrize(
    ("scores", "axes"),
    [
        ({"reliability": 1.0, "generalization": 0.5, "locality": 0.1}, ("generalization", "locality")),
        ({"reliability": 1.0, "capability": 0.5}, ("reliability", "capability")),
        ({"reliability": 1.0}, ("reliability", "reliability")),
    ],
)
def test_what_was_not_measured_is_stood_in_for(scores, axes, trial):
    results = SearchResults([trial(**scores)])
    assert results.pareto_axes() == axes and len(results.pareto_front()) == 1


def test_what_only_a_later_rung_measured_counts(trial):
    rows = [trial(layer, reliability=1.0) for layer in range(2)]
    rows += [trial(layer, rung=2, reliability=1.0 - layer / 10, generalization=0.2 + layer / 2) for layer in range(2)]
    results = SearchResults([*rows, trial(2, reliability=0.1)])
    assert results.pareto_axes() == ("generalization", "reliability")
    assert places(results.pareto_front()) == [(1, "down"), (0, "down")]
    assert results.score_names() == ["reliability", "generalization"]
    assert results.table().splitlines()[-1].startswith("| 2 | down | 1 | 8 | 5 | 0.001 | 0.100 |  | 0.100 |")


def test_the_table(results):
    lines = results.table().splitlines()
    assert lines[0] == (
        "| layer | group | rung | edits | epochs | rate | reliability | generalization | capability | mean | front | seconds |"
    )
    assert lines[2] == "| 1 | down | 2 | 8 | 5 | 0.001 | 1.000 | 0.400 | 0.900 | 0.767 | ★ | 1.0 |"
    assert len(lines) == 2 + 6 and len(results.table(3).splitlines()) == 2 + 3
    assert lines[3].startswith("| 2 | up |") and "★" not in lines[3]


def test_saved_and_loaded_it_is_the_same(results, tmp_path):
    results.save(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["search.json", "search.md"]
    assert load_search(tmp_path / "new") == results
    assert (tmp_path / "new" / "search.md").read_text(encoding="utf-8") == results.table()


def test_a_folder_without_a_search(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        load_search(tmp_path)
    assert str(raised.value) == f"{tmp_path} has no search.json: it holds no results of a search"


def test_the_map(results, trial, tmp_path):
    pytest.importorskip("matplotlib")
    plot_search(results, tmp_path / "map.svg")
    text = (tmp_path / "map.svg").read_text()
    assert text.count("<image") >= 3  # one a score
    plot_search(SearchResults([*results.rows[:1], trial(1, rung=2, locality=0.5)]), tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000
