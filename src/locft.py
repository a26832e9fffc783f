"""The front door of the `locft` command.

It stands outside of the package because importing `peft_locft` imports PEFT and torch, which takes seconds: help and
misspelt verbs are answered here, at once. The verbs themselves are in `peft_locft.cli`.
"""

from __future__ import annotations

import difflib
import importlib
import sys


VERBS = {
    "plan": "tell what an edit will take, and which card has room for it, before a model is loaded",
    "trace": "show which tokens and layers carry the facts of a file",
    "search": "find the layer and modules to edit, on a sample of the edits, and map them",
    "edit": "teach a model a file of edits, and write adapter, results and card",
    "evaluate": "score an adapter's edits, before and after",
    "export": "make an adapter smaller, a LoRA, or a merged model, and tell what that costs",
    "ask": "answer prompts with the base model and the edited one, side by side",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a verb.

    Args:
        arguments (`list[str]`, *optional*):
            The command line without the program's name. Defaults to that of the process.

    Returns:
        `int`: The exit code: 0, 1 if the work failed, 2 if the command line or the input is faulty, 130 if interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    verb, rest = (arguments[0], arguments[1:]) if arguments else (None, [])
    if verb in (None, "-h", "--help", "help"):
        print(_help())
        return 0 if verb else 2
    if verb in ("-V", "--version"):
        print(f"locft {importlib.import_module('importlib.metadata').version('peft-locft')}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f", did you mean `{near[0]}`?" if near else "."
        print(f"locft: there is no verb {verb!r}{hint} The verbs are {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    return importlib.import_module("peft_locft.cli").run(verb, rest)


def _help() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "usage: locft VERB [options]",
            "",
            "Teach a language model new facts and keep the rest of it as it was.",
            "",
            *(f"  {verb:<{width}}  {meaning}" for verb, meaning in VERBS.items()),
            "",
            "  locft plan --model M --layers 22 --edits 1000",
            "  locft trace --model M --edits facts.jsonl --output traced",
            "  locft search --model M --edits edits.jsonl --texts texts.txt --output places",
            "  locft edit --model M --edits edits.jsonl --output capitals",
            "  locft evaluate --adapter capitals",
            "  locft export --adapter capitals --output capitals-lora --format lora --rank 64",
            '  locft ask --adapter capitals "The capital of Kazakhstan is"',
            "",
            "`locft VERB --help` lists a verb's options; `--config FILE.yaml` reads them from a file.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
