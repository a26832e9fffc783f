"""The last layer's MLP at target positions only: the same losses and gradients, with less computed."""

import pytest
import torch
from peft import get_peft_model

from peft_locft import EditConfig, EditTrainer, LocFTConfig
from peft_locft.trainer.batches import EditCollator
from peft_locft.trainer.data import tokenize_edits
from peft_locft.trainer.exactness import Shortcuts, exact_shortcuts
from peft_locft.trainer.last_layer import computed_only_at, find_last_mlp
from peft_locft.trainer.loss import edit_losses


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "gpt_neox", "qwen3", "phi3", "mistral"])
@pytest.mark.parametrize("layer", [1, 2])
def test_losses_and_gradients_are_those_of_the_whole_layer(architecture, layer, make_model, tokenizer, edits):
    model = get_peft_model(make_model(architecture), LocFTConfig(layers=[layer])).eval()
    dataset = tokenize_edits(edits, tokenizer, None)
    mlp = find_last_mlp(model)
    assert mlp is not None
    assert exact_shortcuts(model, dataset, 0, True, Shortcuts(last_mlp=mlp)).last_mlp is mlp
    batch = EditCollator(0)(list(dataset))
    (delta,) = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for shortcuts in (Shortcuts(), Shortcuts(last_mlp=mlp)):
        with shortcuts.taken(batch):
            losses = edit_losses(model, batch, keeps_logits=True).per_edit
        (gradient,) = torch.autograd.grad(losses.sum(), delta)
        found.append((losses, gradient))
    for plain, short in zip(*found):
        torch.testing.assert_close(short, plain, rtol=1e-5, atol=1e-5)
    assert found[0][1].norm() > 0.01


def test_only_target_positions_are_computed(make_model, tokenizer, edits, tmp_path):
    model, rows = make_model(), []
    model.model.layers[2].mlp.up_proj.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    trainer = EditTrainer(
        model=model,
        args=EditConfig(
            output_dir=str(tmp_path),
            num_train_epochs=1,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=8,
        ),
        train_dataset=edits,
        processing_class=tokenizer,
        peft_config=LocFTConfig(layers=[1]),
    )
    trainer.train()
    targets = sum(label != -100 for row in trainer.train_dataset for label in row["labels"])
    assert rows[-1] == targets < sum(len(row["input_ids"]) for row in trainer.train_dataset)


def test_an_mlp_that_mixes_positions_is_left_whole(make_model, tokenizer, edits):
    model = get_peft_model(make_model(), LocFTConfig(layers=[1])).eval()
    mlp = find_last_mlp(model)
    mlp.act_fn.register_forward_hook(lambda module, args, output: output + output.mean(dim=-2, keepdim=True))
    dataset = tokenize_edits(edits, tokenizer, None)
    assert exact_shortcuts(model, dataset, 0, True, Shortcuts(last_mlp=mlp)).last_mlp is None


def test_an_mlp_that_takes_more_than_hidden_states_is_left_whole(make_model, tokenizer, edits):
    model = get_peft_model(make_model(), LocFTConfig(layers=[1])).eval()
    mlp = find_last_mlp(model)
    own = mlp.forward
    mlp.forward = lambda hidden_states, residual=None: own(hidden_states)
    layer = model.get_base_model().model.layers[2]
    layer.mlp.register_forward_pre_hook(lambda module, args: (*args, None))
    dataset = tokenize_edits(edits, tokenizer, None)
    assert exact_shortcuts(model, dataset, 0, True, Shortcuts(last_mlp=mlp)).last_mlp is None


def test_the_module_is_as_it_was(make_model):
    mlp = make_model().model.layers[2].mlp
    states, wanted = torch.randn(2, 3, 64), torch.tensor([[True, False, True], [False, True, False]])
    whole = mlp(states)
    with computed_only_at(mlp, wanted):
        part = mlp(states)
    assert torch.allclose(part[wanted], whole[wanted], rtol=1e-4, atol=1e-5) and not part[~wanted].any()
    assert "forward" not in vars(mlp) and torch.equal(mlp(states), whole)
