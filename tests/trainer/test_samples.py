"""What a run prepares before its first step: samples of the model, second moments, what the model is held to."""

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from preserved import KEPT, QUESTIONS, TEXTS
from watching import weights

from peft_locft import Edit, EditConfig, EditSet, LocFTConfig
from peft_locft.preservation import InputStatistics, OutputStatistics
from peft_locft.trainer import preserving, samples
from peft_locft.trainer.samples import fill_samples, read_texts


@pytest.mark.parametrize(("has", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_samples_are_drawn_in_16_bits_where_that_is_faster(
    make_model, tokenizer, edits, monkeypatch, tmp_path, has, expected
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    model, used = make_model(), set()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda *args, **kwargs: used.add(model.lm_head.weight.dtype) or generate(*args, **kwargs)
    )
    args = EditConfig(output_dir=str(tmp_path), use_cpu=True, kl_weight=1.0)
    monkeypatch.setattr(samples, "_PROMPTS", 4)
    monkeypatch.setattr(samples, "_TEXTS", 4)
    fill_samples(args, edits, model, tokenizer)
    assert used == {expected} and len(args.preservation_texts) == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*further forms of edits")  # the tiny model takes few tokens
def test_the_models_own_samples_are_kept_and_forgotten_with_the_run(make_trainer, tmp_path):
    path = tmp_path / "run" / "preservation" / "samples.json"
    make_trainer(contexts=2, kl_weight=1.0, num_train_epochs=1).train()
    assert set(json.loads(path.read_text())) == {"chat", "given", "of", "questions", "statements", "texts"}
    path.write_text(json.dumps({"questions": ["of another model"], "texts": ["of another model"]}))
    make_trainer(contexts=2, kl_weight=1.0, num_train_epochs=1).train()
    assert "of another model" not in path.read_text()


@pytest.mark.filterwarnings("ignore:.*further forms of edits")
@pytest.mark.parametrize(
    ("changed", "is_kept"),
    [
        ({}, True),
        ({"learning_rate": 1e-3}, True),
        ({"model": 1}, False),
        ({"train_dataset": EditSet([Edit("The river of Peru is", "Lima")])}, False),
        ({"seed": 1}, False),
        ({"preservation_texts": TEXTS}, False),
        ({"peft_config": LocFTConfig(layers=[0])}, None),  # other statistics of the same samples
    ],
)
def test_what_a_run_prepared_before_it_was_killed_is_not_made_again(
    make_trainer, make_model, monkeypatch, changed, is_kept
):
    asked = []

    def killed(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(samples, "_TEXTS", 4)
    made_by = ((samples, "sample_texts"), (preserving, "input_statistics"), (preserving, "output_statistics"))
    for module, name in made_by:
        made = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, made=made, name=name, **kw: asked.append(name) or made(*args, **kw)
        )
    settings = {"contexts": 2, "kl_weight": 1.0, "projector": 0.3, "output_projector": 0.3, "num_train_epochs": 3}
    settings["preservation_prompts"] = QUESTIONS
    statistics = ["input_statistics"] * 2 + ["output_statistics"] * 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preserving, "make_anchors", killed)
        make_trainer(**settings).train()
    assert asked == ["sample_texts", *statistics]
    asked.clear()
    if "model" in changed:
        other = make_model()
        with torch.no_grad():
            other.model.embed_tokens.weight.mul_(1.01)
        changed = {"model": get_peft_model(other, LocFTConfig(layers=[1]))}
    make_trainer(**settings | changed).train()
    if is_kept is None:
        assert asked == statistics
    else:
        texts = [] if "preservation_texts" in changed else ["sample_texts"]
        assert asked == ([] if is_kept else [*texts, *statistics])


@pytest.mark.parametrize("resume", [False, True])
def test_what_the_unedited_model_says_is_asked_once_for_a_killed_run(make_trainer, monkeypatch, tmp_path, resume):
    made, make = [], preserving.make_anchors
    monkeypatch.setattr(
        preserving, "make_anchors", lambda *args, **settings: made.append(1) or make(*args, **settings)
    )
    settings = {"kl_weight": 1.0, "save_strategy": "epoch" if resume else "no", "stop_loss": 0, **KEPT}
    straight = make_trainer(**settings)
    straight.train()
    shutil.rmtree(tmp_path / "run")
    trainer = make_trainer(**settings)
    step = trainer.training_step

    def killed(*args, **kwargs):
        if trainer.state.global_step == 9:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    trainer.training_step = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    path = tmp_path / "run" / "preservation" / "anchors.safetensors"
    assert path.is_file()
    again = make_trainer(**settings)
    again.train(resume_from_checkpoint=resume)
    assert len(made) == 2 and not path.exists()  # two runs
    for mine, theirs in zip(weights(again), weights(straight), strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_asked_of_the_edits_is_not_held_to(make_trainer, make_model, tokenizer, monkeypatch):
    edits = EditSet(
        [
            Edit("The king of Peru is", "Lima", rephrases=["Who is the king of Peru?"]),
            Edit("Who rules Cuba?", "Oslo", locality=[{"prompt": "Who rules Spain?"}]),
        ]
    )
    theirs = ["The king of Peru is", "Who is the king of Peru?", "Who rules Cuba?", "Who rules Spain?"]
    asked = []
    make = preserving.make_anchors
    monkeypatch.setattr(
        preserving, "make_anchors", lambda *args, **settings: asked.extend(args[2]) or make(*args, **settings)
    )
    trainer = make_trainer(
        None, edits, kl_weight=1.0, num_train_epochs=1, **KEPT | {"preservation_prompts": [*theirs, "Why?"]}
    )
    with pytest.warns(UserWarning, match="4 of the 5 `preservation_prompts` are left out: they are prompts of the"):
        trainer.train()
    assert asked and not {text.lower() for text in theirs} & {text.lower() for text in asked}
    monkeypatch.setattr(samples, "sample_questions", lambda *args: [*theirs, "Who knows?"])
    monkeypatch.setattr(samples, "sample_statements", lambda *args: theirs)
    args = EditConfig(output_dir=trainer.args.output_dir, kl_weight=1.0)
    fill_samples(args, edits, make_model(), tokenizer)
    assert args.preservation_prompts == ["Who knows?"]


@pytest.mark.parametrize("term", [{"kl_weight": 1.0}, {"projector": 0.3}, {"output_projector": 0.3}])
def test_what_is_longer_than_the_context_is_left_out_or_cut(make_trainer, make_model, term):
    long = " ".join(["The river of Spain is in the north of Norway"] * 20)
    model = get_peft_model(make_model("gpt2"), LocFTConfig(layers=[1]))
    make_trainer(
        model=model,
        num_train_epochs=1,
        preservation_prompts=["Where is it?", f"{long}?"],
        preservation_texts=[long],
        **term,
    ).train()


@pytest.mark.parametrize(
    ("prompts", "questions", "others"),
    [
        (["Who rules {}?", "Where is {}？"], 1000, 0),
        (["The king of {} is", "Where is {}? It is in"], 334, 333),
        (["Who rules {}?", "The king of {} is"], 666, 167),
    ],
)
def test_prompts_are_made_up_of_the_kind_that_the_edits_are(
    make_model, tokenizer, monkeypatch, tmp_path, prompts, questions, others
):
    asked = []
    for kind, name in (("questions", "sample_questions"), ("statements", "sample_statements")):
        monkeypatch.setattr(samples, name, lambda *args, kind=kind: asked.append((kind, args[2])) or [kind])
    monkeypatch.setattr(samples, "sample_texts", lambda *args: ["Some text of Ada Lovelace."])
    edits = EditSet(Edit(prompt.format("Peru"), "Lima", subject="Peru") for prompt in prompts)
    args = EditConfig(output_dir=str(tmp_path), kl_weight=1.0)
    fill_samples(args, edits, make_model(), tokenizer)
    expected = {kind: count for kind, count in (("questions", questions), ("statements", others)) if count}
    assert dict(asked) == expected
    begun = [prompt for prompt in prompts if not prompt.endswith(("?", "？"))]
    assert args.preservation_prompts[: len(expected)] == list(expected)
    assert set(args.preservation_prompts[len(expected) :]) == {prompt.format("Ada Lovelace") for prompt in begun}


def test_few_prompts_of_the_models_own_are_told(make_trainer, monkeypatch):
    monkeypatch.setattr(samples, "sample_questions", lambda *args: ["Who was king?"] * 3)
    monkeypatch.setattr(samples, "sample_statements", lambda *args: [])
    with pytest.warns(
        UserWarning, match="of 1000 prompts to be held to, the model made up only 3 that make sense: give"
    ):
        make_trainer(kl_weight=1.0, num_train_epochs=1, preservation_texts=TEXTS).train()


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({"statistics": "folder"}, {"output_projector": 0.3}),
        ({"preservation_prompts": QUESTIONS}, {"kl_weight": 1.0}),
        ({"preservation_texts": TEXTS}, {"contexts": 2}),
        ({"preservation_texts": TEXTS}, {"recipe": "careful"}),
    ],
)
def test_what_nothing_uses_is_told(tmp_path, given, used, recwarn):
    (name,) = given
    EditConfig(str(tmp_path), **given, **used)
    assert not [one for one in recwarn if "nothing that uses it is on" in str(one.message)]
    with pytest.warns(
        UserWarning, match=f"`{name}` is given, and nothing that uses it is on: give a recipe that does"
    ):
        EditConfig(str(tmp_path), **given)


def test_texts_are_lines_or_paragraphs(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\ufeffOne.\nTwo.\n\n", encoding="utf-8")
    assert read_texts(str(path), "preservation_texts") == ["One.", "Two."]
    path.write_text("One.\nStill one.\n\n\nTwo.\n")
    assert read_texts(str(path), "preservation_texts") == ["One.\nStill one.", "Two."]
    assert read_texts(str(path), "preservation_prompts") == ["One.", "Still one.", "Two."]
    path.write_text("\n")
    with pytest.raises(ValueError, match="which is empty, expected at least one text"):
        read_texts(str(path), "preservation_texts")
    with pytest.raises(ValueError, match="`preservation_prompts` is '.*none.txt', which cannot be read"):
        read_texts(str(tmp_path / "none.txt"), "preservation_prompts")


def test_texts_may_be_a_path_or_a_tuple(tmp_path):
    args = EditConfig(output_dir=str(tmp_path), preservation_texts=tmp_path / "t.txt", preservation_prompts=("Why?",))
    assert (args.preservation_texts, args.preservation_prompts) == (str(tmp_path / "t.txt"), ["Why?"])


def test_a_prompt_of_marks_alone_stays(make_trainer):
    make_trainer(kl_weight=1.0, num_train_epochs=1, **KEPT | {"preservation_prompts": ["Why?", "???"]}).train()


@pytest.mark.parametrize("named", ["run/preservation", "run"])
def test_what_the_arguments_name_in_the_output_folder_is_kept(make_trainer, tmp_path, named):
    folder = tmp_path / "run" / "preservation"
    InputStatistics({"model.layers.1.mlp.down_proj": torch.eye(128)}, 1).save(folder)
    OutputStatistics({"model.layers.1.mlp.down_proj": torch.eye(64)}, 1).save(folder)
    (folder / "questions.txt").write_text("\n".join(QUESTIONS))
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    given = {"statistics": str(tmp_path / named), "preservation_prompts": str(folder / "questions.txt")}
    make_trainer(projector=0.1, output_projector=0.1, kl_weight=1.0, num_train_epochs=1, **KEPT | given).train()
    assert {name: (folder / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize(
    "changed", [{"preservation_texts": ["Another text."]}, {"preservation_prompts": ["Why?"]}, {"contexts": 1}]
)
def test_resuming_with_other_texts_is_refused(make_trainer, tmp_path, changed):
    settings = {"kl_weight": 1.0, "contexts": 2, "save_strategy": "epoch", **KEPT}
    make_trainer(num_train_epochs=3, stop_loss=0, **settings).train()
    make_trainer(num_train_epochs=4, stop_loss=0, **settings).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError) as raised:
        make_trainer(num_train_epochs=5, stop_loss=0, **settings | changed).train(resume_from_checkpoint=True)
    assert str(raised.value) == (
        f"the run in {tmp_path / 'run'} was begun with other '{next(iter(changed))}' than given now: resume with the same, or "
        "start a new run in another folder"
    )
