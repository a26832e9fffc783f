"""The loss against logits and arithmetic done by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft_locft.trainer.batches import EditCollator
from peft_locft.trainer.loss import edit_losses, takes_logits_to_keep


class FixedLogits(nn.Module):
    """A "model" whose logits are given, with and without `logits_to_keep`."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, use_cache, logits_to_keep=None, **inputs):
        kept = self.logits if logits_to_keep is None else self.logits[logits_to_keep]
        return SimpleNamespace(logits=kept)


@pytest.mark.parametrize("keeps_logits", [True, False])
def test_mean_over_an_edits_target_tokens_then_over_edits(keeps_logits):
    # Vocabulary of 3. Edit one: prompt [0], target [1, 2]. Edit two: prompt [0, 0], target [1], one pad.
    batch = EditCollator(pad_token_id=0)(
        [
            {"index": 0, "input_ids": [0, 1, 2], "labels": [-100, 1, 2]},
            {"index": 1, "input_ids": [0, 0, 1, 2], "labels": [-100, -100, 1, 2]},
        ]
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    logits = torch.full((2, 4, 3), 50.0)  # where no target is predicted, logits must not matter
    logits[0, 0] = torch.log(torch.tensor([0.25, 0.5, 0.25]))  # -> 1, right
    logits[0, 1] = torch.log(torch.tensor([0.5, 0.25, 0.25]))  # -> 2, wrong
    logits[1, 1] = torch.log(torch.tensor([0.1, 0.8, 0.1]))  # -> 1, right
    logits[1, 2] = torch.log(torch.tensor([0.2, 0.2, 0.6]))  # -> 2, right
    losses = edit_losses(FixedLogits(logits), batch, keeps_logits)
    assert losses.per_edit.tolist() == pytest.approx(
        [-(math.log(0.5) + math.log(0.25)) / 2, -(math.log(0.8) + math.log(0.6)) / 2]
    )
    assert losses.learned.tolist() == [False, True]


@pytest.mark.parametrize("packed", [False, True])
def test_a_margin_holds_back_the_first_token_of_each_target(packed):
    rows = [
        {"index": 0, "input_ids": [0, 1, 2], "labels": [-100, 1, 2]},
        {"index": 1, "input_ids": [0, 0, 1, 2], "labels": [-100, -100, 1, 2]},
    ]
    batch = EditCollator(0, packed)(rows)
    logits = torch.zeros(*batch["input_ids"].shape, 3)
    logits[batch["predicts"]] = torch.tensor([[2.0, 3.0, 0.0], [0.0, 0.0, 1.0], [1.0, 6.0, 0.0], [0.0, 0.0, 5.0]])
    plain, held = (edit_losses(FixedLogits(logits), batch, True, margin) for margin in (0.0, 2.5))

    def loss(*scores):  # the right one first
        return math.log(sum(map(math.exp, scores))) - scores[0]

    firsts, seconds = [(3.0, 2.0, 0.0), (6.0, 1.0, 0.0)], [(1.0, 0.0, 0.0), (5.0, 0.0, 0.0)]
    for losses, margin in ((plain, 0.0), (held, 2.5)):
        expected = [
            (loss(right - margin, *others) + loss(*second)) / 2 for (right, *others), second in zip(firsts, seconds)
        ]
        # Edits that share a row stand in another order.
        assert sorted(losses.per_edit.tolist()) == pytest.approx(sorted(expected), rel=1e-4)
        assert losses.learned.tolist() == [True, True]  # whether it is said, without the margin


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt"])
def test_target_only_logits_give_the_loss_of_all_logits(make_model, architecture):
    model = make_model(architecture)
    assert takes_logits_to_keep(model)
    torch.manual_seed(1)
    rows = [{"index": n, "input_ids": torch.randint(2, 300, (n,)).tolist(), "labels": None} for n in (5, 9, 7)]
    for row in rows:
        row["labels"] = [-100] * 3 + row["input_ids"][3:]
    batch = EditCollator(pad_token_id=0)(rows)
    kept = edit_losses(model, batch, keeps_logits=True)
    full = edit_losses(model, batch, keeps_logits=False)
    assert torch.allclose(kept.per_edit, full.per_edit, atol=1e-6)
    assert kept.per_edit.min() > 0.1


def test_gemmas_soft_capping_is_kept(make_model):
    rows = [{"index": 0, "input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}]
    batch = EditCollator(pad_token_id=0)(rows)
    plain = edit_losses(make_model("gemma3"), batch, keeps_logits=True).per_edit
    capped = edit_losses(make_model("gemma3", final_logit_softcapping=1.0), batch, keeps_logits=True).per_edit
    assert not torch.allclose(plain, capped)
    assert capped.item() < math.log(400) + 2  # logits within -1 and 1


def test_behind_a_margin_a_target_leads_by_more(make_trainer):
    def leads(margin):
        """By how many nats the first token of each target leads the next best one."""
        trainer = make_trainer(margin=margin, num_train_epochs=60)
        trainer.train()
        found = []
        for row in trainer.train_dataset:
            first = next(place for place, label in enumerate(row["labels"]) if label >= 0)
            logits = trainer.model(torch.tensor([row["input_ids"][:first]])).logits[0, -1].detach()
            target = logits[row["labels"][first]].item()
            logits[row["labels"][first]] = -torch.inf
            found.append(target - logits.max().item())
        return torch.tensor(found)

    plain, held = leads(0.0), leads(5.0)
    assert plain.min() > 0 and (held > plain).all()
