"""One edit: a prompt, the answer it shall have, and the probes that judge it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any


class EditError(ValueError):
    """A record is no valid edit.

    Args:
        faults (`list[str]`):
            Every fault of the record, one sentence each.
    """

    def __init__(self, faults: list[str]):
        self.faults = faults
        super().__init__("; ".join(faults))


@dataclass(frozen=True, slots=True)
class Probe:
    """A question beside the edit, asked before and after editing.

    Args:
        prompt (`str`):
            The text the model continues.
        answer (`str`, *optional*):
            The answer that counts as right. A locality probe needs none: it is judged against the unedited model.
    """

    prompt: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit: after training, the model continues `prompt` with `target`.

    Lists are accepted for the tuple fields, and dictionaries or plain strings for probes. White space around the
    target is dropped, because exactly one space joins prompt and target in training.

    Args:
        prompt (`str`):
            The text the model continues, without a space at its end.
        target (`str`):
            The new answer.
        subject (`str`, *optional*):
            What the fact is about, as it is written in the prompt.
        rephrases (`tuple[str, ...]`, *optional*):
            The prompt in other words. Scored as generalization, never trained on.
        locality (`tuple[Probe, ...]`, *optional*):
            Questions whose answers must stay as they are. Never trained on.
        portability (`tuple[Probe, ...]`, *optional*):
            Questions whose answers follow from the edit. Each needs an answer. Never trained on.
        id (`str`, *optional*):
            A name that is unique among the edits. Defaults to a hash of prompt and target.
        source (`str`, *optional*):
            Where the new fact comes from, for whoever audits the edit.
        train_rephrases (`tuple[str, ...]`, *optional*):
            The prompt in further words, to be trained on like the prompt itself. Never scored, so none of them may be
            one of `rephrases` too.

    Raises:
        [`EditError`]: With every fault at once, if a field has the wrong type or is empty.
    """

    prompt: str
    target: str
    subject: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    id: str | None = None
    source: str | None = None
    train_rephrases: tuple[str, ...] = ()

    def __post_init__(self):
        faults: list[str] = []
        prompt = _text(self.prompt, "prompt", faults)
        if prompt != prompt.rstrip():
            faults.append(
                f"`prompt` ends in white space ({_short(prompt)}): remove it, a space is put between prompt and target"
            )
        target = _text(self.target, "target", faults).strip()
        for name in ("subject", "id", "source"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                faults.append(f"`{name}` is {_kind(value)}, expected a string")
            elif value is not None:
                _check_encodable(value, name, faults)
        rephrases, train_rephrases = (
            tuple(_text(value, f"{name}[{i}]", faults) for i, value in enumerate(_items(values, name, faults)))
            for name, values in (("rephrases", self.rephrases), ("train_rephrases", self.train_rephrases))
        )
        faults += [
            f"`train_rephrases[{i}]` ends in white space ({_short(value)}): remove it, a space is put between it and the target"
            for i, value in enumerate(train_rephrases)
            if value != value.rstrip()
        ]
        locality = _probes(self.locality, "locality", faults)
        portability = _probes(self.portability, "portability", faults)
        faults += [
            f"`portability[{i}]` has no answer: give the answer that follows from the edit"
            for i, probe in enumerate(portability)
            if probe.answer is None
        ]
        scored = dict.fromkeys(rephrases, "rephrases")
        scored |= {probe.prompt: "portability" for probe in portability} | {
            probe.prompt: "locality" for probe in locality
        }
        faults += [
            f"`train_rephrases[{i}]` ({_short(value)}) is one of `{scored[value]}` too: what is trained on cannot be scored, "
            "leave it out of one of them"
            for i, value in enumerate(train_rephrases)
            if value in scored
        ]
        if faults:
            raise EditError(faults)
        for name, value in (
            ("target", target),
            ("rephrases", rephrases),
            ("train_rephrases", train_rephrases),
            ("locality", locality),
            ("portability", portability),
            ("id", self.id or hashlib.sha256(f"{prompt}\0{target}".encode()).hexdigest()[:12]),
        ):
            object.__setattr__(self, name, value)


def _text(value: Any, name: str, faults: list[str]) -> str:
    if isinstance(value, str):
        if not value.strip():
            faults.append(f"`{name}` is empty, expected some text")
        _check_encodable(value, name, faults)
        return value
    faults.append(f"`{name}` is missing" if value is None else f"`{name}` is {_kind(value)}, expected a string")
    return ""


def _check_encodable(value: str, name: str, faults: list[str]) -> None:
    # JSON can escape half a surrogate pair, but neither a tokenizer nor a UTF-8 file takes it.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        faults.append(f"`{name}` has a lone surrogate at character {error.start + 1} ({_short(value)})")


def _items(value: Any, name: str, faults: list[str]) -> list:
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return list(value)
    faults.append(f"`{name}` is {_kind(value)}, expected a list")
    return []


def _probes(value: Any, name: str, faults: list[str]) -> tuple[Probe, ...]:
    probes = []
    for i, item in enumerate(_items(value, name, faults)):
        label = f"{name}[{i}]"
        if isinstance(item, str):
            item = Probe(item)
        elif isinstance(item, dict):
            unknown = sorted(set(item) - {"prompt", "answer"})
            if unknown:
                faults.append(f"`{label}` has unknown keys {unknown}, expected `prompt` and `answer`")
            item = Probe(item.get("prompt"), item.get("answer"))
        elif not isinstance(item, Probe):
            faults.append(f"`{label}` is {_kind(item)}, expected a string or an object with `prompt` and `answer`")
            continue
        prompt = _text(item.prompt, f"{label}.prompt", faults)
        answer = None if item.answer is None else _text(item.answer, f"{label}.answer", faults).strip()
        probes.append(Probe(prompt, answer))
    return tuple(probes)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__} ({_short(value)})"


def _short(value: Any, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
