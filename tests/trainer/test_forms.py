"""The forms that an edit is trained in beside its bare prompt."""

import pytest
from preserved import KEPT, TEXTS

from peft_locft import Edit, EditConfig, EditSet
from peft_locft.edits.contexts import chat_form
from peft_locft.trainer import augmentation
from peft_locft.trainer.augmentation import contexts_of, drawn_form, every_way, is_question, varied
from peft_locft.trainer.forms import make_forms


def test_an_epoch_visits_every_edit_once_in_one_of_its_forms(make_trainer, tokenizer, edits):
    rephrased = EditSet(
        Edit(edit.prompt, edit.target, train_rephrases=[f"Name the capital of {edit.subject}:"]) for edit in edits
    )
    trainer = make_trainer(train_dataset=rephrased, contexts=2, num_train_epochs=4, stop_loss=0, **KEPT)
    seen, pool = [], None
    draw = type(trainer.data_collator).__call__

    class Watched(type(trainer.data_collator)):
        def __call__(self, rows):
            nonlocal pool
            if self.pool is not None:
                pool = self.pool
                seen.extend((pool.epoch, row["index"], tokenizer.decode(pool.drawn(row)["input_ids"])) for row in rows)
            return draw(self, rows)

    trainer.data_collator.__class__ = Watched
    trainer.train()
    for epoch in range(4):
        assert sorted(index for when, index, _ in seen if when == epoch) == list(range(len(edits)))
    for index, edit in enumerate(edits):
        texts = {text for _, where, text in seen if where == index}
        assert len(texts) == 4  # each form once in as many epochs
        end = f" {edit.target}<eos>"
        assert f"{edit.prompt}{end}" in texts
        assert f"Name the capital of {edit.subject}:{end}" in texts
        assert f"Question: {edit.prompt}\nAnswer:{end}" in texts


@pytest.mark.parametrize(
    "text",
    ["秘鲁是南美洲的一个国家，首都是利马。" * 40, "ประเทศเปรูอยู่ในทวีปอเมริกาใต้มีเมืองหลวงชื่อลิมา" * 40],
    ids=["Chinese", "Thai"],
)
def test_a_few_words_of_a_text_without_spaces_are_a_few_letters(text):
    prompt = "利马在哪里？"
    forms = [form for seed in range(8) for form in contexts_of(Edit(prompt, "秘鲁"), 4, [text], None, seed)]
    behind = [form for form in forms if form.endswith(f". {prompt}")]
    assert behind and all(len(form) <= len(prompt) + 2 + 40 for form in behind)
    assert all(text.startswith(form.removesuffix(f". {prompt}")) for form in behind)
    assert every_way(prompt, None, [text], 0)[1] == "利马在哪里"


def in_fewer_words(edit, seeds):
    places = (2, 3, 4) if is_question(edit.prompt) else (2, 4)  # at the others, there is a question, or text before
    return [contexts_of(edit, 5, TEXTS, None, seed)[place] for seed in range(seeds) for place in places]


@pytest.mark.parametrize(
    ("prompt", "end", "behind"),
    [("The capital of Kazakhstan is", "is", {2, 4, 6}), ("Who rules Kazakhstan and its land?", "land?", {2, 6})],
)
def test_contexts_are_question_chat_prefixes_and_words_left_out(prompt, end, behind):
    chat = "<user>{the prompt}<model>"
    edit = Edit(prompt, "x")
    forms = contexts_of(edit, 8, TEXTS, chat, 0)
    assert forms[0] == f"Question: {prompt}\nAnswer:"
    assert forms[1] == f"<user>{prompt}<model>"
    for place, form in enumerate(forms[2:], 2):
        if place in behind:
            assert form.endswith(f". {prompt}")
            assert any(text.startswith(form.removesuffix(f". {prompt}")) for text in TEXTS)
        else:
            assert form.endswith(f" {end}") and set(form.split()) <= set(prompt.split()) and "Kazakhstan" in form
    assert forms == contexts_of(edit, 8, TEXTS, chat, 0)
    assert contexts_of(edit, 1, TEXTS, chat, 0) == forms[:1]
    assert len(contexts_of(edit, 4, TEXTS, None, 0)) == 4


@pytest.mark.parametrize(
    ("edit", "kept"),
    [
        (
            Edit("Who wrote the play  called The Cherry Orchard?", "x", subject="The Cherry Orchard"),
            "The Cherry Orchard?",
        ),
        (Edit("In which year was the firm of Acme made", "x"), "In Acme made"),  # no subject is given: names stay
        (Edit("Reedy Glacier is in", "x"), "Reedy Glacier in"),
        (Edit("where is the glacier called reedy", "x"), "where is the glacier called reedy"),  # any may be the name
        (Edit("what is the sum of 17 and one", "x"), "17 one"),
        (Edit("墨西哥的首都是哪里", "x"), "墨西哥的首都是哪里"),
    ],
    ids=["subject", "names", "a name first", "no capitals", "numbers", "no spaces"],
)
def test_words_are_left_out_but_those_of_the_subject_and_the_last(edit, kept, monkeypatch):
    monkeypatch.setattr(augmentation, "_MOVED", 0)
    thinned = in_fewer_words(edit, 3000)
    words = edit.prompt.split()
    for form in thinned:
        left = iter(words)
        assert all(word in left for word in form.split())  # in their order
        assert all(word in form.split() for word in kept.split())
    assert any(" ".join(form.split()) == kept for form in thinned)
    assert all(any(word not in form.split() for form in thinned) for word in set(words) - set(kept.split()))


@pytest.mark.parametrize(
    ("edit", "some", "end"),
    [
        (
            Edit("Which company is Acme Inc. a part of?", "x", subject="Acme Inc."),
            {"Acme Inc. Which company is a part of?", "Which company is a part of Acme Inc.?", "part Acme Inc.?"},
            "?",
        ),
        (
            Edit("哪个国家 是 墨西哥 的 邻居？", "x", subject="墨西哥"),
            {"墨西哥 是？", "哪个国家 墨西哥 是 邻居？"},
            "？",
        ),
        (Edit("Who wrote Why Me?", "x", subject="Why Me?"), {"Why Me Who?", "Who Why Me wrote?"}, "?"),
        (
            Edit("The capital of Peru is", "x", subject="Peru"),
            {"Peru The capital of is", "The Peru capital is"},
            " is",
        ),
        (
            Edit("The firm's, Acme's, boss is", "x", subject="Acme"),
            {"Acme's, The is", "boss Acme's, is"},
            " is",
        ),
    ],
    ids=["question", "another mark", "a mark in the subject", "no question", "not only the subject in a word"],
)
def test_the_subject_stands_elsewhere_in_half_of_these(edit, some, end):
    forms = in_fewer_words(edit, 3000)
    words = edit.prompt.removesuffix(end).split()
    name = edit.subject.removesuffix(end).split()
    (at,) = (n for n in range(len(words)) if all(mine in word for mine, word in zip(name, words[n:])))
    before, name, after = words[:at], words[at : at + len(name)], words[at + len(name) :]

    def is_moved(form):
        body = form.removesuffix(end).split()
        (at,) = (n for n in range(len(body)) if body[n : n + len(name)] == name)
        others = body[:at], body[at + len(name) :]
        left = iter(before + after)
        assert all(word in left for part in others for word in part)  # in their order
        return bool(set(others[0]) & set(after) or set(others[1]) & set(before))

    assert all(form.endswith(end) for form in forms)
    assert some <= set(forms)
    assert 0.3 < sum(map(is_moved, forms)) / len(forms) <= 0.55


@pytest.mark.parametrize("edit", [Edit("Peru is", "x", subject="Peru"), Edit("We know Peru", "x", subject="Peru")])
def test_a_subject_that_has_no_other_place_stays(edit):
    forms = set(in_fewer_words(edit, 200))
    assert all(form.split() == sorted(form.split(), key=edit.prompt.split().index) for form in forms)


def test_questions_are_put_in_several_ways():
    plain = ["Who is it?", "who is it", "Question: Who is it?\nAnswer:"]
    *ways, behind = every_way("Who is it?", None, TEXTS, 0)
    assert ways == plain
    text, question = behind.rsplit(". ", 1)
    assert question == "who is it"
    assert 2 <= len(text.split()) <= 10 and any(whole.startswith(text) for whole in TEXTS)
    assert every_way("Who is it?", None, TEXTS, 0)[-1] == behind
    assert len({every_way("Who is it?", None, TEXTS, seed)[-1] for seed in range(20)}) > 1
    *ways, _ = every_way("Who is it?", "<{the prompt}>", TEXTS, 0)
    assert ways == [*plain, "<Who is it?>"]


def test_each_question_is_put_in_two_of_its_ways_and_all_ways_are_used():
    ways = every_way("Who is it?", "<{the prompt}>", TEXTS, 0)
    forms = varied(["Who is it?"] * 5, "<{the prompt}>", TEXTS, 0)
    assert forms == [ways[place] for place in (0, 2, 1, 3, 2, 4, 3, 0, 4, 1)]
    assert all(len(set(pair)) == 2 for pair in zip(forms[::2], forms[1::2]))


def test_a_chat_template_is_used_where_there_is_one(smollm, edits):
    tokenizer = smollm[1]
    chat = contexts_of(edits[0], 2, TEXTS, chat_form(tokenizer), 0)[1]
    assert chat == tokenizer.apply_chat_template(
        [{"role": "user", "content": edits[0].prompt}], tokenize=False, add_generation_prompt=True
    )


def test_forms_come_in_turn(edits):
    for edit in range(5):
        for around in range(3):
            epochs = range(around * 4, around * 4 + 4)
            assert sorted(drawn_form(edit, 4, epoch, seed=1) for epoch in epochs) == [0, 1, 2, 3]
    assert len({tuple(drawn_form(edit, 4, epoch, seed=1) for epoch in range(4)) for edit in range(20)}) > 5


def test_forms_that_rest_would_be_missed(make_trainer, edits, tmp_path):
    with pytest.raises(ValueError, match="`recheck_epochs` is 2 with `contexts=3`, expected one of them"):
        EditConfig(output_dir=str(tmp_path), recheck_epochs=2, contexts=3)
    rephrased = EditSet([Edit("One is", "two", train_rephrases=["Two is"]), Edit("Three is", "four")])
    with pytest.raises(ValueError, match="`recheck_epochs` is 2 and edits have `train_rephrases`"):
        make_trainer(train_dataset=rephrased, recheck_epochs=2)


def test_forms_that_are_too_long_are_counted(make_trainer):
    long = {"preservation_texts": ["word " * 10]}
    with pytest.warns(
        UserWarning, match=r"[1-9] of 16 further forms of edits are not trained on: .* the 25 tokens that"
    ):
        make_trainer(contexts=2, max_length=25, num_train_epochs=1, **long).train()


_ABOUT = {
    "mother": "Marie",
    "mother tongue": "French",
    "birth place": "Bordeaux",
    "father": "Jean",
    "occupation": "actress",
}


@pytest.mark.parametrize("seed", range(5))
def test_no_form_contradicts_another_edit_or_is_scored(tokenizer, seed):
    edits = EditSet(
        Edit(
            f"The {what} of Danielle Darrieux is",
            target,
            subject="Danielle Darrieux",
            rephrases=[f"{what} of Danielle Darrieux is"],
            locality=[{"prompt": "The Danielle Darrieux is"}],
        )
        for what, target in _ABOUT.items()
    )

    def clashes(forms):
        taught = {edit.prompt: {edit.target} for edit in edits}
        for edit, form in forms:
            taught.setdefault(form, set()).add(edit.target)
        scored = {prompt for edit in edits for prompt in (*edit.rephrases, edit.locality[0].prompt)}
        return [form for form, targets in taught.items() if len(targets) > 1 or form in scored]

    apart = [(edit, form) for edit in edits for form in contexts_of(edit, 12, TEXTS, None, seed)]
    assert clashes(apart)  # each edit by itself does not know of the others
    rows = make_forms(edits, 12, TEXTS, None, tokenizer, None, seed)
    assert len(rows) == 12 * len(edits)
    found = []
    for row in rows:
        edit = edits[row["index"]]
        found.append((edit, tokenizer.decode(row["input_ids"]).removesuffix(f" {edit.target}<eos>")))
    assert not clashes(found)


@pytest.mark.parametrize("prefix", [False, True])
def test_no_wrapped_form_is_scored(tokenizer, prefix):
    prompt = "The king of Peru is"
    scored = f"Question: {prompt}\nAnswer:"
    texts = ["Some words of old"] if prefix else TEXTS
    edit = Edit(
        prompt,
        "Lima",
        subject="Peru",
        rephrases=[scored, *[f"{'Some words of old'[:n]}. {prompt}" for n in (10, 13, 17)]],
    )
    rows = make_forms(EditSet([edit]), 8, texts, None, tokenizer, None, 0)
    found = [tokenizer.decode(row["input_ids"]).removesuffix(" Lima<eos>") for row in rows]
    assert len(found) == 8 and not set(edit.rephrases) & set(found)
    assert prefix == (f"Some words of old. {prompt}" in contexts_of(edit, 8, texts, None, 0))


def test_more_forms_than_epochs_are_told(make_trainer):
    with pytest.warns(
        UserWarning, match="an edit has up to 7 forms, of which each of the 3 epochs trains one, so that some"
    ):
        make_trainer(contexts=6, num_train_epochs=3, **KEPT).train()


def test_a_probe_that_is_another_edits_prompt_is_told(make_trainer):
    edits = EditSet(
        [
            Edit("The king of Peru is", "Lima", rephrases=["Who rules Cuba?"], id="first"),
            Edit("Who rules Cuba?", "Oslo", locality=[{"prompt": "Who rules Spain?"}]),
            Edit("The king of Chile is", "Oslo", rephrases=["Who is king there?"]),
            Edit("Who rules Fiji?", "Suva", rephrases=["Who rules Fiji?"], id="last"),
        ]
    )
    with pytest.warns(UserWarning) as told:
        make_trainer(train_dataset=edits)
    assert [str(warning.message) for warning in told if "scored" in str(warning.message)] == [
        "2 of the edits' rephrases and probes are trained on as prompts of edits, and say nothing about what was not trained: "
        "[\"'Who rules Cuba?' of first\", \"'Who rules Fiji?' of last\"]. Leave them out, to be scored on the others alone"
    ]
    make_trainer(train_dataset=edits[1:3])  # which no warning of ours passes
