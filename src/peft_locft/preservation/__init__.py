"""Terms that leave the rest of the model alone: what it says, and the directions in which ordinary text lives."""

from .anchors import Anchor, divergence, load_anchors, make_anchors, save_anchors
from .deltas import Delta, trained_deltas
from .focus import Focus, focused
from .limits import LimitCallback, check_norms, squared_norm
from .projector import Projection, is_projected
from .samples import sample_questions, sample_statements, sample_texts
from .statistics import InputStatistics, OutputStatistics, input_statistics, output_statistics


__all__ = [
    "Anchor",
    "Delta",
    "Focus",
    "InputStatistics",
    "LimitCallback",
    "OutputStatistics",
    "Projection",
    "check_norms",
    "divergence",
    "focused",
    "input_statistics",
    "is_projected",
    "load_anchors",
    "make_anchors",
    "output_statistics",
    "sample_questions",
    "sample_statements",
    "sample_texts",
    "save_anchors",
    "squared_norm",
    "trained_deltas",
]
