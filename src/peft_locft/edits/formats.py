"""The shapes in which editing data comes, and how each becomes the fields of an [`Edit`]."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .edit import EditError


OWN_COLUMNS = (
    *("id", "prompt", "target", "subject", "rephrases", "train_rephrases", "locality", "portability", "source"),
)


class Shape(NamedTuple):
    """A record shape: its name, the columns that mark it, and its translation to the project's own columns."""

    name: str
    columns: tuple[str, ...]
    to_fields: Callable[[dict], dict]


def foreign_columns(record: dict) -> set[str]:
    """Return the columns of a record in the project's own or TRL's format that are no part of an edit.

    Args:
        record (`dict`):
            The parsed record.

    Returns:
        `set[str]`: Their names; empty for the formats of other projects, whose other columns are known.
    """
    own = "prompt" in record and ("target" in record or "completion" in record)
    return set(record) - {*OWN_COLUMNS, "completion"} if own else set()


def to_fields(record: Any) -> dict:
    """Translate a record of any known shape to the keyword arguments of [`Edit`].

    Values are not checked here: [`Edit`] does that, in its own words, for all shapes.

    Args:
        record (`Any`):
            The parsed record, expected to be a dictionary.

    Returns:
        `dict`: Keyword arguments for [`Edit`].

    Raises:
        [`EditError`]: If the record is no dictionary or has the columns of no known shape.
    """
    if not isinstance(record, dict):
        raise EditError([f"the record is a {type(record).__name__}, expected an object with `prompt` and `target`"])
    record = {name: value for name, value in record.items() if not _is_nan(value)}
    for shape in SHAPES:
        if all(column in record for column in shape.columns):
            fields = shape.to_fields(record)
            if "train_rephrases" in record:  # a field of this project's, which others' records may have been given
                fields["train_rephrases"] = record["train_rephrases"]
            return fields
    if "prompt" in record or "target" in record:
        return _own(record)
    known = "; ".join(f"{shape.name}: {' and '.join(shape.columns)}" for shape in SHAPES)
    raise EditError([f"its columns {sorted(map(str, record))} are those of no known format (needed for {known})"])


def _own(record: dict) -> dict:
    faults = []
    for name in set(record) - set(OWN_COLUMNS):
        # A misspelt column would lose its content; a column of another purpose is only reported by `load_edits`.
        near = difflib.get_close_matches(str(name), OWN_COLUMNS, n=1, cutoff=0.8)
        if near:
            faults.append(f"it has the unknown column `{name}`, did you mean `{near[0]}`?")
    if faults:
        raise EditError(sorted(faults))
    # Both are always given, so that a missing one is a fault of the record and no missing argument of `Edit`.
    return {"prompt": None, "target": None} | {name: record[name] for name in OWN_COLUMNS if name in record}


def _trl(record: dict) -> dict:
    for name in ("prompt", "completion"):
        if isinstance(record[name], list):
            raise EditError([f"`{name}` is a conversation, expected plain text: give the text of its one message"])
    return _own({**{k: v for k, v in record.items() if k != "completion"}, "target": record["completion"]})


def _zsre(record: dict) -> dict:
    return {
        "prompt": record["src"],
        "target": record["alt"],
        "subject": record.get("subject"),
        "rephrases": _listed(record.get("rephrase")),
        "locality": _pair(record.get("loc"), record.get("loc_ans")),
    }


def _counterfact(record: dict) -> dict:
    rewrite = record["requested_rewrite"]
    if isinstance(rewrite, list) and len(rewrite) == 1:
        rewrite = rewrite[0]
    if not isinstance(rewrite, dict) or not {"prompt", "target_new", "subject"} <= set(rewrite):
        raise EditError(["`requested_rewrite` is expected to be an object with `prompt`, `subject` and `target_new`"])
    prompt = rewrite["prompt"]
    if isinstance(prompt, str) and isinstance(rewrite["subject"], str):
        prompt = prompt.replace("{}", rewrite["subject"])
    return {
        "prompt": prompt,
        "target": _target(rewrite["target_new"]),
        "subject": rewrite["subject"],
        "rephrases": _listed(record.get("paraphrase_prompts")),
        "locality": _listed(record.get("neighborhood_prompts")),
        "id": _id(record.get("case_id")),
    }


def _wikibigedit(record: dict) -> dict:
    # Personas put the question in the voice of another speaker: the answer stays, so they are rephrases.
    personas = [value for name, value in record.items() if name.startswith("personas") and value]
    return {
        "prompt": record["update"],
        "target": record["ans"],
        "subject": record.get("subject"),
        "rephrases": _listed(record.get("rephrase")) + personas,
        "locality": _pair(record.get("loc"), record.get("loc_ans")),
        "portability": _pair(record.get("mhop"), record.get("mhop_ans")),
    }


def _easyedit(record: dict) -> dict:
    locality = record.get("locality")
    return {
        "prompt": record["prompt"],
        "target": _target(record["target_new"]),
        "subject": record.get("subject"),
        "rephrases": _listed(record.get("rephrase_prompt") or record.get("rephrase")),
        "locality": _groups(locality) + _pair(record.get("locality_prompt"), record.get("locality_ground_truth")),
        "portability": [probe for probe in _groups(record.get("portability")) if probe["answer"]]
        + _pair(record.get("portability_prompt"), record.get("portability_ground_truth")),
        "id": _id(record.get("case_id")),
    }


def _wikibio(record: dict) -> dict:
    return {
        "prompt": record["text"],
        "target": record["labels"],
        "subject": record.get("concept"),
        "locality": _groups(record.get("locality")),
    }


def _listed(value: Any) -> list:
    """Return a list as it is, a single value in a list, and nothing as an empty list."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _pair(prompt: Any, answer: Any) -> list[dict]:
    prompts = _listed(prompt)
    # Lists of one length go in step; otherwise the answers are alternatives, of which the first counts.
    in_step = isinstance(answer, (list, tuple)) and len(answer) == len(prompts)
    answers = answer if in_step else [answer] * len(prompts)
    return [{"prompt": text, "answer": _first(one)} for text, one in zip(prompts, answers)]


def _groups(groups: Any) -> list[dict]:
    """Flatten KnowEdit's probes: `{"Relation_Specificity": [{"prompt": ..., "ground_truth": [[...]]}, ...], ...}`."""
    if groups and not isinstance(groups, dict):
        raise EditError([f"its probes are a {type(groups).__name__}, expected an object with groups of probes"])
    probes = []
    for items in (groups or {}).values():
        for item in _listed(items):
            if not isinstance(item, dict):
                raise EditError([f"a probe is {item!r}, expected an object with `prompt` and `ground_truth`"])
            probes += _pair(item.get("prompt"), item.get("ground_truth"))
    return probes


def _first(value: Any) -> Any:
    """Return the first of nested lists of acceptable answers, or None where there is none."""
    while isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return None if value == "" else value


def _target(value: Any) -> Any:
    return _first(value.get("str") if isinstance(value, dict) else value)


def _id(value: Any) -> str | None:
    return None if value is None else str(value)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


SHAPES = (
    Shape("peft-locft", ("prompt", "target"), _own),
    Shape("TRL", ("prompt", "completion"), _trl),
    Shape("CounterFact", ("requested_rewrite",), _counterfact),
    Shape("ZsRE", ("src", "alt"), _zsre),
    Shape("WikiBigEdit", ("update", "ans"), _wikibigedit),
    Shape("EasyEdit and KnowEdit", ("prompt", "target_new"), _easyedit),
    Shape("KnowEdit WikiBio", ("text", "labels"), _wikibio),
)
