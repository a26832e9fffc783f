"""Teach a language model new facts and keep the rest of it as it was.

Importing this package registers the method LOCFT with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained` and
everything else in PEFT knows it.
"""

from .edits import Edit, EditConflictError, EditDataError, EditError, EditSet, Probe, load_edits
from .evaluation import EditResults, evaluate_edits, load_results, plot_results
from .hub import ExportReport, load_adapter, save_as_lora, save_compressed
from .location import default_location
from .planning import Plan, plan_edit
from .trainer import EditConfig, EditTrainer
from .tuner import BaseMismatchWarning, LocFTConfig, LocFTModel, MergeCost, merge_report


__version__ = "0.1.0"

__all__ = [
    "BaseMismatchWarning",
    "Edit",
    "EditConfig",
    "EditConflictError",
    "EditDataError",
    "EditError",
    "EditResults",
    "EditSet",
    "EditTrainer",
    "ExportReport",
    "LocFTConfig",
    "LocFTModel",
    "MergeCost",
    "Plan",
    "Probe",
    "default_location",
    "evaluate_edits",
    "load_adapter",
    "load_edits",
    "load_results",
    "merge_report",
    "plan_edit",
    "plot_results",
    "save_as_lora",
    "save_compressed",
]
