"""Perplexity and multiple choice, against a plain loop that reads one window at a time and no padding."""

import copy
import json
import math

import pytest
import torch
from decoding_cases import OWN
from peft import PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F

from peft_locft import (
    Choice,
    EditDataError,
    LocFTConfig,
    load_choices,
    multiple_choice_accuracy,
    perplexity,
)
from peft_locft.evaluation import capability


TEXTS = [
    "The capital of Peru is Lima. What is the capital of Kazakhstan? The capital of Kazakhstan is Astana.",
    "Oslo is",
    "",
    "What is the capital of Norway? Oslo. What is the capital of Nepal? Kathmandu, and that of Cuba is Havana.",
    "Nairobi, Nairobi",
]
QUESTIONS = [
    Choice("The capital of Peru is", ("Lima", "Oslo", "the capital of Kenya"), 0),
    Choice("Question: What is the capital of Chile?\nAnswer:", ("is", "Santiago"), 1),
    Choice("Nepal", ("Kathmandu. What is it?", "Havana", "Ulaanbaatar", "a"), 2),
    Choice("The capital of Norway is", ("Oslo", "Astana"), 0),
]


@torch.no_grad()
def token_log_probabilities(model, ids):
    """Of each token but the first, by one forward pass over these tokens alone."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()  # (seq, vocab)
    return [F.log_softmax(logits[i], dim=-1)[token].item() for i, token in enumerate(ids[1:])]


def plain_perplexity(model, tokenizer, texts, length):
    scored = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        while ids:
            scored += token_log_probabilities(model, ids[:length])
            ids = ids[length:]
    return math.exp(-sum(scored) / len(scored))


def plain_scores(model, tokenizer, question):
    prompt = tokenizer(question.prompt)["input_ids"]
    for choice in question.choices:
        ids = tokenizer(f"{question.prompt} {choice}")["input_ids"]
        assert ids[: len(prompt)] == prompt
        yield sum(token_log_probabilities(model, ids)[len(prompt) - 1 :]) / len(choice)


def plain_accuracy(model, tokenizer, questions):
    right = 0
    for question in questions:
        scores = list(plain_scores(model, tokenizer, question))
        right += scores.index(max(scores)) == question.answer
    return right / len(questions)


# ---- Perplexity ----


@pytest.mark.parametrize("architecture", [*OWN, "mixtral", "falcon_alibi", "bloom", "mamba", "gemma3_multimodal"])
def test_perplexity_is_that_of_single_windows(architecture, build, tokenizer):
    model = build(architecture)
    for length, batch_size in ((16, 8), (5, 3), (512, 1)):
        length_read = min(length, 64)
        expected = plain_perplexity(model, tokenizer, TEXTS, length_read)
        assert perplexity(model, tokenizer, TEXTS, max_length=length, batch_size=batch_size) == pytest.approx(
            expected, rel=1e-5
        )


def test_windows_are_no_longer_than_the_context(make_model, tokenizer):
    model = make_model("gpt2")  # whose table of positions has 64 rows
    text = " ".join(TEXTS * 3)
    assert len(tokenizer(text)["input_ids"]) > 128
    expected = plain_perplexity(model, tokenizer, [text], 64)
    assert perplexity(model, tokenizer, [text]) == pytest.approx(expected, rel=1e-5)


def test_every_window_begins_with_bos_where_the_texts_do(make_model, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert ids[0] == bos
    model = make_model()
    windows = [[bos, *ids[begin : begin + 9]] for begin in range(1, len(ids), 9)]
    scored = [value for window in windows for value in token_log_probabilities(model, window)]
    assert len(scored) == len(ids) - 1  # every token of the text
    expected = math.exp(-sum(scored) / len(scored))
    assert perplexity(model, tokenizer, TEXTS[:1], max_length=10) == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_size_of_its_vocabulary(make_model, tokenizer):
    model = make_model(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tokenizer, TEXTS) == pytest.approx(model.config.vocab_size)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_multimodal", "opt"])
def test_logits_are_made_in_pieces_and_the_layers_are_run_once(architecture, build, tokenizer, monkeypatch):
    model = build(architecture)
    whole = perplexity(model, tokenizer, TEXTS, max_length=16)
    accuracy = multiple_choice_accuracy(model, tokenizer, QUESTIONS)
    monkeypatch.setattr(capability, "_LOGITS", 3 * model.config.get_text_config().vocab_size + 1)
    rows, runs = [], []
    decoder = model.get_decoder()
    hooks = [
        model.get_output_embeddings().register_forward_hook(lambda *a: rows.append(a[2].shape[:-1].numel())),
        decoder.layers[0].register_forward_hook(lambda *a: runs.append(1)),
    ]
    assert perplexity(model, tokenizer, TEXTS, max_length=16, batch_size=64) == pytest.approx(whole, rel=1e-6)
    assert max(rows) == 3 and len(rows) > 10 and len(runs) == 1
    assert multiple_choice_accuracy(model, tokenizer, QUESTIONS) == accuracy
    for hook in hooks:
        hook.remove()
    assert "forward" not in vars(decoder)


def test_a_forward_of_the_modules_own_is_put_back(make_model, tokenizer):
    model = make_model()
    expected = perplexity(model, tokenizer, TEXTS)
    own = model.model.forward
    calls = []

    def forward(*args, **kwargs):  # as accelerate's hooks do
        calls.append(1)
        return own(*args, **kwargs)

    model.model.forward = forward
    assert perplexity(model, tokenizer, TEXTS) == expected and calls == [1]
    assert model.model.forward is forward


def test_the_model_is_read_in_evaluation_mode_and_put_back(make_model, tokenizer):
    model = make_model("gpt2")  # with dropout
    expected = perplexity(model, tokenizer, TEXTS), multiple_choice_accuracy(model, tokenizer, QUESTIONS)
    model.train()
    model.transformer.h[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert (perplexity(model, tokenizer, TEXTS), multiple_choice_accuracy(model, tokenizer, QUESTIONS)) == expected
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(IndexError):
        model.transformer.wte.weight = torch.nn.Parameter(torch.zeros(1, 64))
        perplexity(model, tokenizer, TEXTS)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert "forward" not in vars(model.transformer)


def test_an_adapter_counts_as_far_as_it_is_switched_on(make_model, tokenizer):
    base = perplexity(make_model(), tokenizer, TEXTS)
    model = get_peft_model(make_model(), LocFTConfig(layers=[1], init_weights=False))
    edited = perplexity(model, tokenizer, TEXTS)
    assert edited == pytest.approx(plain_perplexity(model, tokenizer, TEXTS, 64), rel=1e-5) != pytest.approx(base)
    with model.disable_adapter():
        assert perplexity(model, tokenizer, TEXTS) == pytest.approx(base, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_computed_in_float32(dtype, make_model, tokenizer):
    model = make_model().to(dtype)
    assert perplexity(model, tokenizer, TEXTS, batch_size=1) == pytest.approx(
        plain_perplexity(model, tokenizer, TEXTS, 64), rel=1e-3
    )


def test_a_broken_model_is_reported_as_such(make_model, tokenizer):
    model = make_model(tie_word_embeddings=False)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    assert math.isnan(perplexity(model, tokenizer, TEXTS))
    assert multiple_choice_accuracy(model, tokenizer, QUESTIONS) == 0.0
    model = make_model(tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight, std=1e6)
    assert perplexity(model, tokenizer, TEXTS) == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "`texts` is [], expected a list of at least one text"),
        ({"texts": "Lima"}, "`texts` is 'Lima', expected a list of at least one text"),
        ({"texts": ["Lima", None]}, "`texts` is ['Lima', None], expected a list of at least one text"),
        (
            {"texts": ["", "a"]},
            "none of the 2 texts has 2 tokens, and the first token of a text is not scored: give longer texts",
        ),
        ({"texts": TEXTS, "max_length": 1}, "`max_length` is 1, expected an integer of at least 2"),
        ({"texts": TEXTS, "batch_size": 0}, "`batch_size` is 0, expected an integer of at least 1"),
    ],
)
def test_what_has_no_perplexity_is_refused(arguments, message, make_model, tokenizer):
    with pytest.raises(ValueError) as raised:
        perplexity(make_model(), tokenizer, **arguments)
    assert str(raised.value) == message


def test_a_learned_prompt_is_refused(make_model, tokenizer):
    model = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError) as raised:
        perplexity(model, tokenizer, TEXTS)
    assert str(raised.value) == (
        "PromptTuningConfig puts a learned prompt before the text, expected a model whose adapter changes modules, such "
        "as LocFTConfig or LoraConfig"
    )


# ---- Multiple choice ----


@pytest.mark.parametrize("architecture", [*OWN, "bloom", "mamba", "gemma3_multimodal"])
def test_accuracy_is_that_of_single_choices(architecture, build, tokenizer):
    model = build(architecture)
    expected = plain_accuracy(model, tokenizer, QUESTIONS)
    # With the likeliest choice as the right one, so that the share is not low by chance.
    best = []
    for question in QUESTIONS:
        scores = list(plain_scores(model, tokenizer, question))
        best.append(Choice(question.prompt, question.choices, scores.index(max(scores))))
    for batch_size in (1, 3, 32):
        assert multiple_choice_accuracy(model, tokenizer, QUESTIONS, batch_size=batch_size) == expected
        assert multiple_choice_accuracy(model, tokenizer, best, batch_size=batch_size) == 1.0


def test_scores_are_divided_by_the_number_of_characters(make_model, tokenizer):
    model = make_model(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)  # every token is as likely as any other
    few, many = "x", "Kathmandu Santiago Lima"
    tokens = [len(tokenizer(f" {choice}")["input_ids"]) for choice in (few, many)]
    # By the sum the first would win, by the mean over characters it is the second.
    assert tokens[0] < tokens[1] and tokens[0] / len(few) > tokens[1] / len(many)
    assert multiple_choice_accuracy(model, tokenizer, [Choice("Peru", (few, many), 1)]) == 1.0
    # Of equal ones it is the first.
    assert multiple_choice_accuracy(model, tokenizer, [Choice("Peru", ("x", "y"), 0)]) == 1.0


def test_questions_that_cannot_be_asked_are_refused(make_model, tokenizer):
    model = make_model()
    for questions, shown in (([], "[]"), (["Lima?"], "['Lima?']")):
        with pytest.raises(ValueError) as raised:
            multiple_choice_accuracy(model, tokenizer, questions)
        assert str(raised.value) == f"`questions` is {shown}, expected a list of at least one `Choice`"
    long = Choice("zq " * 40 + "is", ("Lima", "Oslo"), 0)
    with pytest.raises(ValueError) as raised:
        multiple_choice_accuracy(model, tokenizer, [*QUESTIONS, long, long])
    assert str(raised.value) == (
        "2 of the 6 questions, number 5 first, are longer than the 64 tokens of the model's context: leave them out"
    )
    with pytest.raises(ValueError, match="`batch_size` is 0, expected an integer of at least 1"):
        multiple_choice_accuracy(model, tokenizer, QUESTIONS, batch_size=0)


def test_a_question_is_checked_in_full():
    assert Choice("p", [" a ", "b\n"], 1) == Choice("p", ("a", "b"), 1)
    with pytest.raises(ValueError) as raised:
        Choice("p ", ("a",), 0)
    assert str(raised.value) == (
        "`prompt` is 'p ', expected a text without white space at its end; `choices` is ('a',), expected at least two "
        "texts that are not empty"
    )
    for answer in (2, -1, True, "a"):
        with pytest.raises(ValueError) as raised:
            Choice("p", ("a", "b"), answer)
        assert str(raised.value) == f"`answer` is {answer!r}, expected the index of one of the choices, 0 to 1"


# ---- Files ----


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "questions.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def instruction(question, choices, names):
    numbered = " ".join(f"Answer{number}: {choice}" for number, choice in enumerate(choices, 1))
    return f"Please choose the correct answer to the question: {question}\n\n{numbered}\n\nAnswer format: {'/'.join(names)}"


def test_both_shapes_are_read(write):
    names = ["answer1", "answer2", "answer3"]
    records = [
        {"prompt": "The capital of Peru is", "choices": ["Lima", "Oslo"], "answer": 0},
        {"instruction": instruction("Which? This: a", ["one 1", "two: 2", "3"], names), "answer": "answer2"},
    ]
    assert load_choices(write(records)) == [
        Choice("The capital of Peru is", ("Lima", "Oslo"), 0),
        Choice("Question: Which? This: a\nAnswer:", ("one 1", "two: 2", "3"), 1),
    ]


def test_every_fault_is_reported_and_nothing_is_loaded(write):
    names = ["answer1", "answer2"]
    path = write(
        [
            {"prompt": "p", "choices": ["a", "b"], "answer": 1},
            {"prompt": "", "choices": ["a", "b"], "answer": 2},
            "p",
            {"question": "p", "answer": "a"},
            {"instruction": "Is it so?", "answer": "true"},
            {"instruction": instruction("p", ["a", "b", "c"], names), "answer": "answer4"},
            {"instruction": instruction("p", ["a", " "], names), "answer": "answer1"},
        ]
    )
    with pytest.raises(EditDataError) as raised:
        load_choices(path)
    assert str(raised.value).splitlines() == [
        f"{path}: 8 faults, nothing was loaded:",
        "  record 2: `prompt` is '', expected a text without white space at its end",
        "  record 2: `answer` is 2, expected the index of one of the choices, 0 to 1",
        "  record 3: it is 'p', expected an object",
        "  record 4: it has the columns ['question', 'answer'], expected prompt, choices and answer, or instruction and "
        "answer",
        "  record 5: `instruction` is 'Is it so?', expected 'Please choose the correct answer to the question: ... "
        "Answer1: ... Answer2: ... Answer format: answer1/answer2'",
        "  record 6: `instruction` has the choices ['answer1', 'answer2', 'answer3'], but says that they are ['answer1', "
        "'answer2']",
        "  record 6: `answer` is 'answer4', expected one of ['answer1', 'answer2']",
        "  record 7: `choices` is ('a ', ''), expected at least two texts that are not empty",
    ]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("[", "line 1: not JSON: Expecting value at column 2"),
        ("[]", "it holds [], expected an array of at least one question"),
        ("{}", "it holds {}, expected an array of at least one question"),
    ],
)
def test_a_file_of_no_questions_is_refused(content, fault, write):
    path = write(content)
    with pytest.raises(EditDataError) as raised:
        load_choices(path)
    assert str(raised.value) == f"{path}: 1 fault, nothing was loaded:\n  {fault}"
    path.write_bytes(b"\xff")
    with pytest.raises(EditDataError, match="it is not UTF-8 text"):
        load_choices(path)
    with pytest.raises(FileNotFoundError):
        load_choices(path.with_name("none.json"))


@pytest.mark.parametrize(("name", "label", "sizes"), [("arc_easy", "Answer", {3, 4, 5}), ("piqa", "Solution", {2})])
def test_real_files_are_read_in_full(name, label, sizes, shared_data):
    path = shared_data / f"{name}_600.json"
    questions = load_choices(path)
    records = json.loads(path.read_text())
    assert len(questions) == len(records) == 600
    assert {len(question.choices) for question in questions} == sizes
    for question, record in zip(questions, records):
        # Another column says which one is right.
        assert record["output"].removeprefix("the correct answer is ") == f"{label.lower()}{question.answer + 1}"
        # Put together again, it is what the file says.
        text = question.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        parts = [f"{label}{number}: {choice}" for number, choice in enumerate(question.choices, 1)]
        names = "/".join(f"{label.lower()}{number}" for number in range(1, len(parts) + 1))
        whole = f"Please choose the correct {label.lower()} to the question: {text} {' '.join(parts)} Answer format: {names}"
        assert record["instruction"].split() == whole.split()


def test_a_real_model_knows_what_everybody_knows(smollm, shared_data):
    model, tokenizer = smollm
    questions = [
        Choice("The capital of France is", ("Madrid", "Paris", "Berlin"), 1),
        Choice("The capital of Italy is", ("London", "Athens", "Rome"), 2),
        Choice("The opposite of hot is", ("seven", "bread", "cold"), 2),
        Choice("Monday, Tuesday,", ("Wednesday", "Saturday", "September"), 0),
    ]
    accuracy = multiple_choice_accuracy(model, tokenizer, questions)
    assert accuracy == plain_accuracy(model, tokenizer, questions) and accuracy >= 0.75
    text = (shared_data / "wikitext2_valid.txt").read_text(encoding="utf-8")[:3000]
    before = perplexity(model, tokenizer, [text])
    assert 10 < before < 60
    # And what breaks it shows.
    torch.nn.init.normal_(model.model.layers[20].mlp.down_proj.weight, std=0.5)
    assert perplexity(model, tokenizer, [text]) > 2 * before
