"""Ways to reach the stop in less time, each with its scores: `python benchmarks/schedules.py --edits FILE`.

All from the same start, one after the other in one process, with the frozen weights in bfloat16 where that is faster.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_locft import EditConfig, EditTrainer, LocFTConfig, load_edits
from peft_locft.evaluation import ask, questions_of
from peft_locft.evaluation.questions import is_correct, rates


VARIANTS = {
    "as it is": {},
    "recheck_epochs=1": {"recheck_epochs": 1},
    "recheck_epochs=3": {"recheck_epochs": 3},
    "linear decay": {"lr_scheduler_type": "linear"},
    "cosine decay": {"lr_scheduler_type": "cosine"},
    "half the batch": {"per_device_train_batch_size": 13},
    "twice the rate": {"learning_rate": 2 * 5e-4 * 14336 / 1536},
    "half the rate": {"learning_rate": 0.5 * 5e-4 * 14336 / 1536},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", required=True)
    parser.add_argument("--num_edits", type=int, default=100)
    parser.add_argument("--layer", type=int, default=22)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    options = parser.parse_args()
    from peft_locft.demo import demo_model

    name = str(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(name)
    edits = load_edits(options.edits, on_conflict="first")[: options.num_edits]
    questions = [q for q in questions_of(edits) if q.metric in ("reliability", "generalization")]
    for variant in options.variants:
        trainer = EditTrainer(
            model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
            args=EditConfig(
                output_dir=str(Path(tempfile.mkdtemp(), "run")),
                frozen_dtype="auto",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **VARIANTS[variant],
            ),
            train_dataset=edits,
            processing_class=tokenizer,
            peft_config=LocFTConfig(layers=[options.layer], target_modules=["mlp.down_proj"]),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        losses = [entry["epoch_loss"] for entry in trainer.state.log_history if "epoch_loss" in entry]
        answers = ask(trainer.model, tokenizer, questions)
        right = [is_correct(question, answer, answer) for question, answer in zip(questions, answers)]
        scores = rates([question.metric for question in questions], right)
        found = {"variant": variant, "epochs": len(losses), "seconds": round(seconds, 1), "loss": losses[-1]}
        print(json.dumps(found | {key: scores[key] for key in ("reliability", "generalization")}), flush=True)


if __name__ == "__main__":
    main()
