"""One fact's causal trace: against passes of the whole model, one for each restored state."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_tracing import PROMPT, SUBJECT, make_noise, plain_effects
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    ByT5Tokenizer,
    FalconConfig,
    MambaConfig,
    MixtralConfig,
)

from peft_locft import LocFTConfig
from peft_locft.location import restoring, trace


OTHERS = {
    "falcon": (FalconConfig, {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}),
    "bloom": (BloomConfig, {"hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "mamba": (MambaConfig, {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 8}),
    "mixtral": (
        MixtralConfig,
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "num_local_experts": 4},
    ),
}


@pytest.fixture
def make_any(make_model, tokenizer):
    def make(architecture):
        if architecture not in OTHERS:
            return make_model(architecture)
        config_class, sizes = OTHERS[architecture]
        torch.manual_seed(0)
        config = config_class(vocab_size=len(tokenizer), initializer_range=0.2, pad_token_id=None, **sizes)
        return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.mark.parametrize(
    ("architecture", "window"),
    [
        *((name, 3) for name in ("llama", "gemma3", "gpt2", "gpt_neox", "qwen3", "opt")),
        *((name, 3) for name in ("falcon", "mixtral", "bloom", "mamba")),
        ("llama", 1),
        ("llama", 2),
        ("llama", 10),
    ],
)
def test_effects_are_those_of_one_pass_for_each_state(architecture, window, make_any, tokenizer, fact):
    model = make_any(architecture)
    ids, begin, end = fact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if architecture == "mamba" else "error")  # which has no keys and values
        found = trace(model, PROMPT, SUBJECT, tokenizer=tokenizer, copies=4, window=window, batch_size=30)
    assert found.subject == (begin, end) and end - begin > 2 and len(ids) - end > 2
    answer = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    assert (found.answer, found.known) == (tokenizer.decode([answer]), True)
    noise = make_noise(model, ids[begin:end], copies=4)
    expected = plain_effects(model, architecture, ids, begin, noise, answer, window)
    assert found.effects.keys() == expected.keys()
    for kind, effects in expected.items():
        assert effects.abs().max() > 1e-3, "nothing would be compared"
        torch.testing.assert_close(found.effects[kind], effects, rtol=0, atol=1e-5)


def test_a_restored_last_state_of_the_last_token_is_the_clean_run(make_model, tokenizer):
    found = trace(make_model(), PROMPT, SUBJECT, tokenizer=tokenizer, copies=3)
    assert found.effects["states"][-1, -1] == pytest.approx(
        found.clean_probability - found.corrupted_probability, abs=1e-6
    )
    assert not any(effects[: found.subject[0]].any() for effects in found.effects.values())


def test_an_answer_may_be_given_that_the_model_does_not_say(make_model, tokenizer, fact):
    model, (ids, begin, end) = make_model(), fact
    found = trace(model, PROMPT, SUBJECT, "Lima", tokenizer=tokenizer, copies=3, noise=0.5)
    answer = tokenizer(" Lima")["input_ids"][0]
    assert (found.answer, found.known) == (tokenizer.decode([answer]), False)
    noise = make_noise(model, ids[begin:end], 3, scale=0.5)
    expected = plain_effects(model, "llama", ids, begin, noise, answer, 10)
    torch.testing.assert_close(found.effects["mlp"], expected["mlp"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 4000])
def test_the_batch_size_changes_nothing(batch_size, make_model, tokenizer):
    model = make_model()
    expected = trace(model, PROMPT, SUBJECT, tokenizer=tokenizer, copies=3)
    found = trace(model, PROMPT, SUBJECT, tokenizer=tokenizer, copies=3, batch_size=batch_size)
    for kind in expected.effects:
        torch.testing.assert_close(found.effects[kind], expected.effects[kind], rtol=0, atol=1e-6)


def test_a_subject_at_the_beginning_and_at_the_end(make_model, tokenizer):
    model = make_model()
    for prompt, subject in (("Mongolia is", "Mongolia"), ("What is Mongolia", "Mongolia"), ("P", "P")):
        ids = tokenizer(prompt)["input_ids"]
        found = trace(model, prompt, subject, tokenizer=tokenizer, copies=3, window=2)
        begin, end = found.subject
        noise = make_noise(model, ids[begin:end], 3)
        answer = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        expected = plain_effects(model, "llama", ids, begin, noise, answer, 2)
        for kind, effects in expected.items():
            torch.testing.assert_close(found.effects[kind], effects, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_where_the_shortcut_is_not_exact_whole_passes_are_made(fault, make_model, tokenizer, monkeypatch):
    expected = trace(make_model(), PROMPT, SUBJECT, tokenizer=tokenizer, copies=3)
    own = restoring._SharedPrefix.update

    def update(self, keys, values, *args, **kwargs):
        if fault == "raises":
            raise KeyError("layer_7")
        return tuple(tensor * 2 for tensor in own(self, keys, values, *args, **kwargs))

    monkeypatch.setattr(restoring._SharedPrefix, "update", update)
    message = {"raises": r"layers cannot be cut \(KeyError: 'layer_7'\)", "differs": "probabilities differ by"}[fault]
    with pytest.warns(UserWarning, match=f"the shortcuts of causal tracing are off, and it takes longer.*{message}"):
        found = trace(make_model(), PROMPT, SUBJECT, tokenizer=tokenizer, copies=3)
    for kind in expected.effects:
        torch.testing.assert_close(found.effects[kind], expected.effects[kind], rtol=0, atol=1e-5)


def test_the_model_is_left_as_it_was(make_model, tokenizer):
    model = make_model()
    model.train()
    model.model.layers[1].eval()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    before = model(ids).logits
    trace(model, PROMPT, SUBJECT, tokenizer=tokenizer, copies=2)
    assert model.training and not model.model.layers[1].training and model.model.layers[2].training
    assert torch.equal(model(ids).logits, before)
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_an_active_adapter_is_traced_too(make_model, tokenizer):
    plain = trace(make_model(), PROMPT, SUBJECT, tokenizer=tokenizer, copies=3, noise=1.0)
    config = LoraConfig(target_modules=["down_proj", "q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(make_model(), config).eval()
    found = trace(model, PROMPT, SUBJECT, tokenizer=tokenizer, copies=3, noise=1.0)
    merged = trace(model.merge_and_unload(), PROMPT, SUBJECT, tokenizer=tokenizer, copies=3, noise=1.0)
    assert found.clean_probability != plain.clean_probability
    for kind in merged.effects:
        torch.testing.assert_close(found.effects[kind], merged.effects[kind], rtol=0, atol=1e-5)


def test_an_adapter_in_an_mlp_that_adds_the_residual_itself_is_traced_too(make_any, tokenizer):
    config = LocFTConfig(layers=[0, 1], target_modules=["mlp.dense_4h_to_h"])
    model = get_peft_model(make_any("bloom"), config).eval()
    torch.manual_seed(3)
    for name, value in model.named_parameters():
        if "locft" in name:
            torch.nn.init.normal_(value.data, std=0.1)
    found = trace(model, PROMPT, SUBJECT, tokenizer=tokenizer, copies=3, noise=1.0, window=1)
    merged = trace(model.merge_and_unload(), PROMPT, SUBJECT, tokenizer=tokenizer, copies=3, noise=1.0, window=1)
    for kind in merged.effects:
        assert merged.effects[kind].abs().max() > 1e-4
        torch.testing.assert_close(found.effects[kind], merged.effects[kind], rtol=0, atol=1e-5)


def test_the_tokenizer_may_be_that_of_the_models_folder(model_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    found = trace(model, PROMPT, SUBJECT, copies=2)
    assert "".join(found.tokens) == PROMPT
    expected = trace(model, PROMPT, SUBJECT, tokenizer=tokenizer, copies=2)
    assert torch.equal(found.effects["states"], expected.effects["states"])


def test_bfloat16_is_traced_with_the_shortcut(make_model, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trace(make_model().bfloat16(), PROMPT, SUBJECT, tokenizer=tokenizer, copies=3)
    assert found.effects["states"].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": "mongolia"}, "the subject 'mongolia' does not occur in the prompt 'The capital of Mongolia is'"),
        ({"subject": " "}, "the subject ' ' does not occur in the prompt"),
        ({"answer": " "}, "the answer ' ' has no token"),
        ({"copies": 0}, "`copies` is 0, expected at least 1"),
        ({"window": 0}, "`window` is 0, expected at least 1"),
        ({"batch_size": 0}, "`batch_size` is 0, expected at least 1"),
        ({"noise": 0.0}, "`noise` is 0.0, expected a standard deviation above 0"),
        ({"tokenizer": ByT5Tokenizer()}, "ByT5Tokenizer is not a fast tokenizer"),
        ({"tokenizer": None}, "the model does not tell where its tokenizer is: pass the tokenizer as `tokenizer`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused(changes, message, make_model, tokenizer):
    arguments = {"prompt": "The capital of Mongolia is", "subject": "Mongolia", "tokenizer": tokenizer, **changes}
    with pytest.raises(ValueError) as caught:
        trace(make_model(), **arguments)
    assert message in str(caught.value)


def test_a_model_without_a_list_of_layers_is_refused(make_model, tokenizer):
    model = make_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=r"got lists of \[3\], expected one of 7"):
        trace(model, PROMPT, SUBJECT, tokenizer=tokenizer)


def test_the_real_model(smollm):
    model, tokenizer = smollm
    prompt, subject = "The capital city of Kazakhstan is named", "Kazakhstan"
    found = trace(model, prompt, subject, tokenizer=tokenizer, copies=2)
    assert "".join(found.tokens[slice(*found.subject)]) == " Kazakhstan"
    cells = [("states", -1, 3), ("mlp", found.subject[1] - 1, 6), ("attention", -1, 22), ("mlp", -1, 29)]
    ids = tokenizer(prompt)["input_ids"]
    cells = [(kind, token % len(ids), layer) for kind, token, layer in cells]
    begin, end = found.subject
    noise = make_noise(model, ids[begin:end], 2)
    answer = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    expected = plain_effects(model, "llama", ids, begin, noise, answer, 10, cells)
    assert [float(found.effects[kind][token, layer]) for kind, token, layer in cells] == pytest.approx(
        expected, abs=1e-5
    )
