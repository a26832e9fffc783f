"""The tiny models whose edits are planned."""

import pytest
from transformers import AutoModelForCausalLM, MixtralConfig


@pytest.fixture
def make(make_model):
    """The tiny models of conftest.py, and a mixture of experts."""

    def make(architecture: str, **changes):
        if architecture != "mixtral":
            return make_model(architecture, **changes)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 400}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        return AutoModelForCausalLM.from_config(
            MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2, **changes)
        ).eval()

    return make
