"""Seconds, memory and scores of three ways to teach the same edits: `python benchmarks/training.py --edits FILE`.

(a) `plain`: the procedure of LocFT-BF as its paper describes it, in one weight of the whole model: left padding, a full
    forward pass, logits at every position, the whole model saved at the end;
(b) `sft`: TRL's `SFTTrainer` with a LoRA of rank 16 on all linear layers;
(c) `edit`: `EditTrainer` as it is by default, and `edit_bf16`, with `frozen_dtype="auto"`.

All see the same edits in batches of the same size, and stop after the first epoch whose mean loss is under 1e-2, or after
25. Each run has a process of its own, so that its peak memory is its own; the runs take turns, and medians are told.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from peft_locft import EditConfig, EditTrainer, LocFTConfig, load_edits
from peft_locft.evaluation import ask, questions_of
from peft_locft.evaluation.questions import is_correct, rates


METHODS = ("plain", "sft", "edit", "edit_bf16")
STOP, EPOCHS, PAPER_RATE, PAPER_WIDTH = 1e-2, 25, 5e-4, 14336


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="A folder or a name on the Hub; SmolLM2-135M by default.")
    parser.add_argument("--edits", required=True)
    parser.add_argument("--num_edits", type=int, nargs="+", default=[100])
    parser.add_argument("--layer", type=int, default=22)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="The most epochs of a run.")
    parser.add_argument("--batch_size", type=int, default=25)
    parser.add_argument("--lora_rate", type=float, default=1e-3)
    parser.add_argument("--no_scores", action="store_true", help="Leave out reliability and generalization.")
    parser.add_argument("--output", default="benchmarks/results/training")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a process for one run
    options = parser.parse_args()
    if options.model is None:
        from peft_locft.demo import demo_model

        options.model = str(demo_model())
    if options.one:
        run_one(options)
        return
    found = []
    for num_edits in options.num_edits:
        for repeat in range(options.repeats):
            for method in options.methods:
                scored = repeat == 0 and not options.no_scores
                found.append(in_own_process(options, method, num_edits, scored) | {"repeat": repeat})
                print(json.dumps(found[-1]), flush=True)
    report(options, found)


def in_own_process(options: argparse.Namespace, method: str, num_edits: int, scored: bool) -> dict:
    names = ("model", "edits", "layer", "epochs", "batch_size", "lora_rate")
    arguments = [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
    arguments += ["--one", method, "--num_edits", str(num_edits), *([] if scored else ["--no_scores"])]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method} with {num_edits} edits failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_one(options: argparse.Namespace) -> None:
    set_seed(0)
    method, folder = options.one, tempfile.mkdtemp()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    edits = load_edits(options.edits, on_conflict="first")[: options.num_edits[0]]
    before_loading = peak_mib()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    train = {"plain": train_plain, "sft": train_sft}.get(method, train_edit)
    start = time.perf_counter()
    model, epoch_seconds, losses = train(options, method, model, tokenizer, edits, folder)
    seconds = time.perf_counter() - start
    result = {
        "method": method,
        "edits": len(edits),
        "seconds": seconds,
        "epochs": len(losses),
        "epoch_seconds": statistics.median(epoch_seconds),
        "last_loss": losses[-1],
        "first_losses": losses[:3],
        "peak_mib": peak_mib(),
        "libraries_mib": before_loading,
        "saved_bytes": sum(path.stat().st_size for path in Path(folder, "saved").rglob("*.safetensors")),
        "tflop_an_epoch": useful_operations(model, tokenizer, edits, options.layer) / 1e12,
        "peak_gflops": {str(dtype)[6:]: matmul_peak(dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16)},
    }
    if not options.no_scores:
        questions = [q for q in questions_of(edits) if q.metric in ("reliability", "generalization")]
        answers = ask(model, tokenizer, questions)
        right = [is_correct(question, answer, answer) for question, answer in zip(questions, answers)]
        scores = rates([question.metric for question in questions], right)
        result |= {name: scores[name] for name in ("reliability", "generalization")}
    print(json.dumps(result))


# ---- (a) the paper's procedure, without anything of this package ----


def train_plain(options, method, model, tokenizer, edits, folder):
    weight = model.get_submodule(decoder_layers(model)[options.layer]).mlp.down_proj.weight
    model.requires_grad_(False)
    weight.requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=PAPER_RATE * PAPER_WIDTH / weight.shape[1])
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    seconds, losses = [], []
    for _ in range(options.epochs):
        start, total = time.perf_counter(), 0.0
        for chosen in torch.randperm(len(edits)).split(options.batch_size):
            batch = [edits[int(number)] for number in chosen]
            texts = [f"{edit.prompt} {edit.target}{tokenizer.eos_token}" for edit in batch]
            inputs = tokenizer(texts, return_tensors="pt", padding=True)
            targets = [
                len(tokenizer(f"{e.prompt} {e.target}").input_ids) - len(tokenizer(e.prompt).input_ids) + 1
                for e in batch
            ]
            labels = inputs.input_ids.clone()
            for row, count in enumerate(targets):
                labels[row, :-count] = -100
            logits = model(**inputs).logits  # (batch, width, vocab)
            token_losses = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
            ).view(len(batch), -1)
            per_edit = token_losses.sum(1) / torch.tensor(targets)
            loss = per_edit.mean()
            optimizer.zero_grad()
            if loss.item() >= STOP:
                loss.backward()
                optimizer.step()
            total += per_edit.sum().item()
        losses.append(total / len(edits))
        seconds.append(time.perf_counter() - start)
        if losses[-1] < STOP:
            break
    model.save_pretrained(Path(folder, "saved"))
    return model, seconds, losses


# ---- (b) TRL, and (c) this package ----


class Watch(TrainerCallback):
    """Takes the time of each epoch, and for a trainer without that rule, stops when the epoch's mean loss is small."""

    def __init__(self, stops: bool):
        self.stops, self.seconds, self.losses, self.steps = stops, [], [], []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.start, self.steps = time.perf_counter(), []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.steps.append(float(logs["loss"]))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)
        if self.stops:
            self.losses.append(statistics.mean(self.steps))
            control.should_training_stop = self.losses[-1] < STOP


def train_sft(options, method, model, tokenizer, edits, folder):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    watch = Watch(stops=True)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.lora_rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            bf16=False,
            gradient_checkpointing=False,  # slower, and memory is not short here
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": e.prompt, "completion": f" {e.target}"} for e in edits]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[watch],
    )
    trainer.train()
    trainer.save_model(str(Path(folder, "saved")))
    return trainer.model, watch.seconds, watch.losses


def train_edit(options, method, model, tokenizer, edits, folder):
    watch = Watch(stops=False)
    trainer = EditTrainer(
        model=model,
        args=EditConfig(
            output_dir=str(Path(folder, "run")),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            frozen_dtype="auto" if method == "edit_bf16" else None,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=edits,
        processing_class=tokenizer,
        peft_config=LocFTConfig(layers=[options.layer], target_modules=["mlp.down_proj"]),
        callbacks=[watch],
    )
    trainer.train()
    trainer.model.save_pretrained(str(Path(folder, "saved")))
    losses = [entry["epoch_loss"] for entry in trainer.state.log_history if "epoch_loss" in entry]
    return trainer.model, watch.seconds, losses


# ---- What the arithmetic needs ----


def decoder_layers(model: nn.Module) -> list[str]:
    return [
        name for name, module in model.named_modules() if name.rpartition(".")[2].isdigit() and hasattr(module, "mlp")
    ]


def useful_operations(model: nn.Module, tokenizer, edits, layer: int) -> float:
    """The multiplications and additions of an epoch that no one can do without: products of weights and real tokens
    from the edited layer up, forwards, and backwards for all above the edited weight; logits of target tokens. Neither
    padding nor attention nor what is not a matrix product is counted."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = decoder_layers(model)
    sizes = []
    for name in names:
        modules = [
            m for n, m in model.get_submodule(name).named_modules() if n.endswith("_proj")
        ]  # as PEFT wraps them
        sizes.append(sum(module.weight.numel() for module in modules))
    down = model.get_submodule(names[layer]).mlp.down_proj.weight.numel()
    head = model.get_output_embeddings().weight.numel()
    tokens = [len(tokenizer(f"{e.prompt} {e.target}").input_ids) + 1 for e in edits]
    targets = [n - len(tokenizer(e.prompt).input_ids) for n, e in zip(tokens, edits)]
    above = sum(sizes[layer + 1 :])
    forward, backward = sizes[layer] + above + down, above + down  # the delta's own product, and its gradient
    return 2 * (sum(tokens) * (forward + backward) + 2 * sum(targets) * head)


def matmul_peak(dtype: torch.dtype, size: int = 2048, tries: int = 15) -> float:
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


# ---- Report ----


def report(options: argparse.Namespace, found: list[dict]) -> None:
    rows = []
    for num_edits in options.num_edits:
        for method in options.methods:
            runs = [run for run in found if run["method"] == method and run["edits"] == num_edits]
            row = {"method": method, "edits": num_edits}
            for name in ("epoch_seconds", "seconds", "epochs", "peak_mib", "saved_bytes"):
                row[name] = statistics.median(run[name] for run in runs)
            row["memory_mib"] = statistics.median(run["peak_mib"] - run["libraries_mib"] for run in runs)
            dtype = "bfloat16" if method == "edit_bf16" else "float32"
            row["peak_share"] = statistics.median(
                run["tflop_an_epoch"] * 1e3 / run["epoch_seconds"] / run["peak_gflops"][dtype] for run in runs
            )
            plain = [run for run in found if run["method"] == "plain" and run["edits"] == num_edits]
            if plain:  # ratios within a round of runs, so that the machine's moods cancel
                ratios = [
                    p["epoch_seconds"] / run["epoch_seconds"]
                    for run in runs
                    for p in plain
                    if p["repeat"] == run["repeat"]
                ]
                row["times_faster"] = statistics.median(ratios)
            row |= {name: runs[0].get(name) for name in ("reliability", "generalization")}
            rows.append(row)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    table = markdown(rows)
    settings = {name: value for name, value in vars(options).items() if name not in ("one", "output")}
    settings |= {name: Path(settings[name]).name for name in ("model", "edits")}
    output.with_suffix(".json").write_text(json.dumps({"settings": settings, "rows": rows, "runs": found}, indent=1))
    output.with_suffix(".md").write_text(table)
    picture(rows, output.with_suffix(".png"))
    print(table)


def markdown(rows: list[dict]) -> str:
    columns = {
        "method": "method",
        "edits": "edits",
        "epoch_seconds": "s an epoch",
        "times_faster": "times faster than plain",
        "epochs": "epochs",
        "seconds": "s to the stop",
        "peak_mib": "peak MiB",
        "memory_mib": "of these, not libraries",
        "saved_bytes": "saved bytes",
        "reliability": "reliability",
        "generalization": "generalization",
        "peak_share": "useful share of the matmul peak",
    }
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [row.get(name) for name in columns]
        shown = [
            ""
            if cell is None
            else f"{cell:.3g}"
            if isinstance(cell, float) and cell < 1000
            else f"{cell:.0f}"
            if isinstance(cell, float)
            else str(cell)
            for cell in cells
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def picture(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    sizes = sorted({row["edits"] for row in rows})
    panels = {
        "epoch_seconds": "seconds an epoch",
        "seconds": "seconds to the stop",
        "memory_mib": "peak memory in MiB, without libraries",
    }
    if len(sizes) > 1:
        del panels["seconds"]  # as many epochs as were asked for, not those to the stop
    figure = Figure(figsize=(3.7 * len(panels), 3.6), layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for place, (name, title) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        if len(sizes) == 1:
            bars = axes.bar(methods, [row[name] for row in rows], color="#1f6feb")
            axes.bar_label(bars, fmt=lambda value: f"{value:.0f}" if value >= 100 else f"{value:.3g}", padding=2)
        else:
            for method in methods:
                chosen = [row for row in rows if row["method"] == method]
                axes.plot([row["edits"] for row in chosen], [row[name] for row in chosen], marker="o", label=method)
            axes.set_xscale("log")
            if name == "epoch_seconds":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
            axes.set_xlabel("edits")
            axes.legend(frameon=False)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
