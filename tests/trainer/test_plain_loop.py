"""The trainer against a plain loop that shares no code with it: left padding, full forward, full logits, its own mask."""

import pytest
import torch

from peft_locft import EditConfig, EditTrainer, LocFTConfig, load_edits


EXAMPLES = "examples/edits.jsonl"


def plain_loop(model, tokenizer, weight, batches, rate, skip_loss, width):
    """Fine-tune one weight of an ordinary model on batches of (prompt, target); return the epochs' mean losses."""
    model.requires_grad_(False)
    weight.requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=rate)
    losses = []
    for epoch in batches:
        total, count = 0.0, 0
        for batch in epoch:
            ids, masks, targets = [], [], []
            for prompt, target in batch:
                start = len(tokenizer(prompt)["input_ids"])
                tokens = tokenizer(f"{prompt} {target}")["input_ids"] + [tokenizer.eos_token_id]
                pad = width - len(tokens)
                ids.append([tokenizer.eos_token_id] * pad + tokens)
                masks.append([0] * pad + [1] * len(tokens))
                targets.append([0] * (pad + start) + [1] * (len(tokens) - start))
            ids, masks, targets = torch.tensor(ids), torch.tensor(masks), torch.tensor(targets)
            positions = (masks.cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=masks, position_ids=positions).logits  # (batch, width, vocab)
            log_probs = logits[:, :-1].log_softmax(-1)
            picked = log_probs.gather(2, ids[:, 1:, None])[..., 0]  # (batch, width - 1)
            mask = targets[:, 1:]
            per_edit = -(picked * mask).sum(1) / mask.sum(1)
            loss = per_edit.mean()
            if loss.item() >= skip_loss:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total, count = total + per_edit.sum().item(), count + len(batch)
        losses.append(total / count)
    return losses


@pytest.fixture
def record_batches(monkeypatch):
    """Record the token rows of each training batch, by epoch."""
    seen = []
    original = EditTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        seen.append((int(self.state.epoch or 0), inputs["input_ids"].tolist(), inputs["position_ids"].tolist()))
        return original(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(EditTrainer, "training_step", training_step)
    return seen


def epochs_of(seen, tokenizer, edits):
    """The recorded batches as (prompt, target) pairs, told apart by their tokens."""
    known = {
        tuple(tokenizer(f"{edit.prompt} {edit.target}")["input_ids"] + [tokenizer.eos_token_id]): edit
        for edit in edits
    }
    epochs = {}
    for epoch, ids, positions in seen:
        pieces = []  # several edits share a row: each begins at position 0, and so does each pad
        for token, position in ((t, p) for row in zip(ids, positions) for t, p in zip(*row)):
            if position == 0:
                pieces.append([])
            pieces[-1].append(token)
        batch = [known[tuple(piece)] for piece in pieces if len(piece) > 1]
        epochs.setdefault(epoch, []).append([(edit.prompt, edit.target) for edit in batch])
    return list(epochs.values())


def test_epoch_losses_and_weight_equal_those_of_a_plain_loop_on_the_real_model(
    smollm, smollm_folder, record_batches, tmp_path
):
    model, tokenizer = smollm
    edits = load_edits(EXAMPLES)[:30]
    trainer = EditTrainer(
        model=model,
        args=EditConfig(output_dir=str(tmp_path), num_train_epochs=3, save_strategy="no", disable_tqdm=True),
        train_dataset=edits,
        processing_class=tokenizer,
        peft_config=LocFTConfig(layers=[22], target_modules=["mlp.down_proj"]),
    )
    trainer.train()
    losses = [entry["epoch_loss"] for entry in trainer.state.log_history if "epoch_loss" in entry]
    epochs = epochs_of(record_batches, tokenizer, edits)
    edited = trainer.model.merge_and_unload().model.layers[22].mlp.down_proj.weight.detach().clone()

    plain = type(model).from_pretrained(smollm_folder)
    weight = plain.model.layers[22].mlp.down_proj.weight
    expected = plain_loop(plain, tokenizer, weight, epochs, trainer.args.learning_rate, skip_loss=0.01, width=48)

    assert trainer.args.learning_rate == pytest.approx(5e-4 * 14336 / 1536)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[0] - losses[2] > 1  # it did learn: equal numbers of a loop that stands still would prove nothing
    # Adam divides tiny gradients by their own size, so single weights may differ by rounding; the delta may not.
    untouched = type(model).from_pretrained(smollm_folder).model.layers[22].mlp.down_proj.weight.detach()
    assert (edited - weight.detach()).norm() < 0.01 * (weight.detach() - untouched).norm()


def test_breadth_first_every_epoch_visits_every_edit_once_in_another_order(
    make_model, tokenizer, edits, record_batches, tmp_path
):
    trainer = EditTrainer(
        model=make_model(),
        args=EditConfig(output_dir=str(tmp_path), num_train_epochs=4, save_strategy="no", disable_tqdm=True),
        train_dataset=edits,
        processing_class=tokenizer,
    )
    trainer.train()
    epochs = epochs_of(record_batches, tokenizer, edits)
    orders = [[prompt for batch in epoch for prompt, _ in batch] for epoch in epochs]
    assert len(orders) == 4
    assert all(sorted(order) == sorted(edit.prompt for edit in edits) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert all(len(epoch) == 4 for epoch in epochs)  # 8 edits in automatic batches of 2


@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulated_micro_batches_train_as_one_batch(make_model, tokenizer, edits, tmp_path, accumulation):
    def run(name, size, steps):
        trainer = EditTrainer(
            model=make_model(),
            args=EditConfig(
                output_dir=str(tmp_path / name),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                num_train_epochs=6,
                learning_rate=0.02,
                save_strategy="no",
                disable_tqdm=True,
            ),
            # 7 edits: the last micro-batch of an epoch is smaller than the others.
            train_dataset=edits[:7],
            processing_class=tokenizer,
        )
        trainer.train()
        delta = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
        return delta.detach(), [e["epoch_loss"] for e in trainer.state.log_history if "epoch_loss" in e]

    whole, whole_losses = run("whole", 2 * accumulation, 1)
    parts, part_losses = run("parts", 2, accumulation)
    assert part_losses == pytest.approx(whole_losses, abs=1e-4)
    assert torch.allclose(parts, whole, atol=1e-3)
    assert whole.abs().max() > 0.02


def test_a_batch_with_a_small_loss_makes_no_step_and_a_small_epoch_stops_the_run(
    make_model, tokenizer, edits, tmp_path
):
    def run(name, **settings):
        trainer = EditTrainer(
            model=make_model(),
            args=EditConfig(output_dir=str(tmp_path / name), num_train_epochs=5, disable_tqdm=True, **settings),
            train_dataset=edits,
            processing_class=tokenizer,
        )
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "epoch_loss" in entry]
        delta = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
        return trainer, history, delta

    _, history, delta = run("skipping", skip_loss=100, stop_loss=0)
    assert len(history) == 5 and not delta.any()
    assert [entry["batches_skipped"] for entry in history] == [4] * 5
    losses = [entry["epoch_loss"] for entry in history]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-6)  # nothing moved (but sums round differently)

    trainer, history, delta = run("stopping", skip_loss=0, stop_loss=100, save_strategy="steps", save_steps=1000)
    assert len(history) == 1 and delta.any()
    assert [path.name for path in (tmp_path / "stopping").iterdir()] == ["checkpoint-4"]  # the stop left a checkpoint


def test_a_skipped_batch_in_between_does_not_move_weights_through_adams_momentum(
    make_model, tokenizer, edits, tmp_path
):
    trainer = EditTrainer(
        model=make_model(),
        args=EditConfig(output_dir=str(tmp_path), num_train_epochs=2, save_strategy="no", disable_tqdm=True),
        train_dataset=edits,
        processing_class=tokenizer,
    )
    delta = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    snapshots = []
    original = trainer.training_step

    def training_step(*args, **kwargs):
        snapshots.append(delta.detach().clone())
        trainer.args.skip_loss = 100 if len(snapshots) == 5 else 0
        return original(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    moved = [not torch.equal(a, b) for a, b in zip(snapshots, snapshots[1:])]
    assert moved == [True, True, True, True, False, True, True]


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another_one(make_model, tokenizer, edits, tmp_path):
    def run(name, seed):
        trainer = EditTrainer(
            model=make_model(),
            args=EditConfig(
                output_dir=str(tmp_path / name), seed=seed, num_train_epochs=3, save_strategy="no", disable_tqdm=True
            ),
            train_dataset=edits,
            processing_class=tokenizer,
        )
        if name == "b":
            torch.rand(7)  # what was drawn before must not matter
            trainer.evaluate()
        trainer.train()
        return next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad).detach()

    first, second, other = run("a", 1), run("b", 1), run("c", 2)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_dropout_of_the_frozen_model_is_off_and_that_of_the_adapter_on(make_model, tokenizer, edits, tmp_path):
    from peft import LoraConfig

    trainer = EditTrainer(
        model=make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
        args=EditConfig(output_dir=str(tmp_path), num_train_epochs=1, save_strategy="no", disable_tqdm=True),
        train_dataset=edits,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, lora_dropout=0.5, target_modules=["c_proj"], fan_in_fan_out=True),
    )
    trainer.train()
    active = {name for name, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout) and m.training}
    assert active and all(".lora_dropout." in name for name in active)
