"""`locft edit`: a file of edits becomes an adapter and a proof."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from ..edits import load_edits
from ..trainer import EditConfig, EditTrainer, check_output_dir, find_checkpoint
from ..tuner import LocFTConfig
from .checks import check_model, check_output
from .tables import print_results


@dataclass
class EditArguments:
    """What to edit, with which edits, where to, and at which place."""

    model: str = field(metadata={"help": "The model to edit: its name on the Hub, or its folder."})
    edits: str = field(metadata={"help": "The edits: a JSON, JSONL, CSV or Parquet file, or a dataset on the Hub."})
    output: str = field(metadata={"help": "The folder to write adapter, results and card to."})
    layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "The layers to edit; negative ones count from the last. Default: the recipe's, or every layer if "
            "`--target_modules` is given."
        },
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "The modules to edit in these layers. Default: the recipe's, or the MLP's down projection."},
    )
    on_conflict: str = field(
        default="raise",
        metadata={
            "help": "Of two edits of one prompt with different targets, keep the 'first' or 'last', or 'raise'."
        },
    )


def main(arguments: list[str]) -> None:
    """Run `locft edit`.

    Args:
        arguments (`list[str]`):
            The options.
    """
    parser = TrlParser((EditArguments, EditConfig), prog="locft edit")
    options, config = parser.parse_args_and_config(arguments)
    check_output(options.output, config)
    config.output_dir = options.output
    resume = {"true": True, "false": False}.get(
        str(config.resume_from_checkpoint).lower(), config.resume_from_checkpoint
    )
    check_model(options.model)
    edits = load_edits(options.edits, on_conflict=options.on_conflict)
    if not resume:
        check_output_dir(options.output)
    elif resume is True:
        find_checkpoint(options.output)  # before the trainer makes the folder
    elif not Path(resume).is_dir():
        raise FileNotFoundError(f"the checkpoint {resume} does not exist")
    peft_config = None  # the trainer's default
    if options.layers is not None or options.target_modules is not None:
        if config.recipe == "locaedit":
            raise ValueError(
                "`--recipe locaedit` chooses layers by tracing, and modules: leave out `--layers` and `--target_modules`, "
                "or the recipe (its KL term alone is `--kl_weight 1`)"
            )
        peft_config = LocFTConfig(layers=options.layers, target_modules=options.target_modules)
    trainer = EditTrainer(model=options.model, args=config, train_dataset=edits, peft_config=peft_config)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.evaluate()
    trainer.save_model()
    print_results(trainer.results)
    settings = trainer.results.settings
    if settings["reason"]:
        first, *others = settings["layers"]
        layers = f"layers {first} to {others[-1]}" if others else f"layer {first}"
        print(f"Edited {layers}, {settings['target_modules'][0]}: {settings['reason']}.")
    print(
        f"Trained {settings['epochs']} epochs in {trainer.results.times['train']:.0f} s. "
        f"The adapter, its ledger, card and results are in {options.output}."
    )
