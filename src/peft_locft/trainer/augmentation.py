"""One edit in several contexts, so that it holds in other words, and where other text stands before it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence

from ..edits import Edit
from ..edits.contexts import in_context
from ..edits.tokens import find_subject


_PREFIX_WORDS = (2, 10)
# Of a question's further forms, every fourth stands behind text, and of a sentence's, which mostly does in other words as well,
# every second. In the others words are left out, so that they are no longer than the prompt, and the prefix cache and the
# steps grow less; in half of these, the subject stands elsewhere.
_QUESTIONS_TO_A_PREFIX, _SENTENCES_TO_A_PREFIX = 4, 2
_LEFT_OUT = 0.35
_MOVED = 0.5
_QUESTION_MARK = re.compile(r"\s*[?？؟]+\s*$")
# Longer words, on the average, are sentences of a language that puts no spaces between words: so many letters stand for one.
_LONGEST_WORD, _WORD_LETTERS = 20, 4
_TRIES = 8


def contexts_of(
    edit: Edit,
    count: int,
    prefixes: Sequence[str],
    chat: str | None,
    seed: int,
    is_free: Callable[[str, str], bool] = lambda form, target: True,
) -> list[str]:
    """Return further forms of an edit's prompt: as a question to be answered, as a turn of a chat, and behind random text
    that the model said (LocFT-BF, appendix on data augmentation), and with words left out and its subject at another place
    (random deletion and swap, [arXiv 1901.11196](https://arxiv.org/abs/1901.11196), section 2), so that it holds by its
    subject and not by its very words.

    Args:
        edit ([`Edit`]):
            The edit.
        count (`int`):
            How many forms beside the bare prompt.
        prefixes (`Sequence[str]`):
            Texts whose beginnings stand before the prompt.
        chat (`str`, *optional*):
            A turn of a chat, of [`chat_form`]; `None` where there are no chats.
        seed (`int`):
            The seed of the choices.
        is_free (`Callable[[str, str], bool]`, *optional*):
            Whether a form may be trained with a target. Where none may, the bare prompt stands.

    Returns:
        `list[str]`: `count` prompts.
    """
    forms = [form if is_free(form, edit.target) else edit.prompt for form in _asked(edit.prompt, chat)]
    asked = len(forms)
    choice = random.Random(f"{seed} {edit.id}")
    to_a_prefix = _QUESTIONS_TO_A_PREFIX if is_question(edit.prompt) else _SENTENCES_TO_A_PREFIX
    while len(forms) < count:
        if (len(forms) - asked) % to_a_prefix == 0:
            others = (_behind_text(edit.prompt, prefixes, choice) for _ in range(_TRIES))
        else:
            others = (_in_other_words(edit, choice) for _ in range(_TRIES))
        forms.append(next((form for form in others if is_free(form, edit.target)), edit.prompt))
    return forms[:count]


def varied(prompts: Sequence[str], chat: str | None, prefixes: Sequence[str], seed: int) -> list[str]:
    """Put prompts as people do, each in two of the ways of [`every_way`], in turn.

    Args:
        prompts (`Sequence[str]`):
            The prompts.
        chat (`str`, *optional*):
            A turn of a chat, of [`chat_form`]; `None` where there are no chats.
        prefixes (`Sequence[str]`):
            Texts whose beginnings stand before prompts.
        seed (`int`):
            The seed of the choices.

    Returns:
        `list[str]`: Twice as many prompts.
    """
    forms = []
    for number, prompt in enumerate(prompts):
        ways = every_way(prompt, chat, prefixes, seed)
        forms += [ways[place % len(ways)] for place in (number, number + 2)]
    return forms


def every_way(prompt: str, chat: str | None, prefixes: Sequence[str], seed: int) -> list[str]:
    """Put a prompt in every way that people and the forms of edits do: as it is, in lower case without a mark at its end, as a
    question to be answered, as a turn of a chat, and in lower case behind random text.

    Args:
        prompt (`str`):
            The prompt.
        chat (`str`, *optional*):
            A turn of a chat, of [`chat_form`]; `None` where there are no chats.
        prefixes (`Sequence[str]`):
            Texts whose beginnings stand before prompts.
        seed (`int`):
            The seed of the choices.

    Returns:
        `list[str]`: Four or five prompts.
    """
    lower = prompt.lower().rstrip("?？؟.。 ") or prompt
    behind = _behind_text(lower, prefixes, random.Random(f"{seed} {prompt}"))
    return [prompt, lower, *_asked(prompt, chat), behind]


def is_question(prompt: str) -> bool:
    """Return whether a prompt ends with a question mark, and is no beginning of a sentence.

    Args:
        prompt (`str`):
            The prompt.

    Returns:
        `bool`: Whether it does.
    """
    return _QUESTION_MARK.search(prompt) is not None


def _behind_text(prompt: str, prefixes: Sequence[str], choice: random.Random) -> str:
    text = choice.choice(prefixes).split()
    count = choice.randint(*_PREFIX_WORDS)
    words = " ".join(text[:count])
    if len(words) > _LONGEST_WORD * count:
        words = words[: _WORD_LETTERS * count]
    return f"{words}. {prompt}"


def _in_other_words(edit: Edit, choice: random.Random) -> str:
    moved = _moved(edit, choice) if choice.random() < _MOVED else None
    return _thinned(edit, choice) if moved is None else moved


def _moved(edit: Edit, choice: random.Random) -> str | None:
    """Leave words of a prompt out, and put its subject between others of its words, or before the mark of a question. Behind
    the last word of another prompt the answer stands, so that it stays the last.

    Returns `None` where there is no subject, or no other place for it.
    """
    subject = subject_place(edit)
    if subject is None:
        return None
    mark = _QUESTION_MARK.search(edit.prompt)
    words = list(re.finditer(r"\S+", edit.prompt[: mark.start() if mark else None]))
    if mark is None and _overlaps(words[-1], subject):
        return None
    end = f" {words.pop()[0]}" if mark is None else mark[0]
    kept = [word for word in words if not _overlaps(word, subject) and choice.random() >= _LEFT_OUT]
    before = sum(word.start() < subject.start for word in kept)
    gaps = [gap for gap in range(len(kept) + 1) if gap != before]
    if not gaps:
        return None
    gap = choice.choice(gaps)
    moved = [*kept[:gap], *(word for word in words if _overlaps(word, subject)), *kept[gap:]]
    return " ".join(word[0] for word in moved) + end


def _thinned(edit: Edit, choice: random.Random) -> str:
    """Leave words of a prompt out, but not those of its subject, nor the last, behind which the answer stands."""
    words = list(re.finditer(r"\S+\s*", edit.prompt))
    subject = subject_place(edit)

    def is_kept(word: re.Match) -> bool:
        if subject is None:  # names and numbers may be of the subject
            return any(not letter.islower() for letter in word[0] if letter.isalnum())
        return _overlaps(word, subject)

    if not any(map(is_kept, words)):
        return edit.prompt  # whatever is left out might be the name
    kept = [word[0] for word in words if word is words[-1] or is_kept(word) or choice.random() >= _LEFT_OUT]
    return "".join(kept)


def scored_prompts(edit: Edit) -> tuple[str, ...]:
    """Return what is asked when an edit is scored, beside its prompt. None of it is trained on.

    Args:
        edit ([`Edit`]):
            The edit.

    Returns:
        `tuple[str, ...]`: Its rephrases, and the prompts of its probes.
    """
    return (*edit.rephrases, *(probe.prompt for probe in (*edit.locality, *edit.portability)))


def without_edits(prompts: Iterable[str], edits: Iterable[Edit]) -> list[str]:
    """Return the prompts that are neither the edits' nor asked when these are scored.

    Args:
        prompts (`Iterable[str]`):
            The prompts.
        edits (`Iterable[Edit]`):
            The edits.

    Returns:
        `list[str]`: Some of them, in order.
    """
    taken = {text for edit in edits for text in (edit.prompt, *edit.train_rephrases, *scored_prompts(edit))}
    return [prompt for prompt in prompts if prompt not in taken]


def subject_place(edit: Edit) -> range | None:
    """Return where an edit's subject stands in its prompt.

    Args:
        edit ([`Edit`]):
            The edit.

    Returns:
        `range` or `None`: Its letters' places, the first time that it stands there; `None` where it does not.
    """
    found = find_subject(edit.prompt, edit.subject)
    return range(*found[0]) if found else None


def _overlaps(word: re.Match, places: range) -> bool:
    return word.start() < places.stop and word.end() > places.start


def _asked(prompt: str, chat: str | None) -> list[str]:
    contexts = ["question"] if chat is None else ["question", "chat"]
    return [in_context(prompt, context, chat) for context in contexts]


def drawn_form(edit: int, forms: int, epoch: int, seed: int) -> int:
    """Return which form of an edit an epoch trains: each once, in an order that differs from edit to edit, then anew.

    Args:
        edit (`int`):
            The edit's place.
        forms (`int`):
            How many forms it has.
        epoch (`int`):
            The epoch, from 0.
        seed (`int`):
            The run's seed.

    Returns:
        `int`: From 0 to `forms - 1`; 0 is the bare prompt.
    """
    around, place = divmod(epoch, forms)
    order = list(range(forms))
    random.Random(f"{seed} {edit} {around}").shuffle(order)
    return order[place]
