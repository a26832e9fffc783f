"""`locft ask`: the base model's answer and the edited one's, side by side."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text
from trl import TrlParser

from ..evaluation import decode_answer, generate_greedy
from ..hub import load_adapter
from ..tuner.temporary import unedited
from .tables import shown_answer


@dataclass
class AskArguments:
    """Which adapter to ask."""

    adapter: str = field(metadata={"help": "The adapter: its folder, or its repository on the Hub."})
    model: str | None = field(
        default=None, metadata={"help": "The base model, if not the one that the adapter names."}
    )
    max_new_tokens: int = field(default=20, metadata={"help": "The longest answer, in tokens."})


def main(arguments: list[str]) -> None:
    """Run `locft ask`.

    Args:
        arguments (`list[str]`):
            The options, and the prompts.
    """
    parser = TrlParser(AskArguments, prog="locft ask", usage='locft ask --adapter ADAPTER [options] "PROMPT" ...')
    options, prompts = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    unknown = [prompt for prompt in prompts if prompt.startswith("--")]
    if unknown:
        raise ValueError(f"unknown options {unknown}: see `locft ask --help`")
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise ValueError('there is nothing to ask: give one or more prompts, such as "The capital of Kazakhstan is"')
    if options.max_new_tokens < 1:
        raise ValueError(f"`--max_new_tokens` is {options.max_new_tokens}, expected at least 1")
    prompts = [prompt.rstrip() for prompt in prompts]
    model, tokenizer = load_adapter(options.adapter, options.model)

    def answers() -> list[str]:
        tokens = generate_greedy(model, tokenizer, prompts, [options.max_new_tokens] * len(prompts))
        return [decode_answer(tokenizer, ids) for ids in tokens]

    with unedited(model):
        before = answers()
    table = Table()
    for name in ("prompt", "base", "edited"):
        table.add_column(name, overflow="fold")
    for prompt, old, new in zip(prompts, before, answers()):
        table.add_row(Text(prompt), shown_answer(old), shown_answer(new, "bold"))
    Console().print(table)
