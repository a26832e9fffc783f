"""The search against as many separate runs: `python benchmarks/search.py --edits FILE --texts FILE --output DIR`.

First the search, over every layer and group. Then some of its places as separate runs, each in a process of its own that
loads the model, trains on the whole sample for all epochs, and scores the model before and after. Their times, by group, are
scaled up to all places. A search that was stopped goes on; its time is then the sum of what its trials took.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_locft import EditConfig, EditTrainer, LocFTConfig, load_edits
from peft_locft.cli.search import sampled_texts
from peft_locft.evaluation.capability import perplexity
from peft_locft.search import GROUPS, plot_search, search_locations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", required=True)
    parser.add_argument("--texts", required=True, help="plain texts, one a line")
    parser.add_argument("--output", required=True)
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--num_texts", type=int, default=8)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS))
    parser.add_argument("--separate", type=int, default=3, help="how many layers to run separately, of each group")
    parser.add_argument("--one", nargs=3, metavar=("LAYER", "MODULE", "RATE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options)
        return
    folder = Path(options.output)
    start = time.perf_counter()
    results = search_locations(
        str(model_folder()),
        sampled(options),
        layers=options.layers,
        groups=options.groups,
        sample=options.sample,
        texts=sampled_texts(options.texts, options.num_texts),
        args=EditConfig(frozen_dtype="auto"),
        output_dir=folder,
    )
    wall = time.perf_counter() - start
    results.save(folder)
    plot_search(results, folder / "search.png")
    searched = max(wall, sum(row.seconds for row in results.rows))
    print(f"search: {len(results.rows)} trials of {len(results.ranked())} places in {searched:.0f} s", flush=True)
    print(results.table(15), flush=True)

    rates = {row.place: row.learning_rate for row in results.rows}
    runs, all_runs = [], 0.0
    for group in options.groups:
        places = [place for place in rates if place.group == group]
        count = min(options.separate, len(places))
        chosen = [places[(2 * number + 1) * len(places) // (2 * count)] for number in range(count)]
        some = [separate(options, place, rates[place]) for place in chosen]
        all_runs += statistics.fmean(run["seconds"] for run in some) * len(places)
        runs += some
    ratio = searched / all_runs
    print(
        f"separate runs of all {len(rates)} places: {all_runs:.0f} s; the search takes {ratio:.3f} of that", flush=True
    )
    found = {"search_seconds": searched, "separate_seconds": all_runs, "ratio": ratio, "separate_runs": runs}
    (folder / "benchmark.json").write_text(json.dumps(found, indent=2) + "\n")


def separate(options: argparse.Namespace, place, rate: float) -> dict:
    names = ("edits", "texts", "output", "sample", "num_texts")
    arguments = [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
    arguments += ["--one", str(place.layer), place.module, str(rate)]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{place} failed:\n{done.stderr[-3000:]}")
    seconds = time.perf_counter() - start
    run = {"layer": place.layer, "group": place.group, "seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}
    print(json.dumps(run), flush=True)
    return run


def run_one(options: argparse.Namespace) -> None:
    layer, module, rate = options.one
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    texts = sampled_texts(options.texts, options.num_texts)
    before = perplexity(model, tokenizer, texts)
    trainer = EditTrainer(
        model=model,
        args=EditConfig(
            output_dir=tempfile.mkdtemp(),
            learning_rate=float(rate),
            frozen_dtype="auto",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=sampled(options),
        processing_class=tokenizer,
        peft_config=LocFTConfig(layers=[int(layer)], target_modules=[module]),
    )
    trainer.train()
    scores = trainer.evaluate()
    after = perplexity(trainer.model, tokenizer, texts)
    kept = {name: scores[f"eval_{name}"] for name in ("reliability", "generalization", "locality")}
    print(json.dumps({"epochs": round(trainer.state.epoch), **kept, "perplexity": after, "before": before}))


def sampled(options: argparse.Namespace):
    return load_edits(options.edits, on_conflict="first")[: options.sample]


def model_folder() -> Path:
    from peft_locft.demo import demo_model

    return demo_model()


if __name__ == "__main__":
    main()
