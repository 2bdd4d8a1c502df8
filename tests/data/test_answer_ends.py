"""What ends an answer is trained, nothing after it is, and its id is known to whoever exports."""

from datetime import date

import pytest

from qgalore.data.chat import PLAIN_TEMPLATE, answer_ends, encode
from qgalore.data.templates import Template, writes_date
from qgalore.data.tokenizer import train_tokenizer
from qgalore.errors import ConfigError

TURNS = [
    {"role": "user", "content": "Name a city."},
    {"role": "assistant", "content": "a"},  # also a letter of every header
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "Lima."},
]
LOOP = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
PROMPT = "{{ '<|im_start|>assistant\\n' }}"
CHATML = LOOP + "{% if add_generation_prompt %}" + PROMPT + "{% endif %}"
# A turn ends where the next one begins.
BARE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORDS = (  # the mark is text, and the next prompt is always there
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\nEND\\n' }}{% endfor %}{{ 'assistant: ' }}"
)
TAGS = "{% for m in messages %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(["Name a city. Lima. Another? assistant user END"] * 4, vocab_size=300)
    names = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]
    made.add_special_tokens({"additional_special_tokens": names})
    return made


def learned(tokenizer, template, **options):
    tokenizer.chat_template = template
    (made,) = encode(tokenizer, [(TURNS, "row 1")], **options)
    return tokenizer.decode(made.ids[made.answer]), made


@pytest.mark.parametrize("template", [CHATML, LOOP + PROMPT], ids=["when asked", "always"])
def test_the_next_prompt_is_not_trained(tokenizer, template):
    said, made = learned(tokenizer, template)
    assert said == "a<|im_end|>Lima.<|im_end|>"
    assert made.endless == 0
    assert answer_ends(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_prompt_that_cannot_be_told_from_the_mark_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"row 1: .*writes the next prompt.*add_generation_prompt"):
        learned(tokenizer, WORDS)
    learned(tokenizer, WORDS.replace("{{ 'assistant: ' }}", "{% if add_generation_prompt %}assistant: {% endif %}"))
    assert answer_ends(tokenizer) == []  # a mark of letters is no token


def test_answers_without_an_end_are_counted(tokenizer):
    said, made = learned(tokenizer, BARE)
    assert said == "aLima."
    assert made.endless == 2
    assert answer_ends(tokenizer) == []


def test_the_ends_of_other_templates(tokenizer):
    tokenizer.chat_template = PLAIN_TEMPLATE
    assert answer_ends(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = TAGS
    assert answer_ends(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    tokenizer.chat_template = TAGS.replace(" + '<|im_end|>'", "")
    assert answer_ends(tokenizer) == []
    tokenizer.chat_template = "{{ 1 / 0 }}"
    assert answer_ends(tokenizer) == []
    tokenizer.chat_template = None
    assert answer_ends(tokenizer) == []


@pytest.mark.parametrize(
    "broken", ["{{ 1 / 0 }}", "{{ messages[9].role }}", "{{ 'x' + 1 }}", "{% for %}", "{{ '\ud83d' }}"]
)
def test_a_template_that_fails_names_the_row(tokenizer, broken):
    with pytest.raises(ConfigError, match="row 1: "):
        learned(tokenizer, CHATML + broken)


def test_the_date_is_that_of_the_run(tokenizer):
    dated = "{{ strftime_now('%d %b %Y') + \"|\" + strftime_now(\"%Y\") + '|' }}" + CHATML
    assert not writes_date(tokenizer)
    _, made = learned(tokenizer, dated, day=date(2021, 3, 4))
    assert writes_date(tokenizer)
    assert tokenizer.decode(made.ids).startswith("04 Mar 2021|2021|<|im_start|>")
    tokenizer.chat_template = "{% set how = '%d' %}{{ strftime_now(how) }}" + CHATML
    with pytest.raises(ConfigError, match="format that it computes"):
        Template(tokenizer, date(2021, 3, 4))
