"""Keys of conversations that carry a meaning are read, refused by name, or named once as not read."""

import json

import pytest

from qgalore.data.chat import encode
from qgalore.data.conversations import conversations, messages_of
from qgalore.data.notes import Notes
from qgalore.data.tokenizer import train_tokenizer
from qgalore.errors import ConfigError

ASK, SAY = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}"
)
UNLEARNED = {**SAY, "learn": False}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [{"from": "human", "value": "Q"}], "system": "S"}, [SYSTEM, ASK]),
        ({"messages": [ASK, SAY], "system_prompt": "S"}, [SYSTEM, ASK, SAY]),
        ({"messages": [SYSTEM, ASK], "system": "S"}, [SYSTEM, ASK]),
        ({"messages": [ASK], "system": ""}, [ASK]),
        ({"messages": [{"role": "developer", "content": "S"}, ASK]}, [SYSTEM, ASK]),
        ({"instruction": "Q", "output": "A", "system": "S"}, [SYSTEM, ASK, SAY]),
        ({"instruction": "Q", "output": "A", "history": [["Q", "A"], ["Q", "A"]]}, [ASK, SAY] * 3),
        ({"prompt": "Q", "completion": "A", "history": None, "label": True}, [ASK, SAY]),
        ({"prompt": [SYSTEM, ASK, SAY, ASK], "completion": [SAY]}, [SYSTEM, ASK, UNLEARNED, ASK, SAY]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}, "R"]}]},
            [{**ASK, "content": "Q\nR"}],
        ),
        ({"messages": [ASK, {**SAY, "weight": 0}]}, [ASK, UNLEARNED]),
        ({"messages": [ASK, {**SAY, "weight": 1.0, "train": True}]}, [ASK, SAY]),
        ({"messages": [ASK, {**SAY, "train": False}]}, [ASK, UNLEARNED]),
        ({"messages": [ASK, {**SAY, "weight": None, "tool_calls": []}]}, [ASK, SAY]),
        ({"messages": [ASK, SAY], "weight": 0}, [ASK, UNLEARNED]),
    ],
)
def test_read(row, expected):
    assert messages_of(row, "here") == expected


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"messages": [ASK, {**SAY, "weight": 0.5}]}, "'weight' is 0.5; it must be 1"),
        ({"messages": [ASK, {**SAY, "train": "no"}]}, "'train' is 'no'"),
        ({"messages": [ASK, {**SAY, "weight": 1, "train": False}]}, "contradict"),
        ({"messages": [ASK, {**SAY, "reasoning_content": "hm"}]}, "'reasoning_content'"),
        ({"messages": [ASK, {**SAY, "loss_mask": [0, 1]}]}, "'loss_mask'"),
        ({"messages": [ASK, SAY], "history": [["Q", "A"]]}, "'history' beside 'messages'"),
        ({"messages": [SYSTEM, ASK], "system": "T"}, "something else than the system turn"),
        ({"messages": [ASK], "system": "T", "system_prompt": "S"}, "differ"),
        ({"instruction": "Q", "output": "A", "history": "Q"}, "'history' must be a list of pairs"),
        ({"prompt": "Q", "completion": "A", "label": False}, "'label' is False"),
        ({"messages": [ASK, SAY], "label": False}, "'label' is False"),
        (
            {"prompt": "Q", "completion": "A", "label": "false"},
            "'label' is 'false'; beside a completion it must be true",
        ),
        ({"messages": [ASK, {**SAY, "loss_weight": 0}]}, "'loss_weight' .it is 0., which is not read"),
        ({"messages": [ASK, {**SAY, "isTrainable": False}]}, "'isTrainable'"),
        ({"messages": [ASK, {**SAY, "Weight": 0}]}, "'Weight', which is not read; write it as 'weight'"),
        ({"messages": [ASK, {**SAY, "label": False}]}, "'label' .it is False."),
        ({"messages": [ASK, SAY], "system_message": "S"}, "'system_message'"),
        ({"instruction": "Q", "Input": "I", "output": "A"}, "write it as 'input'"),
        ({"instruction": "Q", "context": "I", "output": "A"}, "'context'"),
        ({"messages": [ASK, SAY], "conversations": [ASK]}, "two conversations .messages and conversations."),
        (
            {"messages": [ASK, SAY], "prompt": "Q", "completion": "A"},
            "two conversations .messages and prompt/completion",
        ),
        ({"messages": [{**ASK, "from": "gpt", "value": "B"}, SAY]}, "'role' and 'from', which say different things"),
        ({"messages": [ASK, SAY], "rejected": "B"}, "'rejected'"),
        ({"messages": [ASK, SAY], "functions": [{"name": "f"}]}, "'functions'"),
        ({"messages": [ASK, SAY], "images": ["a.png"]}, "'images'"),
        ({"messages": [ASK, SAY], "chat_template_kwargs": {"thinking": False}}, "'chat_template_kwargs'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "'image_url'"),
        ({"instruction": "Q", "output": "A", "input": 5}, "'input' is of type int"),
    ],
)
def test_refused(row, complaint):
    with pytest.raises(ConfigError, match=complaint):
        messages_of(row, "here")


def test_a_prompt_beside_its_messages_is_no_second_conversation():
    """As ultrachat has it."""
    assert messages_of({"messages": [ASK, SAY], "prompt": "Q", "label": True}, "here") == [ASK, SAY]


def test_keys_that_are_not_read_are_named_once(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"messages": [ASK, {**SAY, "name": "Bo"}], "score": 3, "id": n} for n in range(4)]
    rows.append({"messages": [{**ASK, "train": True}, {**SAY, "weight": 0}], "other": None})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = Notes()
    assert len(list(conversations(str(path), notes=notes))) == 5
    keys, unlearned, asked = notes.lines()
    assert "'id' (4 times), 'name' (4 times), 'score' (4 times)" in keys
    assert "line 1" in keys
    assert unlearned.startswith("1 turns are marked as not to be learned")
    assert asked.startswith("1 turns that are no answers")


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_turns_that_are_not_to_be_learned_are_no_targets(template):
    tokenizer = train_tokenizer(["wrong right question"] * 3, vocab_size=280, report=lambda line: None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    turns = [
        ASK,
        {"role": "assistant", "content": "wrong", "weight": 0},
        ASK,
        {"role": "assistant", "content": "right"},
    ]
    (made,) = encode(tokenizer, [(messages_of({"messages": turns}, "here"), "here")])
    assert tokenizer.decode(made.ids[made.answer]) == "right<|im_end|>"
    assert "wrong" in tokenizer.decode(made.ids)
