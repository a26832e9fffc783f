"""How much faster edits are scored by verification than by `generate` on everything, with the same answers:
`python benchmarks/evaluation_speed.py --adapter DIR`.

The adapter's own ledger is asked, before and after, in turns: with `model.generate` in batches of the same size, as many
new tokens as the longest answer of the batch may have, and as `evaluate_edits` does it.
"""

import argparse
import json
import statistics
import time

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_locft import LocFTConfig, evaluate_edits, load_edits
from peft_locft.evaluation import generation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--num_edits", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args()
    name = LocFTConfig.from_pretrained(options.adapter).base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name, dtype="float32"), options.adapter)
    edits = load_edits(options.adapter)[: options.num_edits]
    fits = generation._longest_decoded

    def run(by_generate: bool) -> tuple[dict, list]:
        # Nothing fits: everything is left to `generate`.
        generation._longest_decoded = (lambda *_: 0) if by_generate else fits
        results = evaluate_edits(model, tokenizer, edits, batch_size=options.batch_size, show_progress=False)
        return results.times, list(results.rows)

    found = []
    for repeat in range(options.repeats):
        start = time.perf_counter()
        plain, plain_rows = run(by_generate=True)
        middle = time.perf_counter()
        fast, fast_rows = run(by_generate=False)
        end = time.perf_counter()
        found.append(
            {
                "plain_seconds": middle - start,
                "seconds": end - middle,
                "before_ratio": plain["evaluate_before"] / fast["evaluate_before"],
                "after_ratio": plain["evaluate_after"] / fast["evaluate_after"],
                "ratio": (middle - start) / (end - middle),
                "equal_answers": sum(a == b for a, b in zip(plain_rows, fast_rows)) / len(plain_rows),
            }
        )
        print(json.dumps({"repeat": repeat, **found[-1]}), flush=True)
    medians = {key: statistics.median(run[key] for run in found) for key in found[0]}
    print(json.dumps({"edits": len(edits), "questions": len(plain_rows), "medians": medians}))


if __name__ == "__main__":
    main()
