"""The search for the place to edit: every layer times five groups of modules, scored on a sample of the edits."""

from .places import GROUPS, Place, find_places
from .plots import plot_search
from .results import SearchResults, Trial, load_search
from .search import search_locations


__all__ = [
    "GROUPS",
    "Place",
    "SearchResults",
    "Trial",
    "find_places",
    "load_search",
    "plot_search",
    "search_locations",
]
