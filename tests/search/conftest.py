import pytest

from peft_locft import EditConfig
from peft_locft.search import Trial, search_locations


@pytest.fixture
def args(tmp_path):
    """Few epochs, no progress bars."""

    def args(**settings):
        settings = {"num_train_epochs": 6, "report_to": "none", "save_strategy": "no", "disable_tqdm": True} | settings
        return EditConfig(output_dir=str(tmp_path / "run"), **settings)

    return args


@pytest.fixture
def search(make_model, tokenizer, edits, args):
    """Search places of the tiny Llama."""

    def search(model=None, **options):
        options = {"tokenizer": tokenizer, "args": args(), "layers": [1, 2], "groups": ["mlp", "down"]} | options
        return search_locations(model or make_model(), options.pop("edits", edits), **options)

    return search


@pytest.fixture
def trial():
    """A trial whose place and scores alone are looked at."""

    def trial(layer=0, group="down", rung=1, **scores):
        names = {"down": "mlp.down_proj", "up": "mlp.up_proj"}
        score = scores.pop("score", None)
        score = sum(scores.values()) / len(scores) if score is None else score
        return Trial(layer, group, names.get(group, group), rung, 8, 5, 1e-3, scores, score, 1.0)

    return trial
