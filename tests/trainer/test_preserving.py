"""Training in several contexts, and with terms that leave the rest of the model alone."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from preserved import KEPT, QUESTIONS, TEXTS
from torch.nn import functional as F
from watching import watch_batches, weights

from peft_locft import EditConfig, LocFTConfig
from peft_locft.preservation import InputStatistics, OutputStatistics, anchors, input_statistics, output_statistics
from peft_locft.trainer.augmentation import every_way
from peft_locft.trainer.data import tokenize_edits
from peft_locft.trainer.pool import TrainingPool


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


@pytest.mark.parametrize(
    "sides", [{"projector": 0.3}, {"output_projector": 0.3}, {"projector": 0.3, "output_projector": 0.3}]
)
@pytest.mark.parametrize("peft_config", [LocFTConfig(layers=[1]), LoraConfig(r=4, target_modules=["down_proj"])])
def test_what_is_saved_behind_a_projector_is_the_adapter_that_was_trained(
    make_trainer, make_model, tokenizer, tmp_path, peft_config, sides
):
    trainer = make_trainer(peft_config, save_strategy="epoch", num_train_epochs=3, **sides, **KEPT)
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
    for side, kind in (("projector", InputStatistics), ("output_projector", OutputStatistics)):
        assert (tmp_path / "run" / "preservation" / kind.file_name).is_file() == (side in sides)
        if side in sides:
            assert all("down_proj" in name for name in kind.load(tmp_path / "run" / "preservation"))


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


def test_statistics_of_outputs_are_half_of_texts_and_half_of_questions(make_trainer, make_model, tokenizer, tmp_path):
    make_trainer(output_projector=0.3, num_train_epochs=1, **KEPT).train()
    found = OutputStatistics.load(tmp_path / "run" / "preservation")
    name = "model.layers.1.mlp.down_proj"
    texts, questions = (output_statistics(make_model(), tokenizer, some, [name]) for some in (TEXTS, QUESTIONS))
    assert torch.allclose(found[name], (texts[name] + questions[name]) / 2, rtol=1e-4, atol=1e-6)
    assert found.tokens == texts.tokens + questions.tokens


def test_a_folder_without_the_statistics_of_outputs_is_named(make_trainer, tmp_path):
    InputStatistics({"model.layers.1.mlp.down_proj": torch.eye(128)}, 1).save(tmp_path / "given")
    with pytest.raises(ValueError) as raised:
        make_trainer(projector=0.3, output_projector=0.3, statistics=str(tmp_path / "given"), **KEPT).train()
    assert str(raised.value) == (
        f"the folder {tmp_path / 'given'} has no output_statistics.safetensors, expected that of a run with `output_projector`, "
        "or what `OutputStatistics.save` writes: leave `statistics` out to have them computed, or turn `output_projector` off"
    )


def test_a_given_projector_of_outputs_is_what_is_trained_before(make_trainer, tmp_path):
    name = "model.layers.1.mlp.down_proj"
    OutputStatistics({name: torch.eye(64) * 3}, 1).save(tmp_path / "even")
    OutputStatistics({name: torch.linspace(0.1, 2, 64).diag()}, 1).save(tmp_path / "given")
    plain, even, projected = (
        make_trainer(learning_rate=1e-2, **settings)
        for settings in (
            {},
            {"output_projector": 1.0, "statistics": str(tmp_path / "even")},  # nothing is dearer than all else
            {"output_projector": 0.1, "statistics": str(tmp_path / "given")},
        )
    )
    for trainer in (plain, even, projected):
        trainer.train()
    assert weights(plain)[0].abs().max() > 0.01
    assert torch.allclose(weights(plain)[0], weights(even)[0], atol=1e-6)
    rows = weights(projected)[0].norm(dim=1)  # (out_features,)
    assert rows[:8].mean() > 3 * rows[-8:].mean()


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


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    ["contexts", "margin", "projector", "output_projector", "kl_weight", "l2_weight", "max_delta", "max_growth"],
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


def test_a_wrong_folder_of_statistics_is_told_first(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "peft_locft.trainer.preserving.make_anchors", lambda *args, **settings: pytest.fail("too late")
    )
    with pytest.raises(ValueError, match="gone"):
        make_trainer(projector=0.1, kl_weight=1.0, statistics=str(tmp_path / "gone"), **KEPT).train()


@pytest.mark.parametrize("name", ["contexts", "kl_weight"])
def test_several_readers_are_refused(tmp_path, name):
    with pytest.raises(
        ValueError, match=f"`{name}` is 1 with 2 data loader workers and 1 processes, expected 0 workers"
    ):
        EditConfig(output_dir=str(tmp_path), dataloader_num_workers=2, **{name: 1})


def test_resuming_without_the_projector_is_refused(make_trainer, tmp_path):
    make_trainer(projector=0.5, save_strategy="epoch", num_train_epochs=1, **KEPT).train()
    with pytest.raises(
        ValueError,
        match="was trained behind a projector: resume with the same `projector` and `output_projector`, not 0",
    ):
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


def test_decay_takes_its_part_of_the_change_that_is_there(make_trainer):
    def trained(epochs, decay=0.0):
        trainer = make_trainer(
            num_train_epochs=epochs,
            weight_decay=decay,
            per_device_train_batch_size=8,  # a step an epoch
            learning_rate=0.01,
            output=f"run{epochs}{decay}",
        )
        trainer.train()
        return weights(trainer)[0]

    first, second = trained(1), trained(2)
    assert torch.equal(trained(1, decay=20.0), first)  # nothing is there before the first step
    torch.testing.assert_close(trained(2, decay=20.0), second - 0.01 * 20 * first)
