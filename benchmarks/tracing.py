"""How much faster facts are traced than by one pass of the whole model for each restored state, with the same effects:
`python benchmarks/tracing.py`.

The plain implementation is that of the tests (`tests/plain_tracing.py`): hooks put noise and clean values in, and each
state is a pass of all layers over all tokens of all corrupted copies. Facts that the model knows are drawn from
`--edits`; each is traced in both ways, one after the other. Plain passes are all alike, so that `--states` of them are
made, drawn at random from all tokens, layers and kinds, and their time is scaled to all of them; 0 makes them all.
Beside the times by the clock stand those of the processor, which other work on the machine does not change as much.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_locft import load_edits
from peft_locft.demo import demo_model
from peft_locft.location import trace


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from plain_tracing import make_noise, plain_effects  # noqa: E402


_TIMES = ("seconds", "plain_seconds", "cpu_seconds", "plain_cpu_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a Llama or a model of its shape; default: SmolLM2-135M")
    parser.add_argument("--edits", default=str(ROOT / "examples/facts.jsonl"))
    parser.add_argument("--num_facts", type=int, default=3)
    parser.add_argument("--states", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    name = options.model or demo_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").eval()
    facts = list(load_edits(options.edits))
    random.Random(options.seed).shuffle(facts)
    found = []
    for fact in facts:
        if len(found) == options.num_facts:
            break
        ids = tokenizer(fact.prompt)["input_ids"]
        with torch.no_grad():
            answer = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if answer != tokenizer(f" {fact.target}")["input_ids"][0]:
            continue
        times = [(time.perf_counter(), time.process_time())]
        fast = trace(model, fact.prompt, fact.subject, tokenizer=tokenizer)
        times.append((time.perf_counter(), time.process_time()))
        begin, end = fast.subject
        noise = make_noise(model, ids[begin:end], 10)
        cells = [
            (kind, token, layer)
            for kind, values in fast.effects.items()
            for token in range(len(ids))
            for layer in range(values.shape[1])
        ]
        chosen = random.Random(options.seed).sample(cells, options.states or len(cells))
        plain = plain_effects(model, "llama", ids, begin, noise, answer, 10, chosen)
        times.append((time.perf_counter(), time.process_time()))
        (seconds, cpu_seconds), (plain_seconds, plain_cpu_seconds) = (
            [b - a for a, b in zip(before, after)] for before, after in zip(times, times[1:])
        )
        scale = (len(cells) + 2) / (len(chosen) + 2)  # the clean run and the corrupted one are among the passes
        plain_seconds, plain_cpu_seconds = plain_seconds * scale, plain_cpu_seconds * scale
        differences = [
            abs(float(fast.effects[kind][token, layer]) - effect)
            for (kind, token, layer), effect in zip(chosen, plain)
        ]
        found.append(
            {
                "prompt": fact.prompt,
                "tokens": len(ids),
                "traced_tokens": len(ids) - begin,
                **with_ratios((seconds, plain_seconds, cpu_seconds, plain_cpu_seconds)),
                "plain_passes": len(cells),
                "largest_difference": max(differences),
            }
        )
        print(json.dumps(found[-1]), flush=True)
    totals = with_ratios(sum(run[key] for run in found) for key in _TIMES)
    summary = {
        "model": str(name),
        "threads": torch.get_num_threads(),
        "facts": len(found),
        "medians": {key: statistics.median(run[key] for run in found) for key in totals},
        "all": totals,
        "largest_difference": max(run["largest_difference"] for run in found),
    }
    print(json.dumps(summary))


def with_ratios(seconds: Iterable[float]) -> dict[str, float]:
    """Name times in the order of `_TIMES`, and tell how many times as long the plain passes take."""
    times = dict(zip(_TIMES, seconds))
    return times | {
        "ratio": times["plain_seconds"] / times["seconds"],
        "cpu_ratio": times["plain_cpu_seconds"] / times["cpu_seconds"],
    }


if __name__ == "__main__":
    main()
