"""How the site is built: `python -m sphinx -W -b html docs docs/_build/html`."""

import re

import peft_locft


project = "peft-locft"
author = "The peft-locft authors"
copyright = author
version = release = peft_locft.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = False

html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = False
html_show_sourcelink = False

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
# The docstrings give the types, in words; in the signatures too they would hide the parameters.
autodoc_typehints = "none"
python_maximum_signature_line_length = 80

napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [
    (f"Parameters that control {what}", "params_style")
    for what in (
        "the model",
        "the data preprocessing",
        "the training",
        "speed and memory",
        "the evaluation",
        "the preservation",
    )
]

# A name that a docstring puts into brackets is a link if this package has it, else a literal.
_OWN = {*peft_locft.__all__}
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)
_INLINE = re.compile(
    r"\[`(?P<name>[^`\]]+)`\](?!\()|`(?P<code>[^`]+)`|\[(?P<text>[^`\]]+)\]\((?P<url>https?://[^)\s]+)\)"
)
_QUOTE = re.compile(r"^(?P<indent> *)>(?: (?P<text>.*))?$")


def _inline(match: re.Match) -> str:
    if match["url"]:
        return f"`{match['text']} <{match['url']}>`__"
    name = (match["name"] or match["code"]).lstrip("~")
    if match["name"] and name.split(".")[0] in _OWN:
        return f":py:obj:`~peft_locft.{name}`" if "." not in name else f":py:obj:`{name} <peft_locft.{name}>`"
    # RST wants a break between a literal and a letter.
    return f"``{name}``" + ("\\ " if match.string[match.end() : match.end() + 1].isalnum() else "")


def _code_block(match: re.Match) -> str:
    indent, language, code = match.groups()
    language = "pycon" if ">>>" in code else language or "text"
    lines = [f"    {line}" if line.strip() else "" for line in code.splitlines()]
    return "\n".join([f"{indent}.. code-block:: {language}", "", *lines, ""])


def _quote(line: str) -> list[str]:
    """Turn a line of a quotation into one of a note, a heading of a group of parameters, or a list's item."""
    match = _QUOTE.match(line)
    if not match:
        return [line]
    indent, text = match["indent"], match["text"] or ""
    if text == "[!NOTE]":
        return [f"{indent}.. note::", ""]
    if text.startswith("Parameters that control"):
        return [f"{indent[4:]}{text}:"]
    return ["", f"{indent}   {text}"] if text.startswith("- ") else [f"{indent}   {text}"]


def huggingface_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn a docstring in Hugging Face's markdown into the RST that napoleon and Sphinx read."""
    text = "\n".join(part for line in lines for part in _quote(line))
    text = re.sub(r"^Parameters:\n+(?=Parameters that control)", "", text, flags=re.M)  # only groups stand under it
    # `ValueError`: in a section of errors stands a bare name, of which napoleon makes a field.
    text = re.sub(r"^( +)\[?`(\w+(?:Error|Exception))`\]?: ", r"\1\2: ", text, flags=re.M)
    pieces, end = [], 0
    for fence in _FENCE.finditer(text):
        pieces += [_INLINE.sub(_inline, text[end : fence.start()]), _code_block(fence)]
        end = fence.end()
    lines[:] = "".join([*pieces, _INLINE.sub(_inline, text[end:])]).split("\n")


def setup(app):
    # Before napoleon, which listens with the default priority of 500.
    app.connect("autodoc-process-docstring", huggingface_to_rst, priority=400)
