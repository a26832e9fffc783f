"""`locft plan`: what an edit will take, before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import TrlParser

from ..edits import load_edits
from ..edits.tokens import encode_answers
from ..planning import Plan, plan_edit
from ..planning.cards import RESERVED
from ..tuner import LocFTConfig


_GIB = 2**30
_TERA = 10**12
_SPEED = 100  # TFLOP/s: a third to a half of what a current card does at best in 16 bits


@dataclass
class PlanArguments:
    """Which model, which edits, and which place."""

    model: str = field(
        metadata={"help": "The model: its name on the Hub, or its folder, of which only config.json is needed."}
    )
    edits: str = field(
        metadata={
            "help": "How many edits, such as 1000; or the edits, whose tokens the model's tokenizer counts then."
        }
    )
    layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "The layers to edit; negative ones count from the last. Default: a late layer, or every layer if "
            "`--target_modules` is given."
        },
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "The modules to edit in these layers. Default: the MLP's down projection."}
    )
    tokens_per_edit: int | None = field(
        default=None,
        metadata={"help": "For a number of edits: how many tokens each has, with target and EOS. Default: 20."},
    )
    target_tokens: int | None = field(
        default=None, metadata={"help": "How many of these are target and EOS, which are learned. Default: 5."}
    )
    batch_size: int | None = field(
        default=None,
        metadata={"help": "How many edits make a batch. Default: 100, or a quarter of fewer than 400."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "The dtype of the model's weights: 'float32', 'bfloat16' or 'float16'. Default: that of its config."
        },
    )
    offload_prefix: bool = field(
        default=False,
        metadata={
            "help": "Whether the layers below the lowest trained one stay on the CPU, and pass by one at a time."
        },
    )
    json: bool = field(default=False, metadata={"help": "Whether to print the plan as JSON, in bytes."})


def main(arguments: list[str]) -> None:
    """Run `locft plan`.

    Args:
        arguments (`list[str]`):
            The options.
    """
    (options,) = TrlParser(PlanArguments, prog="locft plan").parse_args_and_config(arguments)
    peft_config = None  # the default place
    if options.layers is not None or options.target_modules is not None:
        peft_config = LocFTConfig(layers=options.layers, target_modules=options.target_modules)
    plan = plan_edit(
        options.model,
        peft_config,
        batch_size=options.batch_size,
        dtype=options.dtype,
        offload_prefix=options.offload_prefix,
        **_edits(options),
    )
    if options.json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        _print(plan)


def _edits(options: PlanArguments) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in ("tokens_per_edit", "target_tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        count = int(options.edits)
    except ValueError:
        return _counted(options, given)
    if count < 1:
        raise ValueError(f"`--edits` is {count}, expected at least 1, or a file of edits")
    return {"num_edits": count, **given}


def _counted(options: PlanArguments, given: dict[str, int]) -> dict[str, Any]:
    if given:
        raise ValueError(
            f"`--edits` is {options.edits}, whose tokens are counted, and {', '.join(f'`--{name}`' for name in given)} was "
            "given too: leave that out, or give a number of edits"
        )
    edits = load_edits(options.edits)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer was found for {options.model!r}, which has to count the tokens of {options.edits}: give a number "
            f"of edits, or a model with its tokenizer ({error})"
        ) from error
    pairs = encode_answers(tokenizer, [edit.prompt for edit in edits], [edit.target for edit in edits])
    targets = [len(target) + 1 for _, target in pairs]  # and EOS
    tokens = [len(prompt) + target for (prompt, _), target in zip(pairs, targets)]
    return {"num_edits": len(edits), "tokens_per_edit": tokens, "target_tokens": targets}


def _print(plan: Plan) -> None:
    console = Console()
    console.print(
        f"{plan.model}: {plan.parameters:,} weights in {plan.dtype}, and an adapter of {plan.trained_parameters:,}. "
        f"{plan.num_edits:,} edits of {plan.tokens / plan.num_edits:.0f} tokens, in batches of {plan.batch_size}.",
        markup=False,
        highlight=False,
    )
    console.print(_phases(plan))
    console.print(_cards(plan))
    steps = -(-plan.num_edits // plan.batch_size)
    lines = [f"An epoch of {steps:,} step{'s' * (steps > 1)} takes {_operations(plan.epoch_flops)}."]
    if plan.prefix_cache:
        lines.insert(0, f"Before the first epoch, building the cache takes {_operations(plan.cache_flops)}.")
    lines.append(f"Of each card, {RESERVED / _GIB:.1f} GiB are left free, for the driver and the allocator's gaps.")
    lines.append("On a machine without an accelerator, add what is on the device to what is on the CPU.")
    for line in lines:
        console.print(line, highlight=False)


def _phases(plan: Plan) -> Table:
    table = Table(title="What each phase takes at its peak, in GiB", title_justify="left")
    table.add_column("phase")
    for name in ("device", "CPU", "disk"):
        table.add_column(name, justify="right")
    table.add_column("on the device", overflow="fold")
    for phase in plan.phases:
        totals = [_gib(sum(part.values())) for part in (phase.device, phase.cpu, phase.disk)]
        table.add_row(phase.name, *totals, ", ".join(f"{name} {_gib(size)}" for name, size in phase.device.items()))
    return table


def _cards(plan: Plan) -> Table:
    table = Table(title="Which card has room", title_justify="left")
    table.add_column("card")
    table.add_column("GiB", justify="right")
    table.add_column("room")
    for fit in plan.cards:
        room = "yes" if fit.plain else "with --offload_prefix" if fit.offloaded else "no"
        table.add_row(fit.card, f"{fit.memory / _GIB:.1f}", room)
    return table


def _gib(size: int) -> str:
    return _rounded(size / _GIB) if size else "0"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 10 else f"{value:.2g}"


def _operations(flops: int) -> str:
    seconds = flops / _TERA / _SPEED
    times: Sequence[tuple[float, str]] = ((3600, "h"), (60, "min"), (1, "s"))
    size, unit = next(((size, unit) for size, unit in times if seconds >= size), (1, "s"))
    return f"{_rounded(flops / _TERA)} TFLOP, {seconds / size:.2g} {unit} at {_SPEED} TFLOP/s"
