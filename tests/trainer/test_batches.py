"""Edits laid out as rows: every token once, each edit by itself, and the losses those of one edit to a row."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BloomConfig

from peft_locft import Edit, EditSet, LocFTConfig
from peft_locft.trainer.batches import EditCollator, pack
from peft_locft.trainer.data import tokenize_edits
from peft_locft.trainer.exactness import Shortcuts, exact_shortcuts
from peft_locft.trainer.loss import edit_losses


ROWS = [
    {"index": 4, "input_ids": [11, 12, 13], "labels": [-100, 12, 13]},
    {"index": 7, "input_ids": [21, 22, 23, 24, 25], "labels": [-100, -100, -100, 24, 25]},
    {"index": 2, "input_ids": [31, 32], "labels": [-100, 32]},
]


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_edit_once_and_are_about_as_long(seed):
    lengths = torch.randint(2, 60, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = pack(lengths)
    assert sorted(number for row in rows for number in row) == list(range(40))
    sums = [sum(lengths[number] for number in row) for row in rows]
    assert len(rows) == -(-sum(lengths) // 128)
    assert max(sums) - min(sums) <= min(lengths) + 8
    assert max(sums) * len(rows) < 1.1 * sum(lengths)  # next to no padding


def test_an_edit_longer_than_a_row_makes_the_rows_longer():
    assert sorted(map(sorted, pack([300, 150, 150]))) == [[0], [1, 2]]
    assert pack([]) == []


def test_a_padded_batch_by_hand():
    batch = EditCollator(pad_token_id=9)(ROWS)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 9, 9], [21, 22, 23, 24, 25], [31, 32, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["predicts"].int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert batch["targets"].tolist() == [12, 13, 24, 25, 32]
    assert batch["owners"].tolist() == [0, 0, 1, 1, 2] and batch["index"].tolist() == [4, 7, 2]
    assert "position_ids" not in batch


def test_a_packed_batch_by_hand():
    collator = EditCollator(pad_token_id=9, packed=True)
    batch = collator(ROWS)  # 10 tokens fit a single row, the longest first
    # The width is a multiple of 16; each pad is at position 0, and so by itself.
    assert batch["input_ids"].tolist() == [[21, 22, 23, 24, 25, 11, 12, 13, 31, 32, *[9] * 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, *[0] * 6]]
    assert batch["targets"].tolist() == [24, 25, 12, 13, 32]
    assert batch["owners"].tolist() == [1, 1, 0, 0, 2] and batch["index"].tolist() == [4, 7, 2]
    assert "attention_mask" not in batch


def test_resting_edits_have_no_tokens_and_stand_last():
    collator = EditCollator(pad_token_id=9)
    collator.resting = torch.zeros(8, dtype=torch.bool)
    collator.resting[4] = True
    batch = collator(ROWS)
    assert batch["index"].tolist() == [7, 2, 4]
    assert batch["input_ids"].tolist() == [[21, 22, 23, 24, 25], [31, 32, 9, 9, 9]]
    collator.resting[:] = True
    assert len(collator(ROWS)["input_ids"]) == 0 and collator(ROWS)["index"].tolist() == [4, 7, 2]


@pytest.mark.parametrize("packed", [True, False])
def test_where_all_rest_no_states_are_looked_up(packed):
    class Cache:
        def states_at(self, edits, positions):
            return torch.randn(10, 6)[edits]  # an index of another type than integers would be refused

    collator = EditCollator(pad_token_id=9, packed=packed, cache=Cache())
    assert len(collator(ROWS)["states"]) == (1 if packed else 3)
    collator.resting = torch.ones(8, dtype=torch.bool)
    assert len(collator(ROWS)["states"]) == 0


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_neox", "phi3", "mistral"])
def test_packed_edits_do_not_see_each_other(architecture, make_model, tokenizer, edits):
    model = make_model(architecture)
    dataset = tokenize_edits(edits, tokenizer, None)
    alone = [edit_losses(model, EditCollator(0)([row]), keeps_logits=True).per_edit for row in dataset]
    assert exact_shortcuts(model, dataset, 0, True, Shortcuts(packed=True)).packed
    batch = EditCollator(0, packed=True)(list(dataset))
    assert len(batch["input_ids"]) < len(dataset)
    losses = edit_losses(model, batch, keeps_logits=True).per_edit
    torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert losses.std() > 0.01  # or else mixed-up edits would not be seen


@pytest.mark.parametrize("architecture", ["opt", "bloom"])
def test_a_model_that_cannot_tell_packed_edits_apart_gets_one_to_a_row(architecture, make_model, tokenizer, edits):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2)
    # OPT makes its mask without positions; BLOOM's positions are in its mask.
    model = make_model("opt") if architecture == "opt" else AutoModelForCausalLM.from_config(config).eval()
    dataset = tokenize_edits(edits, tokenizer, None)
    assert not exact_shortcuts(model, dataset, 0, True, Shortcuts(packed=True)).packed


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_packing_is_tried_where_no_two_edits_fit_a_row(architecture, count, make_model, tokenizer):
    # Of their shorter forms, and of what is preserved beside them, several do.
    edits = EditSet(Edit(f"{'the capital of Peru is ' * 30}{number}", "Lima") for number in range(count))
    dataset = tokenize_edits(edits, tokenizer, None)
    assert min(map(len, dataset["input_ids"])) > 64
    model = make_model(architecture, max_position_embeddings=2048)
    assert exact_shortcuts(model, dataset, 0, True, Shortcuts(packed=True)).packed == (architecture == "llama")


def test_a_model_whose_packed_losses_differ_gets_one_to_a_row(make_model, tokenizer, edits):
    model = get_peft_model(make_model(), LocFTConfig(layers=[1]))
    leak = model.get_base_model().model.layers[0]
    leak.register_forward_hook(lambda module, args, output: output + 0.1 * output.mean(dim=1, keepdim=True))
    dataset = tokenize_edits(edits, tokenizer, None)
    assert not exact_shortcuts(model, dataset, 0, True, Shortcuts(packed=True)).packed
