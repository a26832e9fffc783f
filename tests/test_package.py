"""The package as a whole: its public API, its examples, its notebook."""

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

import peft_locft
from peft_locft import load_edits


ROOT = Path(__file__).parents[1]


def test_the_public_api_is_the_explicit_list_and_all_of_it_is_documented():
    tree = ast.parse((ROOT / "src/peft_locft/__init__.py").read_text())
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(imported) == sorted(peft_locft.__all__)
    assert all(getattr(peft_locft, name).__doc__ for name in peft_locft.__all__)
    pages = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    missing = [name for name in peft_locft.__all__ if not name.endswith("Error") and name not in pages]
    assert not missing


def test_imports_point_one_way():
    order = [
        "plotting",
        "edits",
        "tuner",
        "location",
        "evaluation",
        "preservation",
        "hub",
        "trainer",
        "search",
        "planning",
        "cli",
    ]
    for path in (ROOT / "src/peft_locft").rglob("*.py"):
        folder = path.parent.name
        if folder not in order:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert order.index(node.module.split(".")[0]) < order.index(folder), f"{path} imports {node.module}"


def test_importing_says_nothing_and_seeds_nothing():
    code = "import torch; torch.manual_seed(5); a = torch.rand(1); torch.manual_seed(5); import peft_locft; assert a == torch.rand(1)"
    result = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_the_example_edits_are_what_the_readme_says():
    edits = load_edits(ROOT / "examples/edits.jsonl")
    assert len(edits) == 72
    assert all(len(edit.rephrases) == 2 and len(edit.locality) == 1 for edit in edits)


def test_the_example_scripts_run(model_folder, tmp_path):
    result = subprocess.run(
        [sys.executable, "examples/plain_trainer.py", str(model_folder), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_notebook_runs(smollm_folder):
    notebook = nbformat.read(ROOT / "notebooks/01_first_edit.ipynb", as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    before, after = ast.literal_eval(outputs[-1]["data"]["text/plain"])
    assert after == "The capital of Kazakhstan is Astana" != before
