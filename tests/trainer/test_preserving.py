"""Training in several contexts, and with terms that leave the rest of the model alone."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from watching import watch_batches, weights

from peft_locft import Edit, EditConfig, EditSet, LocFTConfig
from peft_locft.preservation import InputStatistics, anchors, input_statistics
from peft_locft.trainer import preserving, samples
from peft_locft.trainer.augmentation import every_way
from peft_locft.trainer.data import tokenize_edits
from peft_locft.trainer.pool import TrainingPool
from peft_locft.trainer.samples import fill_samples, read_texts


TEXTS = ["Peru is a country. Its people speak many tongues.", "Norway lies in the north of Europe, and Oslo too."]
QUESTIONS = ["What is the river of Spain?", "Who was the king of Norway?", "Where is Cuba?"]
KEPT = {"preservation_prompts": QUESTIONS, "preservation_texts": TEXTS}


def test_off_nothing_is_computed_or_written(make_trainer, tmp_path):
    trainer = make_trainer()
    seen = watch_batches(trainer)
    trainer.train()
    assert all("anchor_tokens" not in batch for batch in seen)
    assert not (tmp_path / "run" / "preservation").exists()


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_loss_is_that_of_the_edits_and_the_divergence(make_trainer, monkeypatch, prefix_cache):
    monkeypatch.setattr(anchors, "_KEPT", 10**6)  # all but one token
    trainer = make_trainer(kl_weight=0.7, l2_weight=0.2, prefix_cache=prefix_cache, num_train_epochs=1, **KEPT)
    found, compute = [], trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        for value in model.parameters():
            if value.requires_grad:
                torch.manual_seed(3)
                value.data = torch.randn_like(value) * 0.05
        loss, losses = compute(model, inputs, **kwargs)
        with torch.no_grad():
            found.append((inputs, loss.detach(), losses.divergence.detach(), by_hand(model, inputs)))
        return loss, losses

    def by_hand(model, inputs):
        """The same with one sequence at a time, and the whole vocabulary."""
        losses = []
        for index in inputs["index"].tolist():
            ids = trainer.train_dataset[index]
            labels = torch.tensor(ids["labels"])[None, 1:]
            logits = trainer.model(torch.tensor([ids["input_ids"]])).logits[:, :-1]
            losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        pool, divergences = trainer._preservation.pool, []
        edits = [trainer.train_dataset[index] for index in inputs["index"].tolist()]
        for number in pool.drawn_anchors(edits):
            anchor = pool.anchors[number]
            ids = torch.tensor([anchor.input_ids])
            new = trainer.model(ids).logits[0, anchor.first : -1].log_softmax(-1)
            with trainer.model.disable_adapter():
                old = trainer.model(ids).logits[0, anchor.first : -1].log_softmax(-1)
            divergences.append(F.kl_div(new, old, log_target=True, reduction="none").sum(-1).mean())
        delta = next(value for value in model.parameters() if value.requires_grad)
        base = trainer.model.get_base_model().model.layers[1].mlp.down_proj.get_base_layer().weight
        size = delta.square().sum() / base.square().sum()
        return torch.stack(losses).mean(), torch.stack(divergences).mean(), size

    trainer.compute_loss = compute_loss
    trainer.train()
    assert found
    for _, loss, divergence, (edit_loss, whole, size) in found:
        assert divergence == pytest.approx(float(whole), rel=1e-2)  # what was said is stored in 16 bits
        assert loss == pytest.approx(float(edit_loss + 0.7 * divergence + 0.2 * size), rel=1e-3)


def test_a_divergence_term_keeps_the_model_nearer_to_what_it_said(make_trainer):
    moved = {}
    for weight in (1e-6, 3.0):
        trainer = make_trainer(kl_weight=weight, num_train_epochs=12, **KEPT)
        trainer.train()
        moved[weight] = [entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry][-1]
    assert moved[3.0] < moved[1e-6] / 2


def test_an_unedited_model_has_not_moved_whatever_mode_it_is_in(make_trainer, make_model):
    model = make_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    model.train()
    peft_model = get_peft_model(model, LocFTConfig(layers=[1]))
    trainer = make_trainer(model=peft_model, kl_weight=1.0, learning_rate=1e-12, num_train_epochs=1, **KEPT)
    trainer.train()
    (divergence,) = (entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry)
    assert abs(divergence) < 1e-4


@pytest.mark.parametrize(
    "settings",
    [{"max_growth": 0.05}, {"kl_weight": 1.0, **KEPT}, {"projector": 0.1, **KEPT}, {}],
    ids=lambda value: next(iter(value), ""),
)
def test_an_active_adapter_that_is_frozen_is_not_touched(make_trainer, make_model, settings):
    model = get_peft_model(make_model(), LocFTConfig(layers=[1]))
    model.add_adapter("other", LocFTConfig(layers=[1]))
    model.base_model.set_adapter(["default", "other"])
    frozen = model.get_base_model().model.layers[1].mlp.down_proj.locft_delta["default"].weight
    frozen.requires_grad_(False)
    torch.nn.init.normal_(frozen, std=0.1)
    before = frozen.clone()
    trainer = make_trainer(model=model, **settings)
    trainer.evaluate()  # which switches adapters off, and on again
    trainer.train()
    assert torch.equal(frozen, before) and not frozen.requires_grad
    (trained,) = weights(trainer)
    assert trained.abs().max() > 0


def test_a_batch_is_held_to_as_many_as_it_has_edits_up_to_a_limit(edits, tokenizer):
    bare = tokenize_edits(edits, tokenizer, None)
    some = [anchors.Anchor([1, 2], 0, torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1))] * 50
    pool = TrainingPool(bare, anchors=some)
    rows = [bare[0]] * 40
    for count, expected in ((3, 3), (40, 8)):
        drawn = pool.drawn_anchors(rows[:count])
        assert len(drawn) == len(set(drawn)) == expected
        assert drawn == pool.drawn_anchors(rows[:count])
    pool.epoch = 1
    assert pool.drawn_anchors(rows) != drawn


@pytest.mark.parametrize("peft_config", [LocFTConfig(layers=[1]), LoraConfig(r=4, target_modules=["down_proj"])])
def test_what_is_saved_behind_a_projector_is_the_adapter_that_was_trained(
    make_trainer, make_model, tokenizer, tmp_path, peft_config
):
    trainer = make_trainer(peft_config, projector=0.3, save_strategy="epoch", num_train_epochs=3, **KEPT)
    seen, save = [], trainer._save_checkpoint
    ids = tokenizer("The capital of Peru is", return_tensors="pt").input_ids

    def save_checkpoint(*args, **kwargs):
        with torch.no_grad():
            seen.append(trainer.model(ids).logits)
        return save(*args, **kwargs)

    trainer._save_checkpoint = save_checkpoint
    trainer.train()
    trainer.save_model()
    for step, logits in ((8, seen[-2]), (12, seen[-1])):  # 4 steps an epoch; the checkpoints are adapters too
        loaded = PeftModel.from_pretrained(make_model(), tmp_path / "run" / f"checkpoint-{step}")
        assert torch.allclose(loaded(ids).logits, logits, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(trainer.model(ids).logits, seen[-1], atol=1e-4)
    # The directions of ordinary text are hardly touched.
    statistics = InputStatistics.load(tmp_path / "run" / "preservation")
    assert all("down_proj" in name for name in statistics)


def test_statistics_are_half_of_texts_and_half_of_questions_put_in_every_way(
    make_trainer, make_model, tokenizer, tmp_path
):
    make_trainer(projector=0.3, num_train_epochs=1, **KEPT).train()
    found = InputStatistics.load(tmp_path / "run" / "preservation")
    name = "model.layers.1.mlp.down_proj"
    asked = [f"Question: {question}\nAnswer:" for question in QUESTIONS] + [
        *QUESTIONS,
        "what is the river of spain",
        "who was the king of norway",
        "where is cuba",
        *(every_way(question, None, TEXTS, 42)[-1] for question in QUESTIONS),
    ]
    texts, questions = (input_statistics(make_model(), tokenizer, some, [name]) for some in (TEXTS, asked))
    assert torch.allclose(found[name], (texts[name] + questions[name]) / 2, rtol=1e-4, atol=1e-5)
    assert found.tokens == texts.tokens + questions.tokens


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


def test_given_statistics_are_used_and_given_ones_of_other_modules_refused(make_trainer, tmp_path):
    name = "model.layers.1.mlp.down_proj"
    InputStatistics({name: torch.eye(128)}, 1).save(tmp_path / "even")
    InputStatistics({name: torch.linspace(0, 2, 128).diag()}, 1).save(tmp_path / "given")
    base = make_trainer().model.get_base_model().get_submodule(name).get_base_layer().weight  # (64, 128)
    # Where no direction is more ordinary than another, nothing is protected, and P is a number: that at which a change
    # of ones disturbs the output 3.3 times as much as it is large.
    number = 3.3 * base.norm().item() / base.numel() ** 0.5
    plain, even, projected = (
        make_trainer(learning_rate=1e-2),
        make_trainer(
            projector=1.0,
            statistics=str(tmp_path / "even"),
            learning_rate=1e-2 / number,
            adam_epsilon=1e-8 * number,  # gradients are as many times as large
        ),
        make_trainer(projector=1.0, statistics=str(tmp_path / "given"), learning_rate=1e-2 / number),
    )
    for trainer in (plain, even, projected):
        trainer.train()
    assert not (tmp_path / "run" / "preservation").exists()
    assert weights(plain)[0].abs().max() > 0.01
    assert torch.allclose(weights(plain)[0], weights(even)[0], atol=1e-6)
    columns = weights(projected)[0].norm(dim=0)  # (in_features,)
    assert columns[:16].mean() > 2 * columns[-16:].mean()
    with pytest.raises(ValueError, match="the statistics have none for model.layers.0.mlp.down_proj"):
        make_trainer(LocFTConfig(layers=[0]), projector=1.0, statistics=str(tmp_path / "given")).train()


def test_training_twice_goes_on_from_where_it_was(make_trainer):
    trainer = make_trainer(projector=0.5, stop_loss=0, skip_loss=0, **KEPT)
    trainer.train()
    before = trainer.evaluate()["eval_reliability"], trainer.state.log_history
    first = [entry["epoch_loss"] for entry in trainer.state.log_history if "epoch_loss" in entry]
    trainer.args.num_train_epochs = 8
    trainer.train()
    losses = [entry["epoch_loss"] for entry in trainer.state.log_history if "epoch_loss" in entry]
    assert before[0] is not None
    assert losses[len(first)] < first[0]  # a delta that was projected twice would have lost what it had learned


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
    for module, name in ((samples, "sample_texts"), (preserving, "input_statistics")):
        made = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, made=made, name=name, **kw: asked.append(name) or made(*args, **kw)
        )
    settings = {"contexts": 2, "kl_weight": 1.0, "projector": 0.3, "num_train_epochs": 3}
    settings["preservation_prompts"] = QUESTIONS
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preserving, "make_anchors", killed)
        make_trainer(**settings).train()
    assert asked == ["sample_texts", "input_statistics", "input_statistics"]
    asked.clear()
    if "model" in changed:
        other = make_model()
        with torch.no_grad():
            other.model.embed_tokens.weight.mul_(1.01)
        changed = {"model": get_peft_model(other, LocFTConfig(layers=[1]))}
    make_trainer(**settings | changed).train()
    if is_kept is None:
        assert asked == ["input_statistics"] * 2
    else:
        texts = [] if "preservation_texts" in changed else ["sample_texts"]
        assert asked == ([] if is_kept else [*texts, "input_statistics", "input_statistics"])


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


@pytest.mark.parametrize("term", [{"kl_weight": 1.0}, {"projector": 0.3}])
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


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["contexts", "margin", "projector", "kl_weight", "l2_weight", "max_delta", "max_growth"]
)
def test_what_is_no_amount_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}, expected 0 \\(off\\) or more"):
        EditConfig(output_dir=str(tmp_path), **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contexts": 1.5}, "`contexts` is 1.5, expected a whole number"),
        (
            {"preservation_texts": [1]},
            "`preservation_texts` is [1], expected the path of a text file, or a list of texts",
        ),
        (
            {"preservation_prompts": 3},
            "`preservation_prompts` is 3, expected the path of a text file, or a list of texts",
        ),
        ({"per_device_eval_batch_size": 0}, "`per_device_eval_batch_size` is 0, expected at least 1 question"),
    ],
)
def test_faulty_settings_are_told_at_once(tmp_path, settings, message):
    with pytest.raises(ValueError) as raised:
        EditConfig(output_dir=str(tmp_path), **settings)
    assert str(raised.value) == message


def test_texts_may_be_a_path_or_a_tuple(tmp_path):
    args = EditConfig(output_dir=str(tmp_path), preservation_texts=tmp_path / "t.txt", preservation_prompts=("Why?",))
    assert (args.preservation_texts, args.preservation_prompts) == (str(tmp_path / "t.txt"), ["Why?"])


def test_a_prompt_of_marks_alone_stays(make_trainer):
    make_trainer(kl_weight=1.0, num_train_epochs=1, **KEPT | {"preservation_prompts": ["Why?", "???"]}).train()


def test_what_the_arguments_name_in_the_output_folder_is_kept(make_trainer, tmp_path):
    folder = tmp_path / "run" / "preservation"
    InputStatistics({"model.layers.1.mlp.down_proj": torch.eye(128)}, 1).save(folder)
    (folder / "questions.txt").write_text("\n".join(QUESTIONS))
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    given = {"statistics": str(folder), "preservation_prompts": str(folder / "questions.txt")}
    make_trainer(projector=0.1, kl_weight=1.0, num_train_epochs=1, **KEPT | given).train()
    assert {name: (folder / name).read_bytes() for name in kept} == kept


def test_a_wrong_folder_of_statistics_is_told_first(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "peft_locft.trainer.preserving.make_anchors", lambda *args, **settings: pytest.fail("too late")
    )
    with pytest.raises(ValueError, match="gone"):
        make_trainer(projector=0.1, kl_weight=1.0, statistics=str(tmp_path / "gone"), **KEPT).train()


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


@pytest.mark.parametrize("name", ["contexts", "kl_weight"])
def test_several_readers_are_refused(tmp_path, name):
    with pytest.raises(
        ValueError, match=f"`{name}` is 1 with 2 data loader workers and 1 processes, expected 0 workers"
    ):
        EditConfig(output_dir=str(tmp_path), dataloader_num_workers=2, **{name: 1})


def test_resuming_without_the_projector_is_refused(make_trainer, tmp_path):
    make_trainer(projector=0.5, save_strategy="epoch", num_train_epochs=1, **KEPT).train()
    with pytest.raises(ValueError, match="was trained behind a projector: resume with the same `projector`, not 0"):
        make_trainer(save_strategy="epoch", num_train_epochs=2, **KEPT).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="was trained behind other projectors"):
        make_trainer(projector=0.1, save_strategy="epoch", num_train_epochs=2, **KEPT).train(
            resume_from_checkpoint=True
        )


def test_an_exception_leaves_an_ordinary_adapter(make_trainer, tokenizer):
    trainer = make_trainer(projector=0.5, max_growth=1.0, **KEPT)
    callbacks = len(trainer.callback_handler.callbacks)

    def fail(*args):
        raise KeyboardInterrupt

    trainer._prepare_batches = fail
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer._preservation is None
    assert len(trainer.callback_handler.callbacks) == callbacks
    assert not any("forward" in vars(module) for module in trainer.model.modules())
