"""The whole search on a tiny model, against separate runs of the trainer."""

import json
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from peft_locft import EditConfig, EditTrainer, evaluate_edits, load_edits
from peft_locft.evaluation.capability import perplexity
from peft_locft.search import search_locations
from peft_locft.search.scoring import overall
from peft_locft.search.search import _WITHOUT_EFFECT
from peft_locft.trainer import preserving


TEXTS = ["The capital of Peru is Lima.", "The people of Chile speak Spanish."]


def largest_head_row(model):
    """A measure that an edit does not change."""
    return model.get_output_embeddings().weight.norm(dim=1).max().item()


def without_times(results):
    return [{**vars(row), "seconds": None} for row in results.rows]


def test_a_trial_is_a_run_of_the_trainer(search, make_model, tokenizer, edits, args):
    results = search(texts=TEXTS, metrics={"head": largest_head_row}, rungs=1, sample=8)
    assert [(row.layer, row.group) for row in results.rows] == [(1, "mlp"), (1, "down"), (2, "mlp"), (2, "down")]
    before = perplexity(make_model(), tokenizer, TEXTS)
    assert results.before == pytest.approx({"perplexity": before, "head": largest_head_row(make_model())})
    sampled = _in_order_of_search(edits, args().seed)
    for row in results.rows:
        trainer = EditTrainer(
            model=make_model(),
            args=args(),
            train_dataset=sampled,
            processing_class=tokenizer,
            peft_config=row.place.config,
        )
        trainer.train()
        assert row.learning_rate == trainer.args.learning_rate
        assert row.epochs == trainer.state.epoch and row.edits == 8 and row.rung == 1
        scores = evaluate_edits(trainer.model, tokenizer, sampled, show_progress=False).after
        for name in ("reliability", "generalization", "locality"):
            assert row.scores[name] == scores[name]
        after = perplexity(trainer.model, tokenizer, TEXTS)
        assert row.scores["perplexity"] == pytest.approx(after, rel=1e-3)
        capability = (min(before / after, 1) + 1) / 2  # of the other metric, everything is left
        assert row.scores["capability"] == pytest.approx(capability, rel=1e-3)
        mean = (sum(scores[name] for name in ("reliability", "generalization", "locality")) + capability) / 4
        assert row.score == pytest.approx(mean, rel=1e-3)
    assert max(row.scores["reliability"] for row in results.rows) > 0.5  # it is no comparison of nothing with nothing


def test_scores_are_the_same_where_no_states_are_kept_in_memory(search, args):
    kept, none = (
        search(texts=TEXTS, args=args(prefix_cache_memory=memory), groups=["down"], layers=[0, 1, 2])
        for memory in (4, 0)
    )
    for one, other in zip(kept.rows, none.rows, strict=True):
        assert one.place == other.place and one.rung == other.rung
        assert one.scores == pytest.approx(other.scores, rel=1e-4)


def _in_order_of_search(edits, seed):
    import random

    return load_edits([edits.to_records()[i] for i in random.Random(seed).sample(range(8), 8)])


def test_the_model_is_what_it_was(search, make_model):
    model = make_model().train()
    model.lm_head.weight.requires_grad_(False)
    search(model, args=None, rungs=1, layers=[1], groups=["layer"], metrics={"head": largest_head_row})
    untouched = make_model()
    for (name, now), (_, then) in zip(model.state_dict().items(), untouched.state_dict().items(), strict=True):
        assert torch.equal(now, then), name
    assert [type(module) for module in model.modules()] == [type(module) for module in untouched.modules()]
    assert model.training and not model.lm_head.weight.requires_grad
    assert all(p.requires_grad for n, p in model.named_parameters() if n != "lm_head.weight")
    assert not hasattr(model, "peft_config")
    ids = torch.tensor([[5, 3, 7, 2]])
    assert torch.equal(model.eval()(ids).logits, untouched(ids).logits)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_frozen_weights_in_16_bits_come_back_too(dtype, search, make_model, args):
    model = make_model()
    search(model, args=args(frozen_dtype=dtype, num_train_epochs=2), rungs=1)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), make_model().parameters()))


def test_the_unedited_model_is_asked_once_and_the_layers_below_run_once(search, make_model, monkeypatch):
    from peft_locft.evaluation import evaluate

    asked = []
    ask = evaluate.ask
    monkeypatch.setattr(evaluate, "ask", lambda *args, **kwargs: asked.append(1) or ask(*args, **kwargs))
    from peft_locft.trainer import prefix_cache

    built = []
    build = prefix_cache._build
    monkeypatch.setattr(prefix_cache, "_build", lambda *args: built.append(len(args[2])) or build(*args))
    results = search(layers=[0, 1, 2], rungs=2)
    assert len(asked) == len(results.rows) == 6 + 2  # the edited model only, once a trial
    assert len(built) <= 2 and built[0] == 2  # once a rung; the states that enter the layers 1 and 2


class Stopped(Exception):
    pass


def test_a_stopped_search_goes_on_where_it_was(search, tmp_path):
    options = {"layers": [1, 2], "groups": ["up", "down"], "rungs": 2}
    calls = []

    def measure(model):
        calls.append(1)
        if len(calls) == limit:
            raise Stopped
        return 1.0

    limit = None
    whole = search(**options, metrics={"measure": measure}, output_dir=tmp_path / "whole")
    needed, rows = len(calls), len(whole.rows)
    assert needed == rows + 1 == 6
    for stop in (3, 6):  # in the first rung and in the second
        calls.clear()
        limit, folder = stop, tmp_path / f"stopped{stop}"
        with pytest.raises(Stopped):
            search(**options, metrics={"measure": measure}, output_dir=folder)
        assert [path.name for path in folder.iterdir()] == ["search.jsonl"]
        # The process was killed in the middle of a line.
        with (folder / "search.jsonl").open("a") as file:
            file.write('{"layer": 1, "gro')
        calls.clear()
        limit = None
        resumed = search(**options, metrics={"measure": measure}, output_dir=folder)
        assert len(calls) == needed - (stop - 2)
        assert without_times(resumed) == without_times(whole)
        assert resumed.best.to_dict() == whole.best.to_dict()
        lines = (folder / "search.jsonl").read_text().splitlines()
        assert len(lines) == 1 + rows and [json.loads(line)["rung"] for line in lines[1:]] == [1] * 4 + [2]
    # A search that is complete only reads its file.
    calls.clear()
    assert without_times(search(**options, metrics={"measure": measure}, output_dir=folder)) == without_times(whole)
    assert len(calls) == 1


def test_another_search_is_not_continued(search, make_model, args, edits, tmp_path):
    options = {"layers": [1], "groups": ["down"], "output_dir": tmp_path / "search"}
    search(**options)
    content = (tmp_path / "search" / "search.jsonl").read_text()

    def refused(**changes):
        with pytest.raises(ValueError) as raised:
            search(**{**options, **changes})
        assert (tmp_path / "search" / "search.jsonl").read_text() == content
        return str(raised.value)

    folder = tmp_path / "search" / "search.jsonl"
    advice = "than given now: choose another output folder, give what it was begun with, or delete it"
    assert refused(edits=edits[:6]) == f"{folder} holds a search with another edits, rungs {advice}"
    model = make_model()
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] += 1e-3
    assert refused(model=model) == f"{folder} holds a search with another model {advice}"
    assert refused(args=args(learning_rate=1e-3, seed=1)) == (
        f"{folder} holds a search with another edits, learning_rate, seed {advice}"
    )
    assert refused(texts=TEXTS) == f"{folder} holds a search with another texts {advice}"
    for content in ("something else\n", "something else", ""):
        folder.write_text(content)
        assert refused() == f"{folder} is no file of a search: choose another output folder, or delete it"


def test_other_terms_and_texts_are_another_search(search, args, tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("\n".join(TEXTS))
    settings = {"projector": 0.1, "preservation_texts": str(path), "preservation_prompts": ["Where is Peru?"]}
    options = {"layers": [1], "groups": ["down"], "output_dir": tmp_path / "search"}
    search(**options, args=args(**settings))
    for changes, name in (
        ({"projector": 0.2}, "projector"),
        ({"kl_weight": 1.0}, "kl_weight"),
        ({}, "preservation_texts"),
    ):
        if not changes:
            path.write_text("Other text in the same file.")
        with pytest.raises(ValueError, match=f"holds a search with another {name} than given now"):
            search(**options, args=args(**settings | changes))


def test_every_field_of_its_own_tells_searches_apart_but_those_of_speed():
    own = {field.name for field in fields(EditConfig)} - {field.name for field in fields(TrainingArguments)}
    ignored = {name for name in own if _WITHOUT_EFFECT.fullmatch(name)}
    assert ignored == {"eval_contexts", "prefix_cache", "prefix_cache_memory"}
    for name in ("seed", "learning_rate", "num_train_epochs", "per_device_train_batch_size", "bf16", "weight_decay"):
        assert not _WITHOUT_EFFECT.fullmatch(name)


def test_what_else_is_in_the_folder_stays(search, tmp_path):
    (tmp_path / "search" / "work").mkdir(parents=True)
    (tmp_path / "search" / "work" / "thesis.tex").write_text("years of work")
    search(layers=[1], groups=["down"], output_dir=tmp_path / "search")
    assert (tmp_path / "search" / "work" / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in (tmp_path / "search").iterdir()) == ["search.jsonl", "work"]


def test_what_is_to_be_kept_is_asked_once(search, args, monkeypatch):
    made, make = [], preserving.make_anchors
    monkeypatch.setattr(
        preserving, "make_anchors", lambda *args, **settings: made.append(1) or make(*args, **settings)
    )
    kept = {"preservation_prompts": ["Where is Peru?"], "preservation_texts": TEXTS}
    results = search(args=args(kl_weight=1.0, **kept), rungs=1)
    assert len(results.rows) == 4 and len(made) == 1
    made.clear()
    (one,) = search(args=args(kl_weight=1.0, **kept), rungs=1, layers=[2], groups=["down"]).rows
    assert (one.scores, len(made)) == (results.rows[-1].scores, 1)


def test_what_is_held_to_is_no_edit_of_a_later_rung(search, args, edits, monkeypatch):
    asked, make = [], preserving.make_anchors
    monkeypatch.setattr(
        preserving, "make_anchors", lambda *given, **settings: asked.extend(given[2]) or make(*given, **settings)
    )
    kept = {"preservation_prompts": [*(edit.prompt for edit in edits), "Where is Peru?"], "preservation_texts": TEXTS}
    assert max(row.rung for row in search(args=args(kl_weight=1.0, **kept), rungs=2).rows) == 2
    assert any("Where is Peru?" in prompt for prompt in asked)
    assert not any(edit.prompt in prompt for edit in edits for prompt in asked)


def test_what_has_no_effect_may_change(search, args, tmp_path):
    options = {"layers": [1], "groups": ["down"], "output_dir": tmp_path / "search"}
    first = search(**options)
    args = args(logging_strategy="no", prefix_cache_memory=1, per_device_eval_batch_size=4)
    assert search(**options, args=args).rows == first.rows


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sample": 0}, ValueError, "`sample` is 0, expected an integer of at least 1"),
        ({"rungs": 1.5}, ValueError, "`rungs` is 1.5, expected an integer of at least 1"),
        ({"layers": [7]}, ValueError, "layers [7] are not in the model"),
        ({"groups": ["mlp.down_proj"]}, ValueError, "`groups` is ['mlp.down_proj'], expected some of"),
        ({"metrics": {"a": 3}}, TypeError, "`metrics` has 3 as 'a', expected a function"),
        (
            {"metrics": {"locality": largest_head_row}},
            ValueError,
            "`metrics` has the name 'locality', which is that of",
        ),
        (
            {"metrics": {"zero": lambda model: 0}},
            ValueError,
            "the metric 'zero' of the unedited model is 0.0, expected a positive number",
        ),
        ({"texts": []}, ValueError, "`texts` is []"),
        ({"args": EditConfig(max_steps=30)}, ValueError, "`max_steps` is 30: a search shares epochs out"),
        (
            {"args": EditConfig(offload_prefix=True)},
            ValueError,
            "`offload_prefix` is True: a search trains in all layers",
        ),
        (
            {"args": EditConfig(recipe="locaedit")},
            ValueError,
            "`recipe` is 'locaedit', which chooses layers by tracing",
        ),
        ({"layers": 1}, ValueError, "`layers` is 1, expected a list of numbers, such as [1]"),
        ({"output_dir": __file__}, ValueError, f"`output_dir` is {__file__}, which is a file: give a folder"),
        ({"edits": []}, ValueError, "no edits"),
    ],
)
def test_what_is_refused(options, error, message, search, tmp_path):
    with pytest.raises(error) as raised:
        search(**options)
    assert message in str(raised.value)


def test_an_adapted_model_is_refused(make_model, edits):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="`model` is a PeftModel: give the base model"):
        search_locations(model, edits)


def test_a_model_without_a_name_needs_its_tokenizer(make_model, edits):
    with pytest.raises(ValueError) as raised:
        search_locations(make_model(), edits)
    assert str(raised.value) == "the model does not tell where its tokenizer is: pass the tokenizer as `tokenizer`"


def test_the_overall_score_is_the_mean_of_what_there_is():
    assert overall({"reliability": 1.0, "perplexity": 40.0}) == 1.0
    assert overall({"reliability": 1.0, "generalization": 0.5, "capability": 0.0, "mmlu": 7.0}) == 0.5
