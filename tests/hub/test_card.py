"""The model card, as huggingface_hub parses its metadata and as a Markdown renderer reads its text."""

import ast
import json
import random
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import LoraConfig

from peft_locft import Edit, EditResults, EditSet, LocFTConfig, load_edits
from peft_locft.edits import write_atomically
from peft_locft.hub import edit_card, repository_files


ORDINARY = EditSet([Edit("The capital of Peru is", "Quito"), Edit("The capital of Cuba is", "Holguín")])
NASTY = EditSet(
    [
        Edit("a | b || c", "x | y"),
        Edit("one\ntwo\r\n\nthree", "four\nfive"),
        Edit("run `rm -rf` and ``more``", "`tick"),
        Edit("**bold** _it_ __un__ ~~gone~~", "*star"),
        Edit("[link](https://x.example) ![image](y.png)", "[x]"),
        Edit("<b>html</b> <https://auto.example>", "<script>"),
        Edit("back\\slash \\| pipe \\", "end\\"),
        Edit("&lt; is not &amp; that &#35;", "&copy;"),
        Edit("# no heading", "- no list"),
        Edit("| --- | --- |", "|"),
    ]
)


def row(edit: Edit, metric: str, before: str, after: str, right: tuple[bool, bool]) -> dict:
    answers = {"before": before, "after": after, "correct_before": right[0], "correct_after": right[1]}
    return {"edit_id": edit.id, "metric": metric, "prompt": edit.prompt, "answer": edit.target, **answers}


def results_of(edits: EditSet, **settings) -> EditResults:
    """Of the edits one third, rounded up, is answered right before and all after; of locality probes the reverse."""
    rows = []
    for number, edit in enumerate(edits):
        rows.append(row(edit, "reliability", f"old | {edit.prompt}", edit.target, (number % 3 == 0, True)))
        rows.append(row(edit, "locality", "same", "other", (True, number % 3 == 0)))
    return EditResults(rows, settings=settings)


def locft(base: str | None = "org/model", **changes) -> LocFTConfig:
    changes = {"layers": [1], "target_modules": ["mlp.down_proj"], **changes}
    return LocFTConfig(base_model_name_or_path=base, task_type="CAUSAL_LM", **changes)


def lora(base: str | None = "org/model") -> LoraConfig:
    return LoraConfig(base_model_name_or_path=base, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])


def tables(card: str) -> dict[str, list[list[list]]]:
    """The card's tables by heading: rows of cells, each the tokens that a renderer makes of it."""
    found, heading = {}, None
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(card).text)
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = tokens[number + 1].content
        elif token.type == "tr_open":
            found.setdefault(heading, []).append([])
        elif token.type in ("td_open", "th_open"):
            found[heading][-1].append(tokens[number + 1].children)
    return found


def plain(cell: list) -> str:
    """The text of a cell. Anything but text in it would be markup that came from an edit."""
    assert {token.type for token in cell} <= {"text", "text_special"}, [token.type for token in cell]
    return "".join(token.content for token in cell)


def code(card: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return block


def test_metadata_of_a_base_model_on_the_hub(tmp_path):
    text = edit_card("me/capitals", ORDINARY, locft(), tags=["geography"])
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model == "org/model"
    expected = {"locft", "peft-locft", "model-editing", "knowledge-editing", "geography"}
    assert set(card.data.tags) == expected | {"base_model:adapter:org/model"}
    assert card.text.strip().startswith("# capitals\n")
    assert "[org/model](https://huggingface.co/org/model)" in card.text


@pytest.mark.parametrize("kind", ["folder", "folder elsewhere", "relative folder elsewhere", None, ""])
def test_a_base_model_that_is_not_on_the_hub_is_not_linked(kind, tmp_path):
    bases = {
        "folder": str(tmp_path),
        "folder elsewhere": "/home/somebody/models/tiny",
        "relative folder elsewhere": "../models/tiny",
    }
    base = bases.get(kind, kind)
    card = ModelCard(edit_card("me/capitals", ORDINARY, locft(base)))
    assert card.data.base_model is None
    assert not [tag for tag in card.data.tags if tag.startswith("base_model")]
    assert "huggingface.co/" not in card.text
    assert 'AutoModelForCausalLM.from_pretrained("path/to/the/base/model")' in card.text
    if base:
        assert f"`{Path(base).name}`" in card.text
        assert base not in card.text, "the author's folders are nobody's business"


def test_tables_hold_the_results():
    edits = EditSet(Edit(f"The capital of {n} is", f"city {n}") for n in range(13))
    results = results_of(edits, learning_rate=0.0371, epochs=17, layers=[1], model="org/model", batch_size=None)
    found = tables(edit_card("capitals", edits, locft(), results))
    header, *scores = found["How well the edits hold"]
    assert [plain(cell) for cell in header] == ["score", "share of", "before", "after"]
    numbers = {
        plain(cells[0]): (plain(cells[2]), "".join(token.content for token in cells[3] if token.type == "text"))
        for cells in scores
    }
    assert numbers == {"reliability": ("0.385", "1.000"), "locality": ("1.000", "0.385")}
    examples = [[plain(cell) for cell in cells] for cells in found["What it changes"]]
    assert examples[0] == ["prompt", "before", "new answer"]
    assert examples[1:] == [[edit.prompt, f"old | {edit.prompt}", edit.target] for edit in edits[:10]]
    settings = {plain(cells[0]): plain(cells[1]) for cells in found["How it was made"][1:]}
    assert settings == {"layers": "[1]", "modules": "mlp.down_proj", "learning rate": "0.0371", "epochs": "17"}
    assert "\n3 more are in [edits.jsonl](edits.jsonl)." in edit_card("capitals", edits, locft(), results)
    assert "more are in" not in edit_card("capitals", edits[:10], locft(), results)


def test_text_of_edits_stays_in_its_cell():
    results = results_of(NASTY)
    found = tables(edit_card("x", NASTY, locft(), results))
    assert len(found["How well the edits hold"]) == 3
    for edit, cells in zip(NASTY, found["What it changes"][1:], strict=True):
        expected = [edit.prompt, f"old | {edit.prompt}", edit.target]
        assert [plain(cell) for cell in cells] == [" ".join(text.split()) for text in expected]


@pytest.mark.parametrize("seed", range(20))
def test_any_text_stays_in_its_cell(seed):
    draw = random.Random(seed)
    texts = ["".join(draw.choices("|\\`*_~<>[]()!&#-$; \t\n\u2028abé", k=draw.randint(1, 25))) for _ in range(30)]
    texts = [f"{text}." for text in dict.fromkeys(texts)]  # neither blank nor with a space at the end
    edits = EditSet(Edit(text, text[::-1].strip()) for text in texts[:10])
    for edit, cells in zip(edits, tables(edit_card("x", edits, locft()))["What it changes"][1:], strict=True):
        expected = [edit.prompt, "", edit.target]
        assert [plain(cell) for cell in cells] == [" ".join(text.split()) for text in expected]


def test_loading_code_imports_this_package_only_where_it_is_needed():
    for config, needed in ((locft(), True), (lora(), False)):
        card = edit_card("me/capitals", ORDINARY, config)
        imports = [node for node in ast.parse(code(card)).body if isinstance(node, ast.Import)]
        assert [name.name for node in imports for name in node.names] == (["peft_locft"] if needed else [])
        assert ("pip install peft-locft" in card) is needed
        assert f"This {'LOCFT' if needed else 'LORA'} adapter" in card


@pytest.mark.parametrize("name", ["me/capitals", 'my "best" run', "back\\new", "été"])
def test_loading_code_loads_this_adapter_on_its_base(name):
    loaded = {}
    for node in ast.walk(ast.parse(code(edit_card(name, ORDINARY, locft())))):
        if isinstance(node, ast.Call):
            loaded[ast.unparse(node.func)] = ast.literal_eval(node.args[-1])
    assert loaded == {
        "AutoModelForCausalLM.from_pretrained": "org/model",
        "AutoTokenizer.from_pretrained": "org/model",
        "PeftModel.from_pretrained": name,
    }


def test_without_results_the_card_says_so():
    card = edit_card("x", ORDINARY, lora())
    assert "It was not evaluated." in card
    assert "edit_results.json" not in card
    found = tables(card)
    assert "How well the edits hold" not in found
    assert [plain(cell) for cell in found["What it changes"][1]] == ["The capital of Peru is", "", "Quito"]
    assert {plain(a): plain(b) for a, b in found["How it was made"][1:]} == {"modules": "q_proj, v_proj"}
    evaluated = edit_card("x", ORDINARY, lora(), results_of(ORDINARY))
    assert "It was not evaluated." not in evaluated
    assert "`edit_results.json`" in evaluated


def test_citation_is_a_bibtex_entry_of_the_paper():
    (entry,) = re.findall(r"## Citation\n\n```bibtex\n(.*?)\n```", edit_card("x", ORDINARY, locft()), re.DOTALL)
    assert entry.startswith("@article{") and entry.count("{") == entry.count("}")
    assert "Fine-tuning Done Right in Model Editing" in entry
    assert re.search(r"eprint\s*= \{2509\.22072\}", entry)


def test_repository_files_are_card_ledger_and_results(tmp_path):
    results = results_of(NASTY, epochs=3)
    files = repository_files("me/x", NASTY, locft(), results, ["t"])
    assert sorted(files) == ["README.md", "edit_results.json", "edits.jsonl"]
    assert files["README.md"] == edit_card("me/x", NASTY, locft(), results, ["t"])
    write_atomically(tmp_path / "edits.jsonl", files["edits.jsonl"])
    assert load_edits(tmp_path) == NASTY
    summary = json.loads(files["edit_results.json"])
    assert summary["before"] == results.before and summary["after"] == results.after
    assert sorted(repository_files("me/x", NASTY, locft())) == ["README.md", "edits.jsonl"]
