"""Training in several contexts, and with terms that leave the rest of the model alone."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.nn import functional as F

from peft_locft import Edit, EditConfig, EditSet, EditTrainer, LocFTConfig
from peft_locft.edits.contexts import chat_form
from peft_locft.preservation import InputStatistics, anchors, input_statistics
from peft_locft.trainer.augmentation import contexts_of, drawn_form, varied
from peft_locft.trainer.data import tokenize_edits
from peft_locft.trainer.pool import TrainingPool
from peft_locft.trainer.preserving import read_texts
from peft_locft.trainer.recipes import RECIPES, TERMS, careful_layers


TEXTS = ["Peru is a country. Its people speak many tongues.", "Norway lies in the north of Europe, and Oslo too."]
QUESTIONS = ["What is the capital of Spain?", "Who was the king of Norway?", "Where is Cuba?"]
KEPT = {"preservation_prompts": QUESTIONS, "preservation_texts": TEXTS}


@pytest.fixture
def make_trainer(make_model, tokenizer, edits, tmp_path):
    def make(peft_config=None, train_dataset=edits, **settings):
        settings = {"num_train_epochs": 4, "save_strategy": "no", **settings}
        return EditTrainer(
            model=make_model(),
            args=EditConfig(output_dir=str(tmp_path / "run"), disable_tqdm=True, report_to="none", **settings),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            peft_config=peft_config or LocFTConfig(layers=[1]),
        )

    return make


def weights(trainer):
    return [value.detach().clone() for value in trainer.model.parameters() if value.requires_grad]


def watch_batches(trainer):
    seen, compute = [], trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: (
        seen.append(inputs) or compute(model, inputs, *args, **kwargs)
    )
    return seen


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


def test_a_batch_is_held_to_as_many_as_it_has_edits_up_to_a_limit(edits, tokenizer):
    bare = tokenize_edits(edits, tokenizer, None)
    some = [anchors.Anchor([1, 2], 0, torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1))] * 50
    pool = TrainingPool(bare, anchors=some)
    rows = [bare[0]] * 40
    for count, expected in ((3, 3), (40, 32)):
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
        "what is the capital of spain",
        "who was the king of norway",
        "where is cuba",
    ]
    texts, questions = (input_statistics(make_model(), tokenizer, some, [name]) for some in (TEXTS, asked))
    assert torch.allclose(found[name], (texts[name] + questions[name]) / 2, rtol=1e-4, atol=1e-5)
    assert found.tokens == texts.tokens + questions.tokens


def test_given_statistics_are_used_and_given_ones_of_other_modules_refused(make_trainer, tmp_path):
    InputStatistics({"model.layers.1.mlp.down_proj": torch.eye(128)}, 1).save(tmp_path / "given")
    plain, projected = make_trainer(), make_trainer(projector=1.0, statistics=str(tmp_path / "given"))
    plain.train()
    projected.train()
    assert not (tmp_path / "run" / "preservation").exists()
    # C = I: P = I / 2, and Adam's steps do not depend on the scale of the gradient, so the change is half as large at first.
    assert not torch.equal(weights(plain)[0], weights(projected)[0])
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


def test_an_epoch_visits_every_edit_once_in_one_of_its_forms(make_trainer, tokenizer, edits):
    rephrased = EditSet(
        Edit(edit.prompt, edit.target, train_rephrases=[f"Name the capital of {edit.subject}:"]) for edit in edits
    )
    trainer = make_trainer(train_dataset=rephrased, contexts=2, num_train_epochs=4, stop_loss=0, **KEPT)
    seen, pool = [], None
    draw = type(trainer.data_collator).__call__

    class Watched(type(trainer.data_collator)):
        def __call__(self, rows):
            nonlocal pool
            if self.pool is not None:
                pool = self.pool
                seen.extend((pool.epoch, row["index"], tokenizer.decode(pool.drawn(row)["input_ids"])) for row in rows)
            return draw(self, rows)

    trainer.data_collator.__class__ = Watched
    trainer.train()
    for epoch in range(4):
        assert sorted(index for when, index, _ in seen if when == epoch) == list(range(len(edits)))
    for index, edit in enumerate(edits):
        texts = {text for _, where, text in seen if where == index}
        assert len(texts) == 4  # each form once in as many epochs
        end = f" {edit.target}<eos>"
        assert f"{edit.prompt}{end}" in texts
        assert f"Name the capital of {edit.subject}:{end}" in texts
        assert f"Question: {edit.prompt}\nAnswer:{end}" in texts


def test_contexts_are_question_chat_prefixes_and_words_left_out(edits):
    chat = "<user>{the prompt}<model>"
    forms = contexts_of(edits[0], 8, TEXTS, chat, 0)
    assert forms[0] == "Question: The capital of Kazakhstan is\nAnswer:"
    assert forms[1] == "<user>The capital of Kazakhstan is<model>"
    for form in (forms[2], forms[6]):
        assert form.endswith(". The capital of Kazakhstan is")
        assert any(text.startswith(form.removesuffix(". The capital of Kazakhstan is")) for text in TEXTS)
    assert {*forms[3:6], forms[7]} <= {
        f"{head}Kazakhstan is" for head in ("", "The ", "capital ", "of ", "The capital ", "The of ", "capital of ")
    } | {edits[0].prompt}
    assert forms == contexts_of(edits[0], 8, TEXTS, chat, 0)
    assert contexts_of(edits[0], 1, TEXTS, chat, 0) == forms[:1]
    assert len(contexts_of(edits[0], 4, TEXTS, None, 0)) == 4


@pytest.mark.parametrize(
    ("edit", "kept"),
    [
        (
            Edit("Who wrote the play  called The Cherry Orchard?", "x", subject="The Cherry Orchard"),
            "The Cherry Orchard?",
        ),
        (Edit("In which year was the firm of Acme made", "x"), "Acme made"),  # no subject is given: names stay
        (Edit("what is the sum of 17 and one", "x"), "17 one"),
        (Edit("墨西哥的首都是哪里", "x"), "墨西哥的首都是哪里"),
    ],
    ids=["subject", "names", "numbers", "no spaces"],
)
def test_words_are_left_out_but_those_of_the_subject_and_the_last(edit, kept):
    thinned = [form for seed in range(3000) for form in contexts_of(edit, 5, TEXTS, None, seed)[2:]]
    words = edit.prompt.split()
    for form in thinned:
        left = iter(words)
        assert all(word in left for word in form.split())  # in their order
        assert all(word in form.split() for word in kept.split())
    assert any(" ".join(form.split()) == kept for form in thinned)
    assert all(any(word not in form.split() for form in thinned) for word in set(words) - set(kept.split()))


def test_questions_are_put_in_several_ways():
    assert varied(["Who is it?"] * 3, None) == ["Who is it?", "who is it", "Question: Who is it?\nAnswer:"]
    assert varied(["Who is it?"] * 5, "<{the prompt}>")[3:] == ["<Who is it?>", "Who is it?"]


def test_a_chat_template_is_used_where_there_is_one(smollm, edits):
    tokenizer = smollm[1]
    chat = contexts_of(edits[0], 2, TEXTS, chat_form(tokenizer), 0)[1]
    assert chat == tokenizer.apply_chat_template(
        [{"role": "user", "content": edits[0].prompt}], tokenize=False, add_generation_prompt=True
    )


def test_forms_come_in_turn(edits):
    for edit in range(5):
        for around in range(3):
            epochs = range(around * 4, around * 4 + 4)
            assert sorted(drawn_form(edit, 4, epoch, seed=1) for epoch in epochs) == [0, 1, 2, 3]
    assert len({tuple(drawn_form(edit, 4, epoch, seed=1) for epoch in range(4)) for edit in range(20)}) > 5


@pytest.mark.filterwarnings("ignore:.*further forms of edits")  # the tiny model takes few tokens
def test_the_models_own_samples_are_kept_and_forgotten_with_the_run(make_trainer, tmp_path):
    path = tmp_path / "run" / "preservation" / "samples.json"
    make_trainer(contexts=2, kl_weight=1.0, num_train_epochs=1).train()
    assert set(json.loads(path.read_text())) == {"chat", "questions", "texts"}
    path.write_text(json.dumps({"questions": ["of another model"], "texts": ["of another model"]}))
    make_trainer(contexts=2, kl_weight=1.0, num_train_epochs=1).train()
    assert "of another model" not in path.read_text()


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


@pytest.mark.parametrize("name", ["contexts", "projector", "kl_weight", "l2_weight", "max_delta", "max_growth"])
def test_less_than_nothing_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` is -1, expected 0 \\(off\\) or more"):
        EditConfig(output_dir=str(tmp_path), **{name: -1})


@pytest.mark.parametrize("name", ["contexts", "kl_weight"])
def test_several_readers_are_refused(tmp_path, name):
    with pytest.raises(
        ValueError, match=f"`{name}` is 1 with 2 data loader workers and 1 processes, expected 0 workers"
    ):
        EditConfig(output_dir=str(tmp_path), dataloader_num_workers=2, **{name: 1})


def test_forms_that_rest_would_be_missed(make_trainer, edits, tmp_path):
    with pytest.raises(ValueError, match="`recheck_epochs` is 2 with `contexts=3`, expected one of them"):
        EditConfig(output_dir=str(tmp_path), recheck_epochs=2, contexts=3)
    rephrased = EditSet([Edit("One is", "two", train_rephrases=["Two is"]), Edit("Three is", "four")])
    with pytest.raises(ValueError, match="`recheck_epochs` is 2 and edits have `train_rephrases`"):
        make_trainer(train_dataset=rephrased, recheck_epochs=2)


def test_forms_that_are_too_long_are_counted(make_trainer):
    long = {"preservation_texts": ["word " * 10]}
    with pytest.warns(
        UserWarning, match=r"[1-9] of 16 further forms of edits are not trained on: .* the 25 tokens that"
    ):
        make_trainer(contexts=2, max_length=25, num_train_epochs=1, **long).train()


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


@pytest.mark.parametrize("recipe", ["paper", "careful", "locaedit"])
def test_recipes_choose_place_and_terms(make_trainer, make_model, tokenizer, edits, tmp_path, recipe):
    args = EditConfig(output_dir=str(tmp_path / "run"), recipe=recipe, disable_tqdm=True, report_to="none")
    trainer = EditTrainer(make_model(), args, edits, processing_class=tokenizer)
    config = trainer.model.active_peft_config
    if recipe == "locaedit":
        assert isinstance(config, LoraConfig) and config.layers_to_transform
        assert (args.kl_weight, args.contexts) == (RECIPES[recipe]["kl_weight"], 0)
    else:
        assert isinstance(config, LocFTConfig)
        assert {name: getattr(args, name) for name in TERMS[:3]} == {name: RECIPES[recipe][name] for name in TERMS[:3]}
    if recipe == "paper":
        assert config.layers == LocFTConfig.recommended(make_model()).layers


def test_a_field_of_the_users_wins_over_the_recipe(tmp_path):
    args = EditConfig(output_dir=str(tmp_path), recipe="careful", kl_weight=0.0, num_train_epochs=3)
    assert (args.kl_weight, args.num_train_epochs, args.contexts) == (0.0, 3, RECIPES["careful"]["contexts"])


def test_an_unknown_recipe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`recipe` is 'bold', expected one of 'paper', 'careful', 'locaedit'"):
        EditConfig(output_dir=str(tmp_path), recipe="bold")


def test_the_careful_band_is_early_and_never_empty():
    assert careful_layers(30) == [4, 5, 6, 7, 8]
    for count in range(1, 100):
        layers = careful_layers(count)
        assert layers and 0 <= layers[0] and layers[-1] < max(count, 1)
