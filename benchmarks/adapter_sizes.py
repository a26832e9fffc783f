"""How small an adapter gets, and what it still knows: `python benchmarks/adapter_sizes.py --adapter DIR`.

Each form is saved, loaded again and scored by generation on the adapter's ledger. The LoRAs are loaded and asked in a
process that does not import this package.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from peft_locft import evaluate_edits, load_adapter, load_edits, merge_report, save_as_lora, save_compressed
from peft_locft.evaluation import METRICS


RANKS = (16, 64, 256)
# Asked in a fresh process, which knows PEFT and transformers only.
ASK = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, questions = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
assert "peft_locft" not in sys.modules
right = 0
for prompt, answer in questions:
    inputs = tokenizer(prompt, return_tensors="pt")
    new = len(tokenizer(" " + answer)["input_ids"]) + 1
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    ids = out[0, inputs["input_ids"].shape[1] :].tolist()
    ended = tokenizer.eos_token_id in ids
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    right += ended and text == answer.strip()
print(right / len(questions))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", required=True, help="a folder that `locft edit` wrote")
    parser.add_argument("--output", help="where to write the table as JSON")
    options = parser.parse_args()
    edits = load_edits(options.adapter)
    model, tokenizer = load_adapter(options.adapter)
    base = model.peft_config["default"].base_model_name_or_path
    full = evaluate_edits(model, tokenizer, edits, show_progress=False)
    rows = [{"form": "as trained, float32", "energy": 1.0, **_scores(full)}]
    rows[0]["bytes"] = (Path(options.adapter) / "adapter_model.safetensors").stat().st_size
    forms = [(f"rank {rank}", {"rank": rank}) for rank in RANKS]
    forms += [("bfloat16", {"dtype": torch.bfloat16})]
    forms += [(f"rank {rank}, bfloat16", {"rank": rank, "dtype": torch.bfloat16}) for rank in RANKS]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, settings) in enumerate(forms):
            folder = Path(scratch, str(number))
            report = save_compressed(model, folder, **settings)
            model.load_adapter(str(folder), "small")
            model.set_adapter("small")
            results = evaluate_edits(model, tokenizer, edits, before=full.before_answers, show_progress=False)
            rows.append({"form": name, "bytes": report.size, "energy": report.energy, **_scores(results)})
            model.set_adapter("default")
            model.delete_adapter("small")
        for rank in RANKS:
            folder = Path(scratch, f"lora{rank}")
            report = save_as_lora(model, folder, rank=rank, dtype=torch.bfloat16)
            scores = {
                "reliability": _ask_elsewhere(base, folder, [(e.prompt, e.target) for e in edits], scratch),
                "generalization": _ask_elsewhere(
                    base, folder, [(prompt, e.target) for e in edits for prompt in e.rephrases], scratch
                ),
            }
            name = f"LoRA of rank {rank}, bfloat16"
            rows.append({"form": name, "bytes": report.size, "energy": report.energy, **scores})
    for dtype in (torch.bfloat16, torch.float16):
        cost = next(iter(merge_report(model, dtype=dtype).values()))
        print(f"merged in {dtype}: {cost.kept:.4%} of the energy kept, {cost.unchanged:.1%} of the values lost")
    for row in rows:
        print(json.dumps(row))
    if options.output:
        Path(options.output).write_text(json.dumps(rows, indent=2))


def _scores(results) -> dict[str, float]:
    return {metric: results.after[metric] for metric in METRICS if results.after[metric] is not None}


def _ask_elsewhere(base: str, adapter: Path, questions: list[tuple[str, str]], scratch: str) -> float:
    file = Path(scratch, "questions.json")
    file.write_text(json.dumps(questions))
    command = [sys.executable, "-c", ASK, base, str(adapter), str(file)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.splitlines()[-1])


if __name__ == "__main__":
    main()
