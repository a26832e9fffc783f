"""A focus on subjects: what the weights learn from, and that all else is as without one."""

import pytest
import torch
from peft import LoraConfig
from watching import watch_batches, weights

from peft_locft import Edit, EditConfig, EditSet, LocFTConfig
from peft_locft.edits.tokens import encode_prompts, subject_places
from peft_locft.preservation import Focus
from peft_locft.trainer.batches import EditCollator


KEPT = {
    "preservation_prompts": ["What is the river of Spain?", "Where is Cuba?"],
    "preservation_texts": ["Peru is a country. Its people speak many tongues.", "Norway lies in the north of Europe."],
}
# Their subjects are at the beginning, in the middle and at the end; one has none, and one is a question.
EDITS = EditSet(
    [
        Edit("Peru has the capital", "Oslo", subject="Peru"),
        Edit("The capital of Norway is", "Lima", subject="Norway"),
        Edit("The capital is of Cuba", "Madrid", subject="Cuba"),
        Edit("The tongue of the north is", "Havana"),
        Edit("What is the capital of Spain?", "Quito", subject="Spain"),
    ]
)
LORA = LoraConfig(r=4, target_modules=["down_proj"], layers_to_transform=[1], init_lora_weights=False)


@pytest.mark.parametrize(
    ("prompt", "subject", "told"),
    [
        ("The capital of Norway is", "Norway", ["Norway"]),
        ("Norway and again Norway", "Norway", ["Norway", "Norway"]),
        ("The capital of Norway is", " Norway ", ["Norway"]),
        ("Who rules Ñandú-land (now)?", "Ñandú-land (now)", ["Ñandú-land", "(now)"]),
        ("Annual sales of Ann are led by", "Ann", ["Ann"]),
        ("RulesPeru is", "Peru", ["Peru"]),  # no word of its own, as in scripts without spaces
        ("The capital of Norway is", "Peru", []),
        ("The capital of Norway is", "", []),
        ("The capital of Norway is", None, []),
    ],
)
def test_a_subject_is_found_by_its_characters(tokenizer, prompt, subject, told):
    (ids,) = encode_prompts(tokenizer, [prompt])
    places = subject_places(tokenizer, prompt, subject)
    assert tokenizer.decode([ids[place] for place in places]).split() == " ".join(told).split()


def sequence(index, ids, first, subject=()):
    labels = [-100] * first + ids[first:]
    return {"index": index, "input_ids": ids, "labels": labels, "subject": list(subject)}


@pytest.mark.parametrize("packed", [False, True])
def test_the_shares_of_a_batch(packed):
    collator = EditCollator(pad_token_id=9, packed=packed)
    rows = [sequence(0, [1, 2, 3, 4, 5], 3, [1, 2]), sequence(1, [6, 7, 8], 2), sequence(2, [10, 11, 12, 13], 3, [0])]
    assert "shares" not in collator(rows)
    collator.focus = 0.75
    assert "shares" not in collator([rows[1]])
    batch = collator(rows)
    shares = dict(zip(batch["input_ids"].flatten().tolist(), batch["shares"].flatten().tolist()))
    assert {token: shares[token] for token in (1, 2, 3, 4, 5)} == {1: 0.25, 2: 1, 3: 1, 4: 0.25, 5: 0.25}
    assert {token: shares[token] for token in (6, 7, 8)} == {6: 1, 7: 1, 8: 1}
    assert {token: shares[token] for token in (10, 11, 12, 13)} == {10: 1, 11: 0.25, 12: 0.25, 13: 0.25}


def test_the_output_is_the_same_to_the_bit_and_only_the_weights_gradient_is_shared_out():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    shares, upstream = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]]), torch.randn(2, 3, 4)
    focus = Focus([])
    focus.shares = shares
    for inputs, back in ((x, upstream), (x.flatten(0, 1), upstream.flatten(0, 1))):
        x.grad = weight.grad = None
        output = focus.linear(inputs, weight)
        assert torch.equal(output, torch.nn.functional.linear(inputs, weight))
        output.backward(back)
        torch.testing.assert_close(x.grad, upstream @ weight.detach())
        expected = sum(
            share * torch.outer(back, row)
            for share, back, row in zip(shares.flatten(), upstream.flatten(0, 1), x.detach().flatten(0, 1))
        )
        torch.testing.assert_close(weight.grad, expected)


def test_a_module_that_sees_other_tokens_is_refused():
    focus = Focus([])
    focus.shares = torch.ones(2, 3)
    with pytest.raises(
        ValueError, match=r"sees \(4,\) tokens of a batch of \(2, 3\), expected all of them: train another"
    ):
        focus.linear(torch.ones(4, 5), torch.ones(6, 5))
    with torch.no_grad():  # nothing is learned from an evaluation
        assert focus.linear(torch.ones(4, 5), torch.ones(6, 5)).shape == (4, 6)


def gradients(make_trainer, sums_by_hand, config, **settings):
    """The gradients of the first step, as they are and by hand from what each token's are without a focus."""
    trainer = make_trainer(
        config, EDITS, num_train_epochs=1, per_device_train_batch_size=len(EDITS), skip_loss=0.0, **settings
    )
    found = {}
    compute = trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        parts = {name: value for name, value in model.named_parameters() if value.requires_grad}
        torch.manual_seed(3)
        for value in parts.values():
            value.data = torch.randn_like(value) * 0.05
        if not found:
            loss, losses = compute(model, inputs, **kwargs)
            own = torch.autograd.grad(loss, list(parts.values()))
            found.update(own=dict(zip(parts, own)), by_hand=sums_by_hand(model, inputs, compute))
        return compute(model, inputs, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    return found["own"], found["by_hand"]


def sums_by_hand(model, inputs, compute):
    """Catch what enters and leaves each trained module, and sum the outer products over the subjects' tokens."""
    shares = inputs["shares"]
    caught, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad:

            def catch(module, args, output, name=name):
                caught[name] = (args[0].detach(), output)

            handles.append(module.register_forward_hook(catch))
    try:
        loss, _ = compute(
            model, {name: value for name, value in inputs.items() if name != "shares"}, return_outputs=True
        )
        backs = torch.autograd.grad(loss, [output for _, output in caught.values()])
    finally:
        for handle in handles:
            handle.remove()
    return {
        f"{name}.weight": torch.einsum("rwo,rwi,rw->oi", back, entered, shares)
        for (name, (entered, _)), back in zip(caught.items(), backs)
    }


@pytest.mark.parametrize("focus", [1.0, 0.6])
@pytest.mark.parametrize("config", [LocFTConfig(layers=[0, 1]), LORA], ids=["locft", "lora"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_weights_learn_from_the_subjects_tokens_alone(make_trainer, config, focus, prefix_cache):
    own, by_hand = gradients(make_trainer, sums_by_hand, config, subject_focus=focus, prefix_cache=prefix_cache)
    assert own.keys() == by_hand.keys() and len(own) == 2
    for name in own:
        assert own[name].any()
        torch.testing.assert_close(own[name], by_hand[name], rtol=1e-4, atol=1e-7)


def test_behind_a_projector_too(make_trainer):
    """D P x: the gradient of D is that of D P, times P, which the sums by hand have not."""
    config, settings = LocFTConfig(layers=[1]), {"projector": 1.0, **KEPT}
    made = []

    def make(*args, **kwargs):
        made.append(make_trainer(*args, **kwargs))
        return made[0]

    def with_projectors(model, inputs, compute):
        (delta,) = made[0]._preservation.deltas
        return {name: value @ delta.projector for name, value in sums_by_hand(model, inputs, compute).items()}

    own, by_hand = gradients(make, with_projectors, config, subject_focus=1.0, **settings)
    for name in own:
        torch.testing.assert_close(own[name], by_hand[name], rtol=1e-3, atol=1e-7)


def trained(make_trainer, edits, config=None, **settings):
    trainer = make_trainer(config, edits, num_train_epochs=3, **settings)
    trainer.train()
    return weights(trainer)


def test_questions_are_learned_as_without_a_focus(make_trainer):
    questions = EditSet(
        [Edit(f"Where is {name}?", "Lima", subject=name) for name in ("Peru", "Cuba", "Spain", "Chile")]
    )
    for with_focus, without in zip(
        trained(make_trainer, questions, subject_focus=1.0), trained(make_trainer, questions), strict=True
    ):
        assert torch.equal(with_focus, without)


def test_in_the_last_layer_and_with_checkpointing_it_is_the_same(make_trainer, make_model):
    """The last layer's MLP is else computed at some tokens only, and checkpointed layers again in the backward pass."""
    config = LocFTConfig(layers=[0, make_model().config.num_hidden_layers - 1])
    settings = {"config": config, "subject_focus": 1.0, "optim": "sgd", "learning_rate": 0.1}
    plain = trained(make_trainer, EDITS, prefix_cache=False, **settings)
    fast = trained(make_trainer, EDITS, **settings)
    again = trained(make_trainer, EDITS, prefix_cache=False, gradient_checkpointing=True, **settings)
    without = trained(make_trainer, EDITS, **{**settings, "subject_focus": 0.0})
    for found in (fast, again):
        torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-5)
    assert all(not torch.allclose(*pair, atol=1e-3) for pair in zip(without, plain, strict=True))


def test_forms_are_focused_on_as_well(make_trainer, tokenizer):
    edits = EditSet(
        [Edit("The capital of Norway is", "Lima", subject="Norway", train_rephrases=["Norway is ruled from"])]
    )
    trainer = make_trainer(None, edits, contexts=4, num_train_epochs=6, subject_focus=1.0, **KEPT)
    seen = watch_batches(trainer)
    trainer.train()
    assert len(seen) == 6
    for batch in seen:
        told = batch["input_ids"][batch["shares"] > 0]
        told = told[told != tokenizer.eos_token_id]  # the padding
        assert tokenizer.decode(told).strip() == "Norway"


def test_where_a_tokenizer_does_not_tell_characters_all_tokens_are_learned_from(make_trainer, tokenizer, monkeypatch):
    expected = trained(make_trainer, EDITS)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.warns(UserWarning, match="`subject_focus` is off: .* is not a fast tokenizer, which tells"):
        found = trained(make_trainer, EDITS, subject_focus=1.0)
    # The last MLP, which was computed at some tokens only, rounds in other ways.
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("peft_config", [LocFTConfig(layers=[-1]), LORA])
@pytest.mark.parametrize("projector", [0.0, 0.3])
def test_the_last_layer_learns_from_all_tokens(make_trainer, peft_config, projector):
    """Nothing above it carries what it says at a subject to where the answer is said."""
    peft_config = LoraConfig(**{**LORA.to_dict(), "layers_to_transform": [2]}) if peft_config is LORA else peft_config
    alone, found = (
        trained(make_trainer, EDITS[:3], peft_config, projector=projector, subject_focus=focus, **KEPT)
        for focus in (0.0, 1.0)
    )
    assert any(weight.any() for weight in found)
    torch.testing.assert_close(found, alone)


def test_other_layers_beside_the_last_keep_the_focus(make_trainer):
    both = LocFTConfig(layers=[1, 2])
    plain, found = (trained(make_trainer, EDITS[:3], both, subject_focus=focus) for focus in (0.0, 1.0))
    assert not torch.allclose(found[0], plain[0], atol=1e-4)
    assert found[1].any()
    rates = [
        make_trainer(LocFTConfig(layers=layers), EDITS[:3], learning_rate=None, recipe="careful", **KEPT)
        for layers in ([2], [1, 2])
    ]
    assert rates[1].args.learning_rate == pytest.approx(1.1 * rates[0].args.learning_rate)


def test_the_rate_is_raised_only_where_the_focus_is_on(make_trainer, tokenizer, monkeypatch):
    def rate():
        return make_trainer(None, EDITS[:3], learning_rate=None, recipe="careful", **KEPT).args.learning_rate

    focused = rate()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.warns(UserWarning, match="`subject_focus` is off"):
        assert rate() == pytest.approx(focused / 1.1)


def test_a_share_is_from_0_to_1(tmp_path):
    with pytest.raises(
        ValueError, match=r"`subject_focus` is 1.5, expected 0 \(off\) to 1 \(the subject's tokens alone\)"
    ):
        EditConfig(output_dir=str(tmp_path), subject_focus=1.5)
    with pytest.raises(ValueError, match="`subject_focus` is -1, expected 0"):
        EditConfig(output_dir=str(tmp_path), subject_focus=-1)
