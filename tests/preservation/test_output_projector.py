"""Deltas that are trained before a projector: what most changes what the model says is left out."""

import pytest
import torch
from projected import TEXTS, logits, randomise

from peft_locft.preservation import (
    InputStatistics,
    OutputStatistics,
    Projection,
    input_statistics,
    output_statistics,
    trained_deltas,
)


@pytest.fixture
def deltas(peft_model):
    return trained_deltas(peft_model, "output_projector")


@pytest.fixture
def outputs(peft_model, deltas, tokenizer):
    with peft_model.disable_adapter():
        return output_statistics(peft_model.get_base_model(), tokenizer, TEXTS, [delta.name for delta in deltas])


@pytest.fixture(params=["behind", "on both sides"])
def make_projection(request, peft_model, deltas, outputs, tokenizer):
    inputs, threshold = None, 0.0
    if request.param == "on both sides":
        threshold = 0.3
        with peft_model.disable_adapter():
            inputs = input_statistics(peft_model.get_base_model(), tokenizer, TEXTS, [delta.name for delta in deltas])
    return lambda output_threshold=0.3: Projection(deltas, inputs, threshold, None, outputs, output_threshold)


def by_every_token(model, tokenizer, name):
    """The Fisher information as it is defined: of every next token, by how probable it is; and with the texts' own."""
    every, own, tokens = torch.zeros(64, 64), torch.zeros(64, 64), 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        taps = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda module, args, output, taps=taps: taps.append(output.detach().requires_grad_()) or taps[0]
        )
        log_probs = model(ids).logits[0].log_softmax(-1)  # (seq, vocabulary)
        handle.remove()
        for place, row in enumerate(log_probs):
            for token, value in enumerate(row):
                g = torch.autograd.grad(value, taps[0], retain_graph=True)[0].reshape(-1, 64)[1:]
                every += value.exp().detach() * g.T @ g
                if place + 1 < ids.shape[1] and token == ids[0, place + 1]:
                    own += g.T @ g
        tokens += ids.shape[1] - 1
    return every / tokens, own / tokens


@pytest.mark.parametrize(
    ("architecture", "name"),
    # OPT's modules see the rows of a batch and their tokens as one dimension.
    [("llama", "model.layers.1.mlp.down_proj"), ("opt", "model.decoder.layers.1.fc2")],
)
def test_statistics_are_the_fisher_information_about_the_outputs(make_model, tokenizer, architecture, name):
    model = make_model(architecture)
    expected, of_own_tokens = by_every_token(model, tokenizer, name)
    found = [output_statistics(model, tokenizer, TEXTS, [name], seed=seed) for seed in range(150)]  # with padding
    assert all(parameter.grad is None for parameter in model.parameters())
    mean = torch.stack([some[name] for some in found]).mean(0)
    assert (mean - expected).norm() < 0.15 * expected.norm()
    assert (of_own_tokens - expected).norm() > 0.3 * expected.norm()
    assert found[0].tokens == sum(len(tokenizer(text).input_ids) - 1 for text in TEXTS)


def test_the_same_seed_draws_the_same_tokens(make_model, tokenizer):
    model, name = make_model(), "model.layers.1.mlp.down_proj"
    first, again, other = (output_statistics(model, tokenizer, TEXTS, [name], seed=seed)[name] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_what_comes_after_the_longest_counts_nothing(make_model, tokenizer):
    model, name = make_model(), "model.layers.1.mlp.down_proj"
    short = [tokenizer.decode(tokenizer(text).input_ids[:4]) for text in TEXTS]
    cut = output_statistics(model, tokenizer, TEXTS, [name], max_length=4, batch_size=1)
    alone = output_statistics(model, tokenizer, short, [name], batch_size=1)
    assert cut.tokens == alone.tokens == 3 + 2 + 3
    assert torch.allclose(cut[name], alone[name], rtol=1e-4, atol=1e-7)


def test_a_module_in_front_of_another_is_seen_through_it(make_model, tokenizer):
    model = make_model()
    names = ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    together = output_statistics(model, tokenizer, TEXTS, names)
    for name in names:
        alone = output_statistics(model, tokenizer, TEXTS, [name])[name]
        assert torch.allclose(together[name], alone, rtol=1e-4, atol=1e-6)


def test_statistics_travel_through_a_file_of_their_own(outputs, tmp_path):
    outputs.save(tmp_path)
    again = OutputStatistics.load(tmp_path)
    assert again.tokens == outputs.tokens and set(again) == set(outputs)
    assert all(torch.equal(again[name], outputs[name]) for name in again)
    with pytest.raises(
        ValueError, match="has no input_statistics.safetensors, expected that of a run with `projector`"
    ):
        InputStatistics.load(tmp_path)


def test_no_text_of_two_tokens_is_an_error(make_model, tokenizer):
    with pytest.raises(ValueError, match="got 2 texts, none of two tokens, expected ordinary text"):
        output_statistics(make_model(), tokenizer, ["", "a"], ["model.layers.1.mlp.down_proj"])


def test_the_projector_is_the_formula(deltas, outputs, make_projection):
    make_projection(0.5)
    for delta in deltas:
        moment = outputs[delta.name].double()
        usual = moment.diagonal().sort().values[len(moment) // 2 - 1]
        expected = torch.linalg.inv(moment / (0.5 * usual) + torch.eye(len(moment)))
        expected *= (moment.trace() / (expected @ moment @ expected).trace()).sqrt()
        assert torch.allclose(delta.output_projector.double(), expected, atol=1e-4)


def test_a_change_at_random_moves_what_is_said_as_much_as_without(deltas, outputs, make_projection):
    make_projection()
    for delta in deltas:
        q, moment = delta.output_projector, outputs[delta.name]
        assert (q @ moment @ q).trace().item() == pytest.approx(moment.trace().item(), rel=1e-3)
        # And one for the sake of any output moves it less, for what it does to that output.
        values, vectors = torch.linalg.eigh(moment)
        assert (q @ vectors[:, -1]).norm() < 0.5 * (q @ vectors[:, 0]).norm()


def test_an_edit_costs_less_of_what_is_said(deltas, outputs, make_projection):
    """What a step along the gradient g moves, q = Q Q g, by the square of what it gains."""
    make_projection()
    torch.manual_seed(5)
    for delta in deltas:
        moment, q = outputs[delta.name], delta.output_projector
        g = torch.randn(50, len(moment))
        between = g @ q @ q
        cost, plain = (((some @ moment) * some).sum(1) / (some * g).sum(1).square() for some in (between, g))
        assert (cost < plain).float().mean() > 0.9


def test_starting_and_folding_change_nothing_that_was_there(peft_model, tokenizer, make_projection):
    randomise(peft_model)
    before = logits(peft_model, tokenizer)
    projection = make_projection()
    with projection.applied():
        assert torch.allclose(logits(peft_model, tokenizer), before, atol=1e-3)
    assert torch.allclose(logits(peft_model, tokenizer), before, atol=1e-3)


def test_what_is_saved_is_what_is_computed_and_training_goes_on_from_where_it_was(
    peft_model, deltas, tokenizer, make_projection, tmp_path
):
    projection = make_projection()
    randomise(peft_model)
    parts = [part for delta in deltas for part in (delta.entrance().weight, delta.factor().weight)]
    trained = [part.detach().clone() for part in parts]
    weights = [delta.weight().detach() for delta in deltas]
    with projection.applied():
        during = logits(peft_model, tokenizer)
        with projection.folded(tmp_path):
            assert not torch.equal(deltas[0].factor().weight, trained[1])
        assert all(torch.equal(part, weight) for part, weight in zip(parts, trained))
        with projection.folded(tmp_path):
            pass
        for part in {id(part): part for part in parts}.values():
            part.data = part + 1
        projection.load(tmp_path)
        behind = [delta.factor().weight for delta in deltas]
        assert all(torch.equal(part, weight) for part, weight in zip(behind, trained[1::2]))
        for part, weight in zip(parts, trained):
            part.data = weight.clone()
    assert torch.allclose(logits(peft_model, tokenizer), during, atol=1e-4)
    for delta, weight in zip(deltas, weights):  # folded, D is ΔW
        delta.projector = delta.output_projector = None
        assert torch.allclose(delta.weight(), weight, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 200])
def test_few_rows_and_many_are_projected_alike(peft_model, deltas, make_projection, rows):
    randomise(peft_model)
    projection = make_projection()
    entrance, factor = deltas[0].entrance(), deltas[0].factor()
    x = torch.randn(rows, entrance.weight.shape[1])
    dense = entrance is factor
    with projection.applied(), torch.autocast("cpu", torch.bfloat16, enabled=dense):
        found = entrance(x) if dense else factor(entrance(x))
    expected = x.double() @ entrance.weight.double().T  # folded
    if not dense:
        expected = expected @ factor.weight.double().T
    assert torch.allclose(found.double(), expected, atol=1e-4 * float(expected.abs().max()) + 1e-4)


def test_a_checkpoint_of_another_projector_is_refused(make_projection, tmp_path):
    projection = make_projection()
    with projection.folded(tmp_path):
        pass
    projection.check(tmp_path)
    with pytest.raises(
        ValueError, match="was trained behind other projectors: resume with the `projector`, `output_p"
    ):
        make_projection(0.4).check(tmp_path)


def test_statistics_of_another_width_are_refused(deltas, outputs):
    name = deltas[0].name
    for moment, fault in (
        (torch.eye(3), r"one of shape \(3, 3\)"),
        (torch.zeros(64, 64), "one of shape .*, all of it zero,"),
    ):
        others = OutputStatistics({**outputs, name: moment}, 5)
        with pytest.raises(ValueError, match=f"the statistics have {fault} for {name}, expected a second moment"):
            Projection(deltas, None, 0.0, None, others, 1.0)
    with pytest.raises(ValueError, match=f"the statistics have none for {name}"):
        Projection(deltas, None, 0.0, None, OutputStatistics({}, 5), 1.0)
