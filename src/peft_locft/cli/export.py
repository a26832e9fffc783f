"""`locft export`: an adapter in a smaller or more portable form, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import TrlParser

from ..edits import LEDGER_NAME, EditSet, write_atomically
from ..evaluation import METRICS, EditResults, evaluate_edits
from ..hub import load_adapter, repository_files, save_as_lora, save_compressed
from ..tuner import merge_report
from .evaluate import ledger_of


_FORMATS = ("locft", "lora", "merged")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class ExportArguments:
    """Which adapter to export, and in which form."""

    adapter: str = field(metadata={"help": "The adapter: its folder, or its repository on the Hub."})
    output: str = field(metadata={"help": "The folder to write to; it must be new or empty."})
    format: str = field(
        default="locft",
        metadata={
            "help": "'locft': the adapter, smaller; 'lora': a LoRA, for servers that do not know LocFT; 'merged': a whole "
            "model."
        },
    )
    rank: str | None = field(
        default=None,
        metadata={"help": "The rank of the export, such as 64, or the share of energy to keep, such as 0.95."},
    )
    dtype: str | None = field(
        default=None, metadata={"help": "The dtype to save in: 'float32', 'bfloat16' or 'float16'. Default: as it is."}
    )
    model: str | None = field(
        default=None, metadata={"help": "The base model, if not the one that the adapter names."}
    )
    score: bool = field(
        default=True, metadata={"help": "Whether to score adapter and export on the ledger, by generation."}
    )
    batch_size: int = field(default=32, metadata={"help": "How many questions to ask at once."})


def main(arguments: list[str]) -> None:
    """Run `locft export`.

    Args:
        arguments (`list[str]`):
            The options.
    """
    (options,) = TrlParser(ExportArguments, prog="locft export").parse_args_and_config(arguments)
    rank, dtype = _checked(options)
    _check_output(options.output)
    edits = ledger_of(options.adapter) if options.score else None
    model, tokenizer = load_adapter(options.adapter, options.model)
    before = None if edits is None else evaluate_edits(model, tokenizer, edits, batch_size=options.batch_size)
    if options.format == "merged":
        exported, said = _merge(model, tokenizer, options.output, dtype)
    else:
        exported, said = _save(model, options, rank, dtype)
    if edits is not None:
        results = evaluate_edits(
            exported, tokenizer, edits, batch_size=options.batch_size, before=before.before_answers
        )
        _keep(results, exported, edits, options)
        _print_scores(before, results)
    print(f"{said} It is in {options.output}.")


def _checked(options: ExportArguments) -> tuple[int | float | None, torch.dtype | None]:
    if options.format not in _FORMATS:
        raise ValueError(f"`--format` is {options.format!r}, expected one of {list(_FORMATS)}")
    if options.dtype is not None and options.dtype not in _DTYPES:
        raise ValueError(f"`--dtype` is {options.dtype!r}, expected one of {list(_DTYPES)}")
    if options.format == "lora" and options.rank is None:
        raise ValueError("a LoRA needs a rank: give `--rank 64`, or a share of energy such as `--rank 0.95`")
    if options.format == "merged" and options.rank is not None:
        raise ValueError(f"`--rank` is {options.rank} and `--format` is merged, which has no rank: leave `--rank` out")
    if options.format == "locft" and options.rank is None and options.dtype is None:
        raise ValueError("nothing would get smaller: give `--rank`, `--dtype`, or both")
    rank = options.rank
    if rank is not None:
        try:
            rank = int(rank) if rank.isdigit() else float(rank)
        except ValueError:
            raise ValueError(f"`--rank` is {rank!r}, expected an integer, or a share of energy such as 0.95") from None
        if not (rank > 0 if isinstance(rank, int) else 0 < rank <= 1):
            raise ValueError(
                f"`--rank` is {options.rank!r}, expected a positive integer, or a share of energy such as 0.95"
            )
    return rank, _DTYPES.get(options.dtype)


def _check_output(output: str) -> None:
    # Stricter than for training: what is written could be the base model or the adapter itself.
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"the output folder {folder} is a file: choose another one")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"the output folder {folder} is not empty: choose a new one")


def _save(
    model: PeftModel, options: ExportArguments, rank: int | float | None, dtype: torch.dtype | None
) -> tuple[PeftModel, str]:
    save = save_as_lora if options.format == "lora" else save_compressed
    report = save(model, options.output, rank=rank, dtype=dtype)
    ranks = sorted({rank for rank in report.ranks.values() if rank is not None})
    said = (
        f"The {'LoRA' if options.format == 'lora' else 'adapter'} has {report.size / 2**20:.1f} MiB"
        + (f", rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}" if ranks else "")
        + f", and keeps {report.energy:.2%} of the deltas' energy."
    )
    return PeftModel.from_pretrained(model.unload(), options.output).eval(), said


def _merge(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, output: str, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, str]:
    if dtype is not None and dtype != model.dtype:
        model = model.float()  # or the sum would be rounded to the base model's dtype first
    costs = merge_report(model, dtype=dtype)
    merged = model.merge_and_unload(safe_merge=True)
    merged = merged if dtype is None else merged.to(dtype)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    kept, unchanged = (min(c.kept for c in costs.values()), max(c.unchanged for c in costs.values()))
    said = (
        f"The merged model keeps {kept:.2%} of the delta's energy in the layer where rounding costs most; up to "
        f"{unchanged:.2%} of a delta's values leave their weight as it was."
    )
    return merged, said


def _keep(
    results: EditResults, exported: PreTrainedModel | PeftModel, edits: EditSet, options: ExportArguments
) -> None:
    results.settings = {"exported from": options.adapter, "format": options.format, "rank": options.rank}
    results.settings["dtype"] = options.dtype
    results.save(options.output)
    if isinstance(exported, PeftModel):
        files = repository_files(Path(options.output).name, edits, exported.active_peft_config, results)
        for name, text in files.items():
            write_atomically(Path(options.output) / name, text)
    else:
        write_atomically(Path(options.output) / LEDGER_NAME, edits.to_jsonl())


def _print_scores(adapter: EditResults, exported: EditResults) -> None:
    table = Table(title="Scores by free generation", title_justify="left")
    for name in ("score", "base", "adapter", "export", "difference"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for metric in METRICS:
        if adapter.after[metric] is not None:
            values = (adapter.before[metric], adapter.after[metric], exported.after[metric])
            table.add_row(metric, *(f"{v:.2f}" for v in values), f"{values[2] - values[1]:+.2f}")
    Console().print(table)
