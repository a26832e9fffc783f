"""How time and memory grow with the number of edits: `python benchmarks/scale.py --edits 10000 100000`.

For each number, a process of its own loads templated edits from a JSON Lines file, trains a tiny Llama on them,
evaluates and saves. The file of edits is made before, so that it does not count. Beside the seconds on the clock stand
those of the processor, which say more on a machine that has other work to do. A peak is that of the process so far.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

from peft_locft import EditConfig, EditTrainer, LocFTConfig, load_edits


SYLLABLES = [first + second for first in "bdfgklmnprstv" for second in ("a", "e", "i", "o", "u", "an", "or", "el")]
# (prompt, rephrase, locality)
TEMPLATES = [
    ("The capital of {} is", "What is the capital of {}?", "The people of {} speak"),
    ("{} was born in", "The birthplace of {} is", "{} is known for"),
    ("The chancellor of {} is called", "Who is the chancellor of {}?", "The currency of {} is the"),
    ("{} plays for the team of", "The team of {} is", "{} has a sister named"),
]
PHASES = ("load", "set up", "train", "evaluate", "save")


def subject(number: int) -> str:
    """Return a made-up name, another one for each number."""
    parts = []
    for _ in range(4):
        number, part = divmod(number, len(SYLLABLES))
        parts.append(SYLLABLES[part])
    return "".join(parts[:2]).capitalize() + " " + "".join(parts[2:]).capitalize()


def records(edits: int) -> Iterator[dict]:
    """Yield edits by templates: a prompt, a rephrase and a locality probe each."""
    targets = random.Random(0)
    for number in range(edits):
        name = subject(number * 7919 % len(SYLLABLES) ** 4)  # neighbours that do not look alike
        prompt, rephrase, locality = (text.format(name) for text in TEMPLATES[number % len(TEMPLATES)])
        target = "".join(targets.choices(SYLLABLES, k=3)).capitalize()
        yield {"prompt": prompt, "target": target, "subject": name, "rephrases": [rephrase], "locality": [locality]}


def tiny_model() -> tuple[AutoModelForCausalLM, PreTrainedTokenizerFast]:
    """Return a Llama of two layers, of random weights, and a tokenizer that fits the templates."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator((f"{edit['prompt']} {edit['target']}" for edit in records(1000)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    set_seed(0)
    return AutoModelForCausalLM.from_config(config), tokenizer


def run(path: str, options: argparse.Namespace) -> dict:
    """Load, train, evaluate and save in this process. Times are in seconds, peaks in MiB at the end of each phase."""
    seconds, cpu_seconds, peaks = {}, {}, {}

    def mark(phase: str, since: tuple[float, float]) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        seconds[phase], cpu_seconds[phase] = now[0] - since[0], now[1] - since[1]
        peaks[phase] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return now

    model, tokenizer = tiny_model()
    now = mark("start", (time.perf_counter(), time.process_time()))
    del seconds["start"], cpu_seconds["start"]  # only the peak tells something: what the imports and the model take
    edits = load_edits(path)
    now = mark("load", now)
    args = EditConfig(
        output_dir=str(Path(path).parent / f"run-{len(edits)}"),
        num_train_epochs=options.epochs,
        per_device_eval_batch_size=options.eval_batch_size,
        prefix_cache=options.prefix_cache,
        prefix_cache_memory=0,  # in a file
        # Every epoch in full, whatever the model has learned by then.
        skip_loss=0,
        stop_loss=0,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = EditTrainer(
        model=model, args=args, train_dataset=edits, processing_class=tokenizer, peft_config=LocFTConfig(layers=[1])
    )
    now = mark("set up", now)
    trainer.train()
    now = mark("train", now)
    trainer.evaluate()
    now = mark("evaluate", now)
    trainer.save_model()
    mark("save", now)
    for times in (seconds, cpu_seconds):
        times["an epoch"] = times["train"] / options.epochs
        times["whole run"] = sum(times[phase] for phase in PHASES)
    return {
        "edits": len(edits),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mib": peaks,
        "rates": trainer.results.after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--eval_batch_size", type=int, default=256)
    parser.add_argument("--prefix_cache", action="store_true", help="with the prefix cache, in a file")
    parser.add_argument("--output", default="scale.json")
    parser.add_argument("--file", help=argparse.SUPPRESS)  # set by the benchmark for the process of one size
    options = parser.parse_args()
    if options.file:
        Path(options.output).write_text(json.dumps(run(options.file, options)))
        return

    results = []
    for count in sorted(options.edits):
        with tempfile.TemporaryDirectory() as folder:
            path, report = Path(folder, "edits.jsonl"), Path(folder, "report.json")
            with path.open("w") as file:
                file.writelines(json.dumps(record) + "\n" for record in records(count))
            command = [sys.executable, __file__, "--file", str(path), "--output", str(report)]
            command += ["--epochs", str(options.epochs), "--eval_batch_size", str(options.eval_batch_size)]
            subprocess.run([*command, *(["--prefix_cache"] if options.prefix_cache else [])], check=True)
            results.append(json.loads(report.read_text()))

    first, ratios = results[0], []
    for result in results[1:]:
        ratio = {
            measure: {phase: value / first[measure][phase] for phase, value in result[measure].items()}
            for measure in ("seconds", "cpu_seconds", "peak_mib")
        }
        ratios.append({"edits": result["edits"] / first["edits"], **ratio})
    print(f"{'':22}" + "".join(f"{result['edits']:>12,}" for result in results) + f"{'ratio':>12}" * len(ratios))
    for measure, unit, title in (("seconds", "s", ""), ("cpu_seconds", "s", ", CPU"), ("peak_mib", "MiB", ", peak")):
        for phase in first[measure]:
            cells = [f"{result[measure][phase]:.1f} {unit}" for result in results]
            cells += [f"{ratio[measure][phase]:.3f}" for ratio in ratios]
            print(f"{phase + title:22}" + "".join(f"{cell:>12}" for cell in cells))
    Path(options.output).write_text(json.dumps({"runs": results, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
