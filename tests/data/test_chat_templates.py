"""Answers under templates built as those of Llama 3, Qwen2.5, Mistral, Gemma and Phi 3.5 are, written anew here.

``GEN … END`` is where the answer is: left out, as those families ship their templates, or written as generation
blocks, with which transformers itself says what an answer is.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgalore.data.chat import encode
from qgalore.data.instruct import conversations_to_disk
from qgalore.data.packing import IGNORED, PackedSequences
from qgalore.data.tokenizer import train_tokenizer
from qgalore.errors import ConfigError

# A header and a blank line before each turn, contents trimmed, bos with the first; a system turn with a date.
LLAMA3 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set said = messages[0].content | trim %}{% set turns = messages[1:] %}
{%- else %}{% set said = '' %}{% set turns = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: 1 May 2024\n\n' + said + '<|eot_id|>' }}
{%- for turn in turns %}
    {%- if turn.role == 'tool' or 'tool_calls' in turn %}{{ raise_exception('tools are not tried here') }}{% endif %}
    {{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' }}
    {%- if turn.role == 'assistant' %}GEN{{ turn.content | trim + '<|eot_id|>' }}END
    {%- else %}{{ turn.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
# A system turn is invented where there is none; turns are not trimmed; results of tools would be a user's.
QWEN = """
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe of help.<|im_end|>\n' }}{% endif %}
{%- for turn in messages %}
    {%- if turn.role == 'assistant' and not turn.tool_calls %}
        {{- '<|im_start|>assistant\n' }}GEN{{ turn.content + '<|im_end|>' }}END{{ '\n' }}
    {%- elif turn.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + turn.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
# No prompt for an answer, a blank before it, eos at its end; roles must alternate, and a system turn is refused.
MISTRAL = """
{{- bos_token }}
{%- for turn in messages %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if turn.role == 'user' %}{{ '[INST] ' + turn.content + ' [/INST]' }}
    {%- else %}GEN{{ ' ' + turn.content + eos_token }}END{% endif %}
{%- endfor %}
"""
# Newer ones put a system turn into the last user's turn if nothing follows it: a training text then lacks it.
MISTRAL_SYSTEM = """
{%- if messages[0].role == 'system' %}{% set said = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn.role == 'user' and loop.last and said is defined %}
        {{- '[INST] ' + said + '\n\n' + turn.content + '[/INST]' }}
    {%- elif turn.role == 'user' %}{{ '[INST] ' + turn.content + '[/INST]' }}
    {%- else %}GEN{{ ' ' + turn.content | trim + eos_token }}END{% endif %}
{%- endfor %}
"""
# The assistant is called model; no system turn.
GEMMA = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for turn in messages %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if turn.role == 'user' %}{{ '<start_of_turn>user\n' + turn.content | trim + '<end_of_turn>\n' }}
    {%- else %}{{ '<start_of_turn>model\n' }}GEN{{ turn.content | trim + '<end_of_turn>' }}END{{ '\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""
# The text ends with eos unless an answer is asked for, so that no beginning of a conversation begins the whole of it.
PHI = """
{%- for turn in messages %}
    {{- '<|' + turn.role + '|>\n' }}
    {%- if turn.role == 'assistant' %}GEN{{ turn.content + '<|end|>' }}END{{ '\n' }}
    {%- else %}{{ turn.content + '<|end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}
"""
TEMPLATES = {
    "llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL, "mistral system": MISTRAL_SYSTEM, "gemma": GEMMA, "phi": PHI,
}  # fmt: skip
STARTS = ["<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<start_of_turn>", "<|user|>", "<|assistant|>"]
SPECIAL = [*STARTS, "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "[INST]", "[/INST]", "<|system|>", "<|end|>"]
TURNS = ["Name a city.", "Lima.", "Lima? And what is\n\nLima. good for?", "  The sea: größer 🗺 than any.\n"]


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer([" ".join(TURNS)] * 4, vocab_size=300, report=lambda line: None)
    made.add_special_tokens({"additional_special_tokens": SPECIAL, "bos_token": "<s>"})
    return made


def conversation(texts, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def shipped(name: str) -> str:
    return TEMPLATES[name].strip().replace("GEN", "").replace("END", "")


def tagged(name: str) -> str:
    blocks = TEMPLATES[name].strip().replace("GEN", "{% generation %}")
    return blocks.replace("END", "{% endgeneration %}")


def encoded(tokenizer, template, turns):
    tokenizer.chat_template = template
    return encode(tokenizer, [(turns, "row 7")])[0]


def assert_as_tagged(tokenizer, name, turns):
    made, wanted = (encoded(tokenizer, template, turns) for template in (shipped(name), tagged(name)))
    assert made.ids.tolist() == wanted.ids.tolist()
    assert made.answer.tolist() == wanted.answer.tolist()


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_those_that_generation_blocks_name(name, tokenizer):
    assert_as_tagged(tokenizer, name, conversation(TURNS))
    if name in ("llama3", "qwen", "phi"):
        assert_as_tagged(tokenizer, name, conversation(TURNS, "Lima."))


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(TEMPLATES)), texts=st.lists(st.text("Lima.[/INST]<|>\n é", min_size=1), max_size=6))
def test_whatever_is_said(name, texts, tokenizer):
    texts = ["Q: " + text if i % 2 == 0 else "A" + text + "." for i, text in enumerate(texts)]
    if len(texts) > 1:
        assert_as_tagged(tokenizer, name, conversation(texts))


@pytest.mark.parametrize("name", TEMPLATES)
def test_bos_is_there_once_and_the_loss_is_on_answers_only(name, tokenizer, tmp_path):
    """Through the files and batches of a run: the labels are the answers' tokens, in order, and nothing else."""
    tokenizer.chat_template = shipped(name)
    rows = [conversation(TURNS), conversation(TURNS[2:])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    made = conversations_to_disk(
        str(tmp_path / "rows.jsonl"), tokenizer, cache_dir=tmp_path, sequence_length=256, report=lambda line: None
    )
    whole = [encoded(tokenizer, shipped(name), turns) for turns in rows]
    for one in whole:
        with_bos = name not in ("qwen", "phi")
        assert (one.ids == tokenizer.bos_token_id).nonzero()[0].tolist() == [0] * with_bos
    packed = PackedSequences(made, sequence_length=256)
    labels = packed.batch(range(len(packed)))["labels"].flatten()
    wanted = np.concatenate([one.ids[one.answer] for one in whole])  # in one row, the longer one first
    assert labels[labels != IGNORED].tolist() == wanted.tolist()
    assert tokenizer.decode(wanted).startswith(("Lima.", " Lima."))


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_a_system_turn_that_the_family_refuses_names_the_row(name, tokenizer):
    with pytest.raises(ConfigError, match=r"row 7: .*refuses this conversation \(system, user, assistant"):
        encoded(tokenizer, shipped(name), conversation(TURNS, "Be brief."))


def test_a_system_turn_that_a_template_would_drop_is_refused(tokenizer):
    assert "Be brief" not in tokenizer.apply_chat_template(
        conversation(TURNS, "Be brief."), chat_template=shipped("mistral system"), tokenize=False
    )
    with pytest.raises(ConfigError, match=r"row 7: .*without a system turn"):
        encoded(tokenizer, shipped("mistral system"), conversation(TURNS[:2], "Be brief."))
