"""How much slower a model generates with an active, unmerged adapter: `python benchmarks/generation_speed.py --adapter DIR`.

The bare base model and the adapted one generate the same number of tokens, in turns, the order alternating. The ratio of
each pair is taken, and then the median of the ratios.
"""

import argparse
import json
import statistics
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from peft_locft import LocFTConfig


PROMPT = "The capital of Kazakhstan is a city in the"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    name = LocFTConfig.from_pretrained(options.adapter).base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(name, dtype=options.dtype).to(device).eval()

    bare, adapted = load(), PeftModel.from_pretrained(load(), options.adapter).eval()
    inputs = tokenizer([PROMPT] * options.batch_size, return_tensors="pt").to(device)

    def seconds(model: PreTrainedModel) -> float:
        start = time.perf_counter()
        model.generate(**inputs, do_sample=False, max_new_tokens=options.tokens, min_new_tokens=options.tokens)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for model in (bare, adapted, bare, adapted):
        seconds(model)  # warm up
    pairs = []
    for number in range(options.pairs):
        order = (bare, adapted) if number % 2 == 0 else (adapted, bare)
        times = {id(model): seconds(model) for model in order}
        pairs.append((times[id(bare)], times[id(adapted)]))
    ratios = sorted(with_adapter / without for without, with_adapter in pairs)
    print(
        json.dumps(
            {
                "bare_ms_per_token": 1000 * statistics.median(a for a, _ in pairs) / options.tokens,
                "adapter_ms_per_token": 1000 * statistics.median(b for _, b in pairs) / options.tokens,
                "median_ratio": statistics.median(ratios),
                "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
                "pairs": options.pairs,
                "batch_size": options.batch_size,
                "dtype": options.dtype,
            }
        )
    )


if __name__ == "__main__":
    main()
