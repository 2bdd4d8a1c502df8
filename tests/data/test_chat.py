"""Answers are found in what templates of several families write, and nothing else is marked."""

import pytest

from qgalore.data.chat import PLAIN_TEMPLATE, answer_spans, encode
from qgalore.data.templates import Template
from qgalore.data.tokenizer import train_tokenizer
from qgalore.errors import ConfigError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Reasoning stays in the last answer only, and the prompt opens it: as Qwen3 and its relatives do.
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}"
)
# Nothing of the beginning stays as it was once a turn is added.
COUNTS = "{{ messages | length }}" + CHATML

TURNS = [
    {"role": "user", "content": "What is the capital of Peru?"},
    {"role": "assistant", "content": "Lima."},
    {"role": "user", "content": "Lima. And how do I know, Lima or not?"},
    {"role": "assistant", "content": "Look at a map – or ask\n\na pilot: größer 🗺 is better."},
]
TEXT = [" ".join(turn["content"] for turn in TURNS)] * 4


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(TEXT, vocab_size=300, report=lambda line: None)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": "<s>"})
    return made


def answers(tokenizer, messages, template):
    tokenizer.chat_template = template
    (made,) = encode(tokenizer, [(messages, "here")])
    assert made.ids.shape == made.answer.shape
    found, run = [], []
    for token, counts in zip(made.ids.tolist(), made.answer.tolist(), strict=True):
        if counts:
            run.append(token)
        elif run:
            found.append(tokenizer.decode(run))
            run = []
    return [*found, *([tokenizer.decode(run)] if run else [])], tokenizer.decode(made.ids)


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        (PLAIN_TEMPLATE, "", "<|endoftext|>"),
        (CHATML, "", "<|im_end|>"),
        (INST, " ", " <|endoftext|>"),
        (TAGGED, "", "<|im_end|>"),
    ],
    ids=["plain", "chatml", "inst", "tagged"],
)
def test_answers_and_their_ends_are_marked_and_nothing_else(tokenizer, template, before, after):
    found, whole = answers(tokenizer, TURNS, template)
    assert found == [before + TURNS[place]["content"] + after for place in (1, 3)]
    assert whole == tokenizer.apply_chat_template(TURNS, tokenize=False)


def test_a_template_that_rewrites_earlier_turns(tokenizer):
    found, _ = answers(tokenizer, TURNS, THINKS)
    first, last = TURNS[1]["content"], TURNS[3]["content"]
    assert found[0] == first + "<|im_end|>"  # the prompt's <think> is not in the text and so no part of either
    assert found[1] == f"\n</think>\n\n{last}<|im_end|>"


def test_a_template_with_nothing_to_hold_on_to_is_refused(tokenizer):
    tokenizer.chat_template = COUNTS
    with pytest.raises(ConfigError, match=r"line 5.*turn 2, .* in another way"):
        encode(tokenizer, [(TURNS, "line 5")])


def test_what_the_template_refuses_names_the_row(tokenizer):
    tokenizer.chat_template = INST
    with pytest.raises(ConfigError, match=r"line 3.*\(system, user\): Only user and assistant roles"):
        encode(tokenizer, [([{"role": "system", "content": "x"}, TURNS[0]], "line 3")])


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, CHATML, THINKS])
def test_no_answer_blank_answers_and_an_answer_first(tokenizer, template):
    assert answers(tokenizer, TURNS[:1], template)[0] == []
    assert answers(tokenizer, [TURNS[0], {"role": "assistant", "content": " \n"}], template)[0] == []
    found, _ = answers(tokenizer, [TURNS[1], TURNS[0]], template)
    assert len(found) == 1
    assert found[0].startswith("Lima.<|")


def test_an_answer_first_that_its_own_header_spells(tokenizer):
    """The header holds an "a" too, and is not for the assistant to say."""
    turns = [{"role": "assistant", "content": "a"}, *TURNS[:2]]
    found, _ = answers(tokenizer, turns, CHATML)
    assert found == ["a<|im_end|>", "Lima.<|im_end|>"]


def test_a_question_that_quotes_its_answer_is_not_marked(tokenizer):
    tokenizer.chat_template = CHATML
    turns = [{"role": "user", "content": "Say Lima."}, {"role": "assistant", "content": "Lima."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    (span,) = answer_spans(Template(tokenizer), turns, "here", text)
    assert (span.first, span.last, span.marked) == (text.rindex("Lima."), len(text) - 1, True)


def test_a_tokenizer_without_a_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        encode(tokenizer, [(TURNS, "here")])
