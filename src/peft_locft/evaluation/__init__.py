"""Does an edit hold, in other words too, and is the rest as it was? By free generation, never teacher forcing."""

from .capability import Choice, load_choices, multiple_choice_accuracy, perplexity
from .evaluate import evaluate_edits
from .generation import decode_answer, generate_greedy
from .plots import plot_results
from .questions import METRICS, Answer, Question, ask, questions_of
from .results import RESULTS_NAME, EditResults, load_results


__all__ = [
    "METRICS",
    "RESULTS_NAME",
    "Answer",
    "Choice",
    "EditResults",
    "Question",
    "ask",
    "decode_answer",
    "evaluate_edits",
    "generate_greedy",
    "load_choices",
    "load_results",
    "multiple_choice_accuracy",
    "perplexity",
    "plot_results",
    "questions_of",
]
