"""The table of capabilities in the documentation says what the installed versions really do, cell by cell."""

from pathlib import Path

import pytest
from capability_probes import METHODS, PROBES, can


PAGE = Path(__file__).parents[1] / "docs" / "guide" / "capabilities.md"
SAID = {"yes": True, "no": False}


def table() -> dict[str, dict[str, bool]]:
    rows = [line.strip("| ").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in row] for row in rows]
    head = next(row for row in rows if row[1:] == list(METHODS))
    return {row[0]: dict(zip(head[1:], map(SAID.__getitem__, row[1:]))) for row in rows if row[0] in PROBES}


def test_the_table_has_a_row_for_each_probe():
    assert list(table()) == list(PROBES)


@pytest.fixture(autouse=True)
def _needs_bitsandbytes(request):
    if "4-bit" in request.node.name:
        pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("capability", PROBES)
@pytest.mark.parametrize("method", METHODS)
def test_the_table_tells_what_is_so(method, capability):
    assert can(method, capability) is table()[capability][method]


@pytest.mark.parametrize("capability", PROBES)
def test_locft_can_do_all_of_it(capability):
    # Asked without the net that turns errors into a no, so that a failure shows itself.
    assert PROBES[capability]("LocFT")
