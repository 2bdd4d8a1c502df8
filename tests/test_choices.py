import json

import pytest
import torch
from tokenizers import processors

from qgalore.data.tokenizer import train_tokenizer
from qgalore.errors import ConfigError
from qgalore.evaluation.multiple_choice import Question, Scores, read_questions, score, with_examples

QUESTIONS = [
    Question("Question: What is red?\nAnswer:", ("a rose", "the sky", "some snow and more"), 0),
    Question("Question: What is blue?\nAnswer:", ("a rose", "the sky"), 1),
    Question("The snow is", ("white", "a rose", "blue, red"), 0),
    Question("Question: What is cold, white and often falls in winter?\nAnswer:", ("snow", "the sky"), 0),
]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"{one.prompt} {choice}" for one in QUESTIONS for choice in one.choices]
    return train_tokenizer(texts, vocab_size=300, report=lambda line: None)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(vocab_size=300, max_position_embeddings=128).eval()


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_values_are_those_of_each_text_on_its_own(tiny_llama, bos):
    """Against one unpadded forward pass a text and transformers' own loss, in fp32: sums of under 40 values of size 6
    agree within 40 · 6 · 2⁻²³ · (a few hundred terms in a product, which grow like their root) < 1e-3."""
    texts = [f"{one.prompt} {choice}" for one in QUESTIONS for choice in one.choices]
    tokenizer = train_tokenizer(texts, vocab_size=300, report=lambda line: None)
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
        puts = {"single": f"{bos} $A", "special_tokens": [(bos, tokenizer.bos_token_id)]}
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**puts)
    model = tiny_llama(vocab_size=320, max_position_embeddings=128).eval()
    made = score(model, tokenizer, QUESTIONS, batch_size=5)
    assert made.cut == 0
    for question, values in zip(QUESTIONS, made.log_likelihoods, strict=True):
        for choice, value in zip(question.choices, values, strict=True):
            ids = tokenizer(f"{question.prompt} {choice}", return_tensors="pt")["input_ids"]
            assert bos is None or ids[0, 0] == tokenizer.bos_token_id
            tail = len(tokenizer(f" {choice}", add_special_tokens=False)["input_ids"])
            labels = ids.clone()
            labels[0, :-tail] = -100
            with torch.no_grad():
                mean = model(input_ids=ids, labels=labels).loss
            assert value == pytest.approx(-float(mean) * tail, abs=1e-3)


def test_the_size_of_batches_changes_nothing_but_rounding(model, tokenizer):
    first, *others = (score(model, tokenizer, QUESTIONS, batch_size=size).log_likelihoods for size in (1, 3, 100))
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert one == pytest.approx(two, abs=1e-3)
    assert score(model, tokenizer, QUESTIONS, batch_size=3).log_likelihoods == others[0]


def test_a_model_that_knows_the_answers_is_right(model, tokenizer):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        for one in QUESTIONS:
            ids = tokenizer(f"{one.prompt} {one.choices[one.answer]}", return_tensors="pt")["input_ids"]
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    made = score(model, tokenizer, QUESTIONS)
    assert made.accuracy == made.accuracy_per_byte == 1
    wrong = [Question(one.prompt, one.choices, 1 - min(one.answer, 1)) for one in QUESTIONS]
    assert score(model, tokenizer, wrong).accuracy == 0


def test_accuracies_by_hand():
    questions = (Question("q", ("ab", "abcdefgh"), 1), Question("q", ("a", "b", "é"), 0))
    made = Scores(questions, ((-3.0, -4.0), (-1.0, -1.0, -1.5)), 0)
    assert made.accuracy == 0.5  # the short wrong one is likelier; of equals the first counts
    assert made.accuracy_per_byte == 0.5  # -1.5, -0.5: right; -1, -1, -0.75 (é has two bytes): wrong
    assert made.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert made.standard_error(0.5) == pytest.approx((0.25 / 2) ** 0.5)


def test_a_long_prompt_loses_its_beginning(tiny_llama, tokenizer):
    model = tiny_llama(vocab_size=300, max_position_embeddings=32).eval()
    long = Question("rose " * 100 + "The snow is", ("white", "blue"), 0)
    made = score(model, tokenizer, [long])
    assert made.cut == 2
    ids = tokenizer(long.prompt + " white", return_tensors="pt")["input_ids"][:, -32:]
    tail = len(tokenizer(" white")["input_ids"])
    with torch.no_grad():
        logs = model(ids).logits.log_softmax(-1)
    expected = sum(float(logs[0, place - 1, ids[0, place]]) for place in range(32 - tail, 32))
    assert made.log_likelihoods[0][0] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ConfigError, match="32 positions"):
        score(model, tokenizer, [Question("x", ("rose " * 100, "blue"), 0)])


def write(tmp_path, *rows):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_layouts(tmp_path):
    choices = ["up", " down "]
    path = write(
        tmp_path,
        {"question": "Where?", "choices": choices, "answer": 1},
        {"question": "Where?", "choices": choices, "answer": "B", "passage": "It fell."},
        {"question": "Where?", "choices": ["A", "B", "C"], "answer": "C"},
        {"query": "It fell", "choices": choices, "gold": 1},
    )
    assert read_questions(path) == [
        Question("Question: Where?\nAnswer:", ("up", "down"), 1),
        Question("It fell.\n\nQuestion: Where?\nAnswer:", ("up", "down"), 1),
        Question("Question: Where?\nAnswer:", ("A", "B", "C"), 2),
        Question("It fell", ("up", "down"), 1),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "x", "choices": ["a", "b"]}, "it needs question, choices and answer"),
        ({"question": "x", "answer": 0}, "it needs question, choices and answer"),
        ({"question": 3, "choices": ["a", "b"], "answer": 0}, "'question' is of type int"),
        ({"question": "x", "choices": ["a"], "answer": 0}, "two texts or more"),
        ({"question": "x", "choices": ["a", " "], "answer": 0}, "none of them blank"),
        ({"question": "x", "choices": ["a", "b"], "answer": 2}, "'answer' is 2; it must be an index from 0 to 1"),
        ({"question": "x", "choices": ["a", "b"], "answer": True}, "'answer' is True"),
        ({"question": "x", "choices": ["a", "b"], "answer": "C"}, "'answer' is 'C'"),
        ({"query": "x", "choices": ["a", "b"], "gold": -1}, "'gold' is -1"),
    ],
)
def test_other_rows_are_named(tmp_path, row, expected):
    path = write(tmp_path, {"query": "x", "choices": ["a", "b"], "gold": 0}, row)
    with pytest.raises(ConfigError) as error:
        read_questions(path)
    assert "line 2" in str(error.value)
    assert expected in str(error.value)


def test_examples_come_from_the_first_and_are_not_asked():
    asked = with_examples(QUESTIONS, 2)
    assert [one.answer for one in asked] == [one.answer for one in QUESTIONS[2:]]
    assert asked[0].prompt == (
        "Question: What is red?\nAnswer: a rose\n\nQuestion: What is blue?\nAnswer: the sky\n\nThe snow is"
    )
    assert with_examples(QUESTIONS, 0) == QUESTIONS
    for shots in (-1, 4):
        with pytest.raises(ConfigError, match="from 0 to 3"):
            with_examples(QUESTIONS, shots)
