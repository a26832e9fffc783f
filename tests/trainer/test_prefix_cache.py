"""The prefix cache: losses and deltas are those of the plain loop, and where they would not be, it is off and says so."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, MixtralConfig, TrainerCallback

from peft_locft import EditConfig, EditTrainer, LocFTConfig
from peft_locft.trainer.prefix_cache import find_prefix


SMALL = {"hidden_size": 64, "num_attention_heads": 4, "initializer_range": 0.2}
FURTHER = {
    # Its layers are chosen by a router.
    "mixtral": MixtralConfig(
        **SMALL, num_hidden_layers=3, num_key_value_heads=2, intermediate_size=128, num_local_experts=4
    ),
    # Their layers return tuples.
    "falcon": FalconConfig(**SMALL, num_hidden_layers=3),
    "bloom": BloomConfig(**{key: SMALL[key] for key in ("hidden_size", "initializer_range")}, n_layer=3, n_head=4),
}


class WhileTraining(TrainerCallback):
    def __init__(self, look):
        self.look = look

    def on_train_begin(self, args, state, control, **kwargs):
        self.look()


@pytest.fixture
def build(make_model, tokenizer):
    def build(architecture):
        if architecture not in FURTHER:
            return make_model(architecture)
        torch.manual_seed(0)
        config = FURTHER[architecture]
        config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
        config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, None
        return AutoModelForCausalLM.from_config(config).eval()

    return build


@pytest.fixture
def train(build, tokenizer, edits, tmp_path):
    """Train on eight edits; return the trainer, the epochs' losses and the adapter's weights."""

    def train(architecture="llama", peft_config=None, model=None, **settings):
        settings = {
            "num_train_epochs": 3,
            "learning_rate": 5e-3,
            "save_strategy": "no",
            "report_to": "none",
        } | settings
        trainer = EditTrainer(
            model=model or build(architecture),
            args=EditConfig(output_dir=str(tmp_path / f"run{len(list(tmp_path.iterdir()))}"), **settings),
            train_dataset=edits,
            processing_class=tokenizer,
            peft_config=peft_config or LocFTConfig(layers=[1]),
        )
        used = []
        trainer.add_callback(WhileTraining(lambda: used.append(trainer.data_collator.cache)))
        trainer.train()
        losses = [entry["epoch_loss"] for entry in trainer.state.log_history if "epoch_loss" in entry]
        weights = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        return trainer, used[0], torch.tensor(losses), weights

    return train


@pytest.mark.parametrize("config", ["locft", "lora"])
@pytest.mark.parametrize(
    "architecture", ["llama", "gemma3", "gpt2", "gpt_neox", "qwen3", "opt", "mistral", "mixtral", "falcon", "bloom"]
)
def test_losses_and_deltas_are_those_of_the_plain_loop(architecture, config, train):
    module = {"gpt2": "mlp.c_fc", "gpt_neox": "mlp.dense_h_to_4h", "opt": "fc1", "mixtral": "self_attn.o_proj"}
    module |= {"falcon": "mlp.dense_h_to_4h", "bloom": "mlp.dense_h_to_4h"}
    targets = {"target_modules": [module.get(architecture, "mlp.up_proj")]}
    peft_config = {
        "locft": LocFTConfig(layers=[1, 2], **targets),
        "lora": LoraConfig(layers_to_transform=[1, 2], r=4, **targets),
    }[config]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the prefix cache is off")
        _, cache, cached_losses, cached_weights = train(architecture, peft_config)
    _, none, losses, weights = train(architecture, peft_config, prefix_cache=False)
    assert cache is not None and none is None
    torch.testing.assert_close(cached_losses, losses, rtol=1e-5, atol=1e-5)
    for cached, plain in zip(cached_weights, weights, strict=True):
        # Adam divides rounding noise where a gradient is nearly zero, so single values may differ.
        assert torch.linalg.vector_norm(cached - plain) <= 1e-2 * torch.linalg.vector_norm(plain)


def test_the_model_is_whole_again_afterwards(train, make_model):
    ids = torch.tensor([[5, 3, 7, 2]])
    trainer, cache, _, _ = train()
    assert cache is not None and trainer.data_collator.cache is None
    with trainer.model.disable_adapter():
        assert torch.equal(trainer.model(ids).logits, make_model()(ids).logits)
    assert not any("forward" in vars(module) for module in cache.prefix.below)


def test_the_layers_below_are_computed_once(train, make_model):
    model, counts = make_model(), [0, 0]
    for layer in (0, 1):
        model.model.layers[layer].mlp.register_forward_hook(
            lambda *_, layer=layer: counts.__setitem__(layer, counts[layer] + 1)
        )
    _, cache, losses, _ = train(model=model, num_train_epochs=4)
    # Below: once for the cache and once to check it. From there on up: the check twice, and four batches in four epochs.
    assert len(losses) == 4 and counts == [2, 2 + 16]
    assert cache.store.shape == (int(cache.starts[-1]), 64)


@pytest.mark.parametrize(
    "config", [LocFTConfig(layers=[0]), LocFTConfig(target_modules=["model.embed_tokens"]), LocFTConfig()]
)
def test_where_there_is_nothing_below_there_is_no_cache_and_no_warning(config, train):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the prefix cache is off")
        _, cache, _, _ = train(peft_config=config, num_train_epochs=1)
    assert cache is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"neftune_noise_alpha": 5.0}, "NEFTune adds new noise to the embeddings in each epoch"),
        (
            {"gradient_checkpointing": True},
            "with gradient checkpointing, the layers are run again, outside of its reach",
        ),
    ],
)
def test_where_it_would_not_be_exact_it_is_off_with_the_reason(settings, reason, train):
    with pytest.warns(UserWarning) as caught:
        _, cache, _, _ = train(num_train_epochs=1, **settings)
    said = [str(w.message) for w in caught if "prefix cache" in str(w.message)]
    assert said == [f"the prefix cache is off, and training slower: {reason}"] and cache is None


def test_layers_that_say_more_to_each_other_than_hidden_states_are_found_out(train, make_model):
    model = make_model()
    first, second = model.model.layers[0], model.model.layers[2]
    said = {}
    first.register_forward_hook(lambda module, args, output: said.update(state=output))
    second.register_forward_hook(lambda module, args, output: output + 0.5 * said["state"].mean(-1, keepdim=True) ** 2)
    with pytest.warns(UserWarning, match="losses are others, so its layers say more to each other than hidden states"):
        _, cache, _, _ = train(model=model, num_train_epochs=1)
    assert cache is None


def test_the_lowest_trained_layer_cuts(make_model):
    model = get_peft_model(make_model(), LocFTConfig(layers=[2]))
    prefix = find_prefix(model)
    layers = model.get_base_model().model.layers
    assert prefix.below == list(layers[:2]) and prefix.first is layers[2]
    model = get_peft_model(make_model(), LocFTConfig(layers=[1], modules_to_save=["lm_head"]))
    assert len(find_prefix(model).below) == 1
