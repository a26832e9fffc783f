"""Where a model keeps a fact: causal tracing."""

from .tracing import Trace, trace, trace_edits
from .tracing_plot import plot_tracing
from .tracing_results import TracingResults, layers_from_tracing, load_tracing


__all__ = [
    "Trace",
    "TracingResults",
    "layers_from_tracing",
    "load_tracing",
    "plot_tracing",
    "trace",
    "trace_edits",
]
