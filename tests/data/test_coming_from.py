"""Sample files in the formats of LLaMA-Factory, axolotl, TRL and litgpt: what is learned of each, or what is said."""

import json
import re
from pathlib import Path

import pytest

from qgalore.config.messages import keys
from qgalore.config.other_names import hint
from qgalore.config.sections import Config
from qgalore.data.chat import encode
from qgalore.data.conversations import conversations
from qgalore.data.sources import documents
from qgalore.data.tokenizer import train_tokenizer
from qgalore.errors import ConfigError

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ASK, SAY = {"role": "user", "content": "How warm?"}, {"role": "assistant", "content": "20 degrees."}
BE = {"role": "system", "content": "Be brief."}
HUMAN, GPT = {"from": "human", "value": "How warm?"}, {"from": "gpt", "value": "20 degrees."}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
ASKED, SAID, BRIEF = "user\nHow warm?", "assistant\n20 degrees.", "system\nBe brief."
PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from.md"


def write(folder, name, row):
    """One row as the file ``rows.json`` (an array, over several lines) or ``rows.jsonl``."""
    path = folder / name
    path.write_text(json.dumps([row], indent=2) if name.endswith(".json") else json.dumps(row) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(["How warm? 20 degrees."] * 3, vocab_size=270, report=lambda line: None)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize(
    ("name", "row", "turns", "learned"),
    [
        ("rows.json", ALPACA, ["user\nAdd.\n\n1 and 2", "assistant\n3"], ["3"]),
        ("rows.json", {**ALPACA, "instruction": ""}, ["user\n1 and 2", "assistant\n3"], ["3"]),
        (
            "rows.json",
            {**ALPACA, "input": "", "system": "Be brief.", "history": [["How warm?", "20 degrees."]]},
            [BRIEF, ASKED, SAID, "user\nAdd.", "assistant\n3"],
            ["20 degrees.", "3"],
        ),
        (
            "rows.json",
            {"conversations": [HUMAN, GPT, HUMAN, GPT], "system": "Be brief.", "tools": "[]"},
            [BRIEF, ASKED, SAID, ASKED, SAID],
            ["20 degrees."] * 2,
        ),
        ("rows.jsonl", {"messages": [BE, ASK, SAY]}, [BRIEF, ASKED, SAID], ["20 degrees."]),
        (
            "rows.jsonl",
            {"messages": [ASK, {**SAY, "training": False}, ASK, SAY]},
            [ASKED, SAID, ASKED, SAID],
            ["20 degrees."],
        ),
        ("rows.jsonl", {"prompt": "How warm?", "completion": "20 degrees."}, [ASKED, SAID], ["20 degrees."]),
        ("rows.jsonl", {"prompt": [BE, ASK], "completion": [SAY]}, [BRIEF, ASKED, SAID], ["20 degrees."]),
    ],
    ids=[
        "alpaca, litgpt too", "alpaca without instruction", "llama-factory alpaca", "llama-factory sharegpt", "openai",
        "axolotl chat_template", "trl texts", "trl messages",
    ],
)  # fmt: skip
def test_what_is_learned(tokenizer, tmp_path, name, row, turns, learned):
    (made,) = encode(tokenizer, list(conversations(write(tmp_path, name, row))))
    assert tokenizer.decode(made.ids) == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)
    assert tokenizer.decode(made.ids[made.answer]) == "".join(f"{answer}<|im_end|>" for answer in learned)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_text_is_learned_whole(tmp_path, name):
    """As axolotl's completion, LLaMA-Factory's pre-training and TRL's language modelling have it."""
    assert list(documents(write(tmp_path, name, {"text": "Once upon a time."}))) == ["Once upon a time."]


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"text": "Once."}, r"set data\.task=text"),
        ({"segments": [{"label": True, "text": "<s>Hi"}, {"label": False, "text": "you"}]}, "masked into 'prompt'"),
        ({"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]}, "give the texts"),
        ({"question": "How warm?", "answer": "20"}, "Rename 'question' to 'instruction' and 'answer' to 'output'"),
        ({"instruction": "Add.", "input": "1", "response": "3"}, r"Rename 'response' to 'output'\."),
        (
            {"instruction": "Add.", "context": "1", "response": "3"},
            "Rename 'context' to 'input' and 'response' to 'output'",
        ),
        ({"prompt": "How warm?", "response": "20"}, "Rename 'response' to 'completion'"),
        ({"conversations": [HUMAN, GPT], "tools": '[{"name": "clock"}]'}, "tools, .*leave such conversations out"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "{}"}]}, "leave such conversations out"),
        ({"conversations": [HUMAN, {"from": "observation", "value": "{}"}]}, "leave such conversations out"),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}, "'chosen'.* leave such rows out"),
        ({**ALPACA, "kto_tag": False}, "'kto_tag'.* Take it out"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_is_refused_and_the_remedy(tmp_path, row, remedy):
    with pytest.raises(ConfigError, match=remedy):
        next(conversations(write(tmp_path, "rows.json", row)))


def test_what_a_remedy_says_works(tmp_path):
    """Renamed as it is told, a row of Dolly's keys is Alpaca's."""
    row = {"instruction": "Add.", "context": "1", "response": "3"}
    with pytest.raises(ConfigError) as error:
        next(conversations(write(tmp_path, "rows.jsonl", row)))
    renamed = dict(re.findall(r"'(\w+)' to '(\w+)'", str(error.value)))
    ((turns, _),) = conversations(write(tmp_path, "renamed.jsonl", {renamed.get(key, key): row[key] for key in row}))
    assert [turn["content"] for turn in turns] == ["Add.\n\n1", "3"]


@pytest.mark.parametrize("row", [ALPACA, {"messages": [ASK]}, {"conversations": [HUMAN]}, {"completion": "20"}])
def test_conversations_read_as_text_lead_to_the_other_task(tmp_path, row):
    with pytest.raises(ConfigError, match=r"set data\.task=instruct"):
        next(documents(write(tmp_path, "rows.json", row)))


def table() -> list[tuple[str, str]]:
    """Their key and ours, or –, of every row of the page's tables of keys."""
    return re.findall(r"^\| `(\w+)` \| `?([\w.–]+)`? \|", PAGE.read_text(encoding="utf-8"), flags=re.M)


def test_keys_on_the_page_exist():
    known = {name for name, _ in keys()}
    sections = {name.split(".")[0] for name in known if "." in name}
    named = re.findall(rf"`((?:{'|'.join(sections)})\.\w+)[`=]", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 40
    assert set(named) <= known
    assert {ours for _, ours in table()} - known == {"–"}


@pytest.mark.parametrize(("theirs", "ours"), sorted(set(table())))
def test_a_key_under_its_old_name_leads_to_the_one_on_the_page(theirs, ours):
    told = hint((theirs,), Config.model_fields, lambda: [name for name, _ in keys()])
    assert told.startswith("There is no such key" if ours == "–" else f"did you mean {ours}?")


def test_every_tool_has_a_table():
    parts = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    assert [part.split("\n")[0] for part in parts] == ["Data", "LLaMA-Factory", "axolotl", "unsloth and TRL", "litgpt"]
    assert all(part.count("\n| `") >= 12 for part in parts[1:])
