"""`locft plan`: what it says, and what it refuses."""

import json
import shutil

import pytest

from peft_locft import LocFTConfig, load_edits, plan_edit
from peft_locft.cli.plan import _operations, _rounded


def rows(out: str) -> dict[str, list[str]]:
    """The rows of all printed tables, by their first cell."""
    cells = [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in out.splitlines()]
    return {row[0]: row[1:] for row in cells if row}


@pytest.fixture
def config_only(model_folder, tmp_path):
    """The folder of a model with nothing but its config."""
    folder = tmp_path / "config-only"
    folder.mkdir()
    shutil.copy(model_folder / "config.json", folder)
    return folder


def test_the_tables_say_what_the_plan_says(command, config_only):
    done = command("plan", "--model", config_only, "--layers", "1", "--edits", "1000")
    assert (done.code, done.err) == (0, "")
    plan = plan_edit(config_only, LocFTConfig(layers=[1]), num_edits=1000)
    assert f"{plan.parameters:,} weights in float32, and an adapter of {plan.trained_parameters:,}." in done.out
    assert "1,000 edits of 20 tokens, in batches of 100." in done.out
    table = rows(done.out)
    assert table["phase"] == ["device", "CPU", "disk", "on the device"]
    for phase in plan.phases:
        sizes = [sum(part.values()) for part in (phase.device, phase.cpu, phase.disk)]
        assert table[phase.name][:3] == [_rounded(size / 2**30) if size else "0" for size in sizes]
        assert table[phase.name][3].split(", ")[0] == f"weights {_rounded(phase.device['weights'] / 2**30)}"
    assert table["card"] == ["GiB", "room"]
    assert table["H100"] == ["74.5", "yes"]
    assert f"building the cache takes {_operations(plan.cache_flops)}." in done.out
    assert f"An epoch of 10 steps takes {_operations(plan.epoch_flops)}." in done.out
    assert "Of each card, 0.6 GiB are left free" in done.out


def test_a_large_model_needs_its_lower_layers_elsewhere_on_some_cards(command, config_only):
    settings = json.loads((config_only / "config.json").read_text())
    sizes = {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 20, "vocab_size": 152064}
    settings |= {**sizes, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    (config_only / "config.json").write_text(json.dumps(settings))
    done = command("plan", "--model", config_only, "--layers", "15", "--edits", "1000")
    assert done.code == 0, done.err
    table = rows(done.out)
    rooms = [table[card][1] for card in ("T4", "RTX 4090", "A100 40 GB", "H100")]
    assert rooms == ["no", "with --offload_prefix", "with --offload_prefix", "yes"]
    off = command("plan", "--model", config_only, "--layers", "15", "--edits", "1000", "--offload_prefix")
    assert float(rows(off.out)["train"][0]) < float(table["train"][0]) - 24  # 15 layers of 1.6 GiB


def test_json_is_the_plan_in_bytes(command, config_only):
    done = command(
        *("plan", "--model", config_only, "--layers", "-1", "--edits", "64", "--tokens_per_edit", "30"),
        *("--target_tokens", "9", "--batch_size", "8", "--dtype", "bfloat16", "--offload_prefix", "--json"),
    )
    assert (done.code, done.err) == (0, "")
    sizes = {"num_edits": 64, "tokens_per_edit": 30, "target_tokens": 9, "batch_size": 8}
    plan = plan_edit(str(config_only), LocFTConfig(layers=[-1]), dtype="bfloat16", offload_prefix=True, **sizes)
    assert json.loads(done.out) == json.loads(json.dumps(plan.to_dict()))


def test_the_tokens_of_a_file_are_counted(command, model_folder, tokenizer, edits, tmp_path):
    edits.save(tmp_path / "edits.jsonl")
    done = command("plan", "--model", model_folder, "--edits", "edits.jsonl", "--json")
    assert done.code == 0, done.err
    expected = sum(
        len(tokenizer(f"{e.prompt} {e.target}")["input_ids"]) + 1 for e in load_edits(tmp_path / "edits.jsonl")
    )
    plan = json.loads(done.out)
    assert (plan["num_edits"], plan["tokens"]) == (len(edits), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["edits.jsonl"]


def test_options_may_come_from_a_file(command, config_only, tmp_path):
    (tmp_path / "plan.yaml").write_text(f"model: {config_only}\nlayers: [1]\nedits: 8\n")
    assert command("plan", "--config", "plan.yaml").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--edits", "0"], "`--edits` is 0, expected at least 1, or a file of edits"),
        (["--edits", "-3"], "`--edits` is -3, expected at least 1, or a file of edits"),
        (["--edits", "gone.jsonl"], "gone.jsonl does not exist"),
        (
            ["--edits", "edits.jsonl", "--tokens_per_edit", "9"],
            "`--edits` is edits.jsonl, whose tokens are counted, and `--tokens_per_edit` was given too",
        ),
        (
            ["--edits", "edits.jsonl"],
            "which has to count the tokens of edits.jsonl: give a number of edits, or a model",
        ),
        (["--edits", "8", "--layers", "3"], "layers [3] are not in the model"),
        (["--edits", "8", "--layers", "0", "--offload_prefix"], "no layer is below the trained ones"),
        (["--edits", "8", "--target_modules", "mlp.down_prj"], "the nearest names are ['mlp.down_proj'"),
        (["--edits", "8", "--dtype", "int4"], "`dtype` is 'int4', expected one of ['float32', 'float16', 'bfloat16']"),
        (["--edits", "8", "--batch_size", "1"], "`batch_size` is 1 for 8 edits, expected at least 2"),
        (["--edits", "8", "--model", "/gone"], "the model folder /gone does not exist"),
        (["--edits", "8", "--model", "empty"], "the model folder empty has no config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(options, message, command, config_only, edits, tmp_path):
    edits.save(tmp_path / "edits.jsonl")
    (tmp_path / "empty").mkdir()
    done = command("plan", "--model", config_only, *options)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("locft plan: error: ") and message in done.err


@pytest.mark.parametrize(("flops", "said"), [(10**12, "1 TFLOP, 0.01 s"), (6 * 10**16, "60,000 TFLOP, 10 min")])
def test_operations_are_said_with_a_time(flops, said):
    assert _operations(flops) == f"{said} at 100 TFLOP/s"
