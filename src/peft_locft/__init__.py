"""Teach a language model new facts and keep the rest of it as it was.

Importing this package registers the method LOCFT with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained` and
everything else in PEFT knows it.
"""

from .edits import Edit, EditConflictError, EditDataError, EditError, EditSet, Probe, load_edits
from .evaluation import (
    Choice,
    EditResults,
    evaluate_edits,
    load_choices,
    load_results,
    multiple_choice_accuracy,
    perplexity,
    plot_results,
)
from .hub import ExportReport, load_adapter, save_as_lora, save_compressed
from .location import (
    Trace,
    TracingResults,
    layers_from_tracing,
    load_tracing,
    plot_tracing,
    trace,
    trace_edits,
)
from .planning import Plan, plan_edit
from .preservation import (
    InputStatistics,
    OutputStatistics,
    input_statistics,
    output_statistics,
    sample_questions,
    sample_statements,
    sample_texts,
)
from .search import SearchResults, load_search, plot_search, search_locations
from .trainer import EditConfig, EditTrainer
from .tuner import BaseMismatchWarning, LocFTConfig, LocFTModel, MergeCost, merge_report


__version__ = "0.1.0"

__all__ = [
    "BaseMismatchWarning",
    "Choice",
    "Edit",
    "EditConfig",
    "EditConflictError",
    "EditDataError",
    "EditError",
    "EditResults",
    "EditSet",
    "EditTrainer",
    "ExportReport",
    "InputStatistics",
    "LocFTConfig",
    "LocFTModel",
    "MergeCost",
    "OutputStatistics",
    "Plan",
    "Probe",
    "SearchResults",
    "Trace",
    "TracingResults",
    "evaluate_edits",
    "input_statistics",
    "layers_from_tracing",
    "load_adapter",
    "load_choices",
    "load_edits",
    "load_results",
    "load_search",
    "load_tracing",
    "merge_report",
    "multiple_choice_accuracy",
    "output_statistics",
    "perplexity",
    "plan_edit",
    "plot_results",
    "plot_search",
    "plot_tracing",
    "sample_questions",
    "sample_statements",
    "sample_texts",
    "save_as_lora",
    "save_compressed",
    "search_locations",
    "trace",
    "trace_edits",
]
