"""An adapter as a repository: card, ledger and results beside the weights."""

from .card import edit_card
from .export import ExportReport, save_as_lora, save_compressed
from .repository import load_adapter, repository_files


__all__ = ["ExportReport", "edit_card", "load_adapter", "repository_files", "save_as_lora", "save_compressed"]
