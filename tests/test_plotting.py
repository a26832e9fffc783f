"""Pictures without matplotlib."""

import sys

import pytest

from peft_locft.plotting import new_figure


def test_the_message_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # what an import of a missing package meets
    with pytest.raises(ImportError) as raised:
        new_figure()
    assert str(raised.value) == "pictures need matplotlib: run `pip install peft-locft[plots]`"
