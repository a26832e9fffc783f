"""What each way to leave the rest alone gains, and costs: `python benchmarks/frontier.py --edits FILE --texts FILE --output DIR`.

Each variant trains the same edits from the same start, one after the other in one process. Questions and texts to preserve
are made up by the unedited model, once for all variants. A variant that the folder holds already is not run again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_locft import EditConfig, EditTrainer, LocFTConfig, load_choices, load_edits, multiple_choice_accuracy
from peft_locft.cli.search import sampled_texts
from peft_locft.edits.tokens import encode_prompts
from peft_locft.evaluation import Question, ask
from peft_locft.preservation import InputStatistics, OutputStatistics
from peft_locft.search.scoring import Scorer
from peft_locft.trainer.samples import FOLDER_NAME, fill_samples
from peft_locft.tuner.temporary import evaluating


_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# By name: the fields of `EditConfig`; `lora` is a LoRA of rank 16 on all linear layers.
VARIANTS = {
    "paper": {},
    "l2_weight=1": {"l2_weight": 1.0},
    "l2_weight=10": {"l2_weight": 10.0},
    "max_delta=5e-3": {"max_delta": 5e-3},
    "max_delta=2e-2": {"max_delta": 2e-2},
    "max_growth=0.1": {"max_growth": 0.1},
    "max_growth=0.3": {"max_growth": 0.3},
    "projector=1": {"projector": 1.0},
    "projector=0.1": {"projector": 0.1},
    "projector=0.03": {"projector": 0.03},
    "output_projector=1": {"output_projector": 1.0},
    "output_projector=0.3": {"output_projector": 0.3},
    "kl_weight=1": {"kl_weight": 1.0},
    "kl_weight=10": {"kl_weight": 10.0},
    "contexts=3": {"contexts": 3},
    "contexts=6": {"contexts": 6},
    "contexts=6 projector=0.1": {"contexts": 6, "projector": 0.1},
    "margin=4": {"margin": 4.0},
    "careful": {"recipe": "careful"},
    "careful with contexts=6": {"recipe": "careful", "contexts": 6},
    "careful with kl_weight=3": {"recipe": "careful", "kl_weight": 3.0},
    "careful without kl_weight": {"recipe": "careful", "kl_weight": 0.0},
    "careful without projector": {"recipe": "careful", "projector": 0.0},
    "careful without output_projector": {"recipe": "careful", "output_projector": 0.0},
    "careful without contexts": {"recipe": "careful", "contexts": 0},
    "careful without margin": {"recipe": "careful", "margin": 0.0},
    "careful without decay": {"recipe": "careful", "weight_decay": 0.0},
    "locaedit": {"recipe": "locaedit"},
    "lora everywhere": {"lora": True},
}


# Within so many pixels of each other, up and across for each letter, names would lie on each other.
_NEAR, _LETTER = 9, 6
# Asked about each edit's subject, though no edit is about that: how often is the new answer given all the same?
_OTHER_QUESTIONS = ("How old is {}?", "Who likes {}?", "What colour is {}?", "What do people say about {}?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: SmolLM2-135M-Instruct from its package")
    parser.add_argument("--edits", required=True)
    parser.add_argument("--first_edit", type=int, default=0)
    parser.add_argument("--num_edits", type=int, default=100)
    parser.add_argument("--num_scored", type=int, default=100, help="of these edits, spread evenly")
    parser.add_argument("--texts", required=True, help="plain texts, one a line, that no variant is trained on")
    parser.add_argument("--num_texts", type=int, default=60)
    parser.add_argument("--choices", nargs="*", default=[], help="files of multiple-choice questions")
    parser.add_argument("--num_choices", type=int, default=200)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    if options.model is None:
        from peft_locft.demo import demo_model

        options.model = str(demo_model())
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "frontier.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    edits = load_edits(options.edits, on_conflict="first")[options.first_edit :][: options.num_edits]
    scored = edits[:: max(len(edits) // options.num_scored, 1)]
    model = load(options.model)
    samples = own_samples(model, tokenizer, edits, folder / "samples.json")
    questions = {Path(name).stem: load_choices(name)[: options.num_choices] for name in options.choices}
    metrics = {
        name: lambda model, questions=questions: multiple_choice_accuracy(model, tokenizer, questions)
        for name, questions in questions.items()
    }
    asked = [probe.prompt for edit in scored for probe in edit.locality]
    unedited = next_tokens(model, tokenizer, asked)
    scorer = Scorer(model, tokenizer, scored, sampled_texts(options.texts, options.num_texts), metrics, 32)
    write(path, {"variant": "unedited", "scores": scorer.before, "edits": len(edits)})
    for variant in options.variants:
        if variant in read(path):
            continue
        torch.manual_seed(0)
        settings = dict(VARIANTS[variant])
        config = None
        if settings.pop("lora", False):
            config = LoraConfig(r=16, lora_alpha=32, target_modules=_ALL, task_type="CAUSAL_LM")
            settings["learning_rate"] = 1e-3
        run = Path(tempfile.mkdtemp(), "run")
        trainer = EditTrainer(
            model=load(options.model),
            args=EditConfig(
                output_dir=str(run),
                frozen_dtype="auto",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **samples,
                **settings,
            ),
            train_dataset=edits,
            processing_class=tokenizer,
            peft_config=config,
        )
        used = trainer.model.peft_config["default"]
        layers = used.layers if isinstance(used, LocFTConfig) else used.layers_to_transform
        moments = folder / f"statistics of {spanned(layers)}"  # for all variants in these layers
        terms = ((InputStatistics, trainer.args.projector), (OutputStatistics, trainer.args.output_projector))
        kinds = [kind for kind, is_on in terms if is_on]
        if kinds and all((moments / kind.file_name).is_file() for kind in kinds):
            trainer.args.statistics = str(moments)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        if trainer.args.statistics is None:
            for kind in kinds:
                kind.load(run / FOLDER_NAME).save(moments)
        epochs = [entry for entry in trainer.state.log_history if "epoch_loss" in entry]
        write(
            path,
            {
                "variant": variant,
                "layers": layers,
                "epochs": len(epochs),
                "loss": epochs[-1]["epoch_loss"],
                "seconds": round(seconds, 1),
                "scores": scorer.score(trainer.model, scored)
                | {
                    "next_token": (next_tokens(trainer.model, tokenizer, asked) == unedited).float().mean().item(),
                    "leaked": leaked(trainer.model, tokenizer, scored),
                },
            },
        )
    found = read(path)
    (folder / "frontier.md").write_text(table(found))
    plot(found, folder / "frontier.png")
    print(table(found))


def load(name):
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


@torch.no_grad()
def next_tokens(model, tokenizer, prompts: list[str]) -> torch.Tensor:
    """The most probable token behind each prompt: whether it stays is the weaker form of locality that many papers score."""
    encoded = encode_prompts(tokenizer, prompts)
    with evaluating(model):
        lasts = [model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits for ids in encoded]
    return torch.cat(lasts)[:, -1].argmax(-1)


def leaked(model, tokenizer, edits) -> float:
    """The share of other questions about the edits' subjects that are answered with the edit's target."""
    questions = [
        Question(edit.id, "locality", question.format(edit.subject), edit.target)
        for edit in edits
        if edit.subject
        for question in _OTHER_QUESTIONS
    ]
    answers = ask(model, tokenizer, questions)
    told = [answer.text.split() == question.answer.split() for question, answer in zip(questions, answers)]
    return sum(told) / max(len(told), 1)


def own_samples(model, tokenizer, edits, path: Path) -> dict:
    """What the unedited model makes up, kept beside the results."""
    if not path.is_file():
        args = EditConfig(output_dir=tempfile.mkdtemp(), recipe="careful")
        fill_samples(args, edits, model, tokenizer)
        names = ("preservation_prompts", "preservation_texts")
        path.write_text(json.dumps({name: getattr(args, name) for name in names}, ensure_ascii=False, indent=1))
    return json.loads(path.read_text())


def write(path: Path, row: dict) -> None:
    if row["variant"] not in read(path):
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def read(path: Path) -> dict[str, dict]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return {row["variant"]: row for row in map(json.loads, lines)}


def table(found: dict[str, dict]) -> str:
    before = found["unedited"]["scores"]
    others = [name for name in before if name != "perplexity"]
    names = ["reliability", "generalization", "locality", "next_token", "leaked"]
    heads = ["setting", "layers", "epochs", "s", *names, "perplexity", *others]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in found.values():
        scores = row["scores"]
        cells = [
            row["variant"],
            spanned(row.get("layers")),
            str(row.get("epochs", "")),
            f"{row.get('seconds', 0):.0f}",
        ]
        cells += [f"{scores[name]:.2f}" if name in scores else "" for name in names]
        cells.append(f"{scores['perplexity']:.2f} ({scores['perplexity'] / before['perplexity'] - 1:+.1%})")
        cells += [f"{scores[name]:.3f}" for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spanned(layers) -> str:
    if not layers:
        return ""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"


def plot(found: dict[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure

    before = found["unedited"]["scores"]["perplexity"]
    rows = [row for name, row in found.items() if name != "unedited"]
    figure = Figure(figsize=(14, 7), layout="constrained")
    kept, read, names = figure.subplots(1, 3, width_ratios=[3, 3, 2])
    panels = [
        (kept, "locality", [row["scores"]["locality"] for row in rows]),
        (read, "perplexity, relative to the unedited model", [row["scores"]["perplexity"] / before for row in rows]),
    ]
    gained = [row["scores"]["generalization"] for row in rows]
    for axes, name, values in panels:
        axes.scatter(gained, values, s=18, color="tab:blue", clip_on=False)
        axes.set(xlabel="generalization", ylabel=name, xlim=(0, 1))
        axes.grid(alpha=0.3)
    highest = max(panels[1][2])
    if highest > 1.5:
        read.set_yscale("log")
        read.minorticks_off()
        ticks = [tick for tick in (1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 30, 100) if tick < highest * 1.1]
        read.set_yticks(ticks, [f"{tick - 1:+.0%}" for tick in ticks])
    figure.draw_without_rendering()  # so that places in pixels are known
    for axes, _, values in panels:
        number_points(axes, list(zip(gained, values)))
    names.axis("off")
    lines = [f"{number}  {row['variant']}" for number, row in enumerate(rows, 1)]
    names.text(0, 1, "\n".join(lines), va="top", fontsize=9, linespacing=1.5)
    figure.savefig(path, dpi=110)


def number_points(axes, points: list[tuple[float, float]]) -> None:
    """Write numbers to the right of points; those that would lie on each other share one place."""
    labels: list[tuple[float, float, tuple[float, float], list[int]]] = []
    placed = sorted((*pixels, number) for number, pixels in enumerate(axes.transData.transform(points), 1))
    for x, y, number in placed:
        near = (
            numbers
            for left, level, _, numbers in labels
            if abs(level - y) < _NEAR and x - left < _LETTER * len(f"{numbers}")
        )
        if (numbers := next(near, None)) is not None:
            numbers.append(number)
        else:
            labels.append((x, y, points[number - 1], [number]))
    for _, _, point, numbers in labels:
        text = ", ".join(map(str, sorted(numbers)))
        axes.annotate(text, point, textcoords="offset points", xytext=(4, 3), fontsize=8)


if __name__ == "__main__":
    main()
