"""Sources mixed by weight: the order in which they come, their shares at every moment, rows of several in a batch."""

import itertools
import json
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from qgalore import config
from qgalore.data.mixing import MixedOrder, Mixture, names_of, turns, whole_numbers
from qgalore.data.order import SampleOrder
from qgalore.data.packing import PackedSequences
from qgalore.data.tokens import TokenFile
from qgalore.errors import ConfigError
from qgalore.training.position import Position
from qgalore.training.sources import say_shares

LEAST = {"model": {"config": "llama_60m"}, "train": {"lr": 0.01, "max_steps": 5}}


def first(weights, count, taken=None):
    return list(itertools.islice(turns(weights, taken or [0] * len(weights)), count))


def test_two_to_one_comes_in_turns():
    assert first([2, 1], 6) == [0, 1, 0, 0, 1, 0]
    assert first([1, 1, 1], 6) == [0, 1, 2, 0, 1, 2]
    assert first([5], 3) == [0, 0, 0]


@pytest.mark.parametrize("seed", range(6))
def test_shares_are_exact_within_a_sample_at_all_times(seed):
    """Also of many sources with very different weights, where giving to the one that is owed most falls behind."""
    rng = random.Random(seed)
    weights = [rng.choice([1, 1, 2, 3, 7, 50, 1000]) for _ in range(rng.randrange(2, 25))]
    given, total = [0] * len(weights), sum(weights)
    for n, source in enumerate(first(weights, 1500), start=1):
        given[source] += 1
        assert all(abs(Fraction(w * n, total) - count) < 1 for w, count in zip(weights, given, strict=True))


def test_weights_are_taken_as_they_are_written():
    assert whole_numbers([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert whole_numbers([1.0, 3.0]) == [1, 3]
    assert whole_numbers([2.5, 1e-3]) == [2500, 1]


def order(sizes=(5, 3, 4), weights=(4, 1, 2)):
    return MixedOrder([SampleOrder(n, seed) for seed, n in enumerate(sizes)], weights, ["a", "b", "c"][: len(sizes)])


def test_a_position_is_all_that_the_order_knows():
    whole, end = order().take((), 40)
    pieces, position = [], ()
    for count in (1, 0, 7, 2, 30):
        piece, position = order().take(position, count)
        pieces += piece
    assert (pieces, position) == (whole, end)
    assert order().drawn(()) == {"a": 0, "b": 0, "c": 0}
    drawn = order().drawn(end)
    assert sum(drawn.values()) == 40
    assert [round(40 * share) for share in (4 / 7, 1 / 7, 2 / 7)] == list(drawn.values())


def test_every_source_comes_in_the_order_that_it_has_alone():
    numbers, positions = order().take((), 40)
    for place, (start, size) in enumerate(((0, 5), (5, 3), (8, 4))):
        mine = [number - start for number in numbers if start <= number < start + size]
        alone, after = SampleOrder(size, place).take((0, 0), len(mine))
        assert (mine, positions[place]) == (alone, after)


def test_one_source_is_that_source():
    assert MixedOrder([SampleOrder(7, 3)]).take(((2, 5),), 9) == (
        SampleOrder(7, 3).take((2, 5), 9)[0],
        (SampleOrder(7, 3).take((2, 5), 9)[1],),
    )
    assert MixedOrder([SampleOrder(7, 3)]).drawn(((2, 5),)) == {}
    assert names_of(["a/tales.txt"]) == [""]
    rows, alone = Mixture(("",), (1,), (packed(0, [40]),)), packed(0, [40])
    assert all(torch.equal(rows.batch([3, 0])[name], value) for name, value in alone.batch([3, 0]).items())


def test_positions_of_other_sources_are_refused():
    with pytest.raises(ConfigError, match=r"the position is in 2 sources, and data\.train has 3"):
        order().take(((0, 0), (0, 0)), 1)
    with pytest.raises(ConfigError, match="not one of 3 samples"):
        order().take(((0, 0), (0, 3), (0, 0)), 1)


def test_positions_are_read_as_old_and_new_checkpoints_have_them():
    assert Position.read({"step": 3, "sample": [1, 2]}).sample == ((1, 2),)
    assert Position.read({"step": 3, "sample": [[1, 2], [0, 5]]}).sample == ((1, 2), (0, 5))
    assert Position.read({"step": 0, "sample": []}).sample == ()
    there = Position(step=2, sample=((1, 2), (0, 5)))
    assert Position.read(json.loads(json.dumps(vars(there)))) == there
    for wrong in ([], [1], [[1]], [[1, 2], 3], [[1, -2]], "ab", [[1, 2, 3]]):
        with pytest.raises(ValueError, match=r"position\.sample"):
            Position.read({"step": 3, "sample": wrong})


def packed(start, lengths, answers=False, **how):
    ends = np.cumsum([0, *lengths])
    ids = np.arange(start, start + ends[-1]).astype(np.uint16)
    marks = np.arange(len(ids)) % 3 == 0 if answers else None
    file = TokenFile(ids, ends, 999, marks, 8 if answers else None)
    return PackedSequences(file, sequence_length=8, **how)


@pytest.mark.parametrize("documents", [False, True])
def test_rows_of_several_sources_are_those_of_each(documents):
    text, talk = packed(0, [5, 20, 8], with_documents=documents), packed(100, [8, 3, 5], True, with_documents=documents)
    mixture = Mixture(("text", "talk"), (1, 1), (text, talk))
    assert len(mixture) == 4 + 2
    asked = [5, 0, 3, 4, 0]
    batch = mixture.batch(asked)
    alone = [text.batch([n]) if n < 4 else talk.batch([n - 4]) for n in asked]
    assert batch.keys() == alone[0].keys()
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(batch[name], torch.cat([one[name] for one in alone]))
    if documents:
        assert batch["documents"].lengths == tuple(one["documents"].lengths[0] for one in alone)
    assert torch.equal(mixture.batch([4, 5])["input_ids"], talk.batch([0, 1])["input_ids"])
    with pytest.raises(IndexError):
        mixture.batch([6])


def test_names_are_those_of_files_and_no_two_are_equal():
    paths = ["a/tales.jsonl.gz", "b/tales.txt", "c/tales.TXT", "./code/", "allenai/c4:en", "../..", "x/tales-2.txt"]
    assert names_of(paths) == ["tales", "tales-2", "tales-3", "code", "allenai-c4-en", "source", "tales-2-2"]


def parsed(train, **data):
    return config.parse({**LEAST, "data": {"train": train, **data}}, "here")


def test_sources_have_what_they_do_not_say_themselves():
    sources = parsed([{"path": "a.txt", "weight": 2}, "b.txt", {"path": "c.txt", "text_key": "body", "task": "text"}],
                     text_key="story", task="instruct").data.sources  # fmt: skip
    assert list(sources) == ["data.train[0]", "data.train[1]", "data.train[2]"]
    assert [(s.path, s.weight, s.text_key, s.task) for s in sources.values()] == [
        ("a.txt", 2, "story", "instruct"), ("b.txt", 1, "story", "instruct"), ("c.txt", 1, "body", "text")
    ]  # fmt: skip
    for alone in ("a.txt", ["a.txt"], {"path": "a.txt"}):
        assert [(key, s.path) for key, s in parsed(alone).data.sources.items()] == [("data.train", "a.txt")]


def test_a_text_key_that_nothing_reads_is_told():
    def told(**data):
        return [line for line in config.remarks(parsed(**data)) if "text_key" in line]

    listed = [{"path": "a.TXT", "text_key": "body"}, {"path": "b.jsonl", "text_key": "body"}, "c.jsonl"]
    assert told(train=listed) == ["data.train[0].text_key has no effect in a.TXT, which is one text without keys"]
    talk = [{"path": "a.jsonl", "text_key": "body"}, {"path": "b.jsonl", "task": "text"}]
    assert told(train=talk, task="instruct", text_key="story") == [
        "data.train[0].text_key has no effect with task: instruct"
    ]
    assert told(train="a.jsonl", task="instruct", text_key="story") == [
        "data.text_key has no effect with data.task: instruct"
    ]


def test_a_source_that_gives_nothing_and_one_given_twice_are_told(capsys):
    sources = tuple(packed(0, [40]) for _ in range(3))
    files = [TokenFile(np.zeros(40, np.uint16), np.array([0, 40]), 9, checksum=sum_) for sum_ in ("x", "y", "x")]
    made = config.parse({**LEAST, "data": {"train": "a"}, "train": {"lr": 0.01, "max_steps": 5}}, "here")
    say_shares(made, Mixture(("a", "b", "c"), (39, 1, 40), sources), files)  # 40 samples: 19.5, 0.5 and 20 of them
    notes = [line.removeprefix("note:").strip() for line in capsys.readouterr().out.splitlines() if "note" in line]
    assert [line for line in notes if "times" not in line] == [
        "b gives at most one of the 40 samples that this run draws; raise its weight, or make the run longer",
        "c has the same tokens as a, so the shares of both go to them; leave one out",
    ]


@pytest.mark.parametrize(
    ("train", "data", "told"),
    [
        ([], {}, r"data\.train is \[\]; it must be a file, .* or a list of sources such as \[\{path"),
        ({"path": "a", "weight": 0}, {}, r"data\.train\[0\]\.weight is 0; it must be a number above 0"),
        ({"path": "a", "task": "text"}, {"task": "classify"}, r"data\.train\.task: data\.task: classify has labels"),
        ([{"path": "a", "weight": 0}], {}, r"data\.train\[0\]\.weight is 0; it must be a number above 0"),
        (["a", {"weight": 1}], {}, r"data\.train\[1\]\.path: missing.* for example path: my_text\.jsonl"),
        (["a", {"path": "b", "wieght": 1}], {}, r"train\[1\]\.wieght: unknown key; .* mean data\.train\[1\]\.weight"),
        ([{"path": "a", "probability": 1}], {}, r"\.probability: unknown key; did you mean data\.train\[0\]\.weight\?"),
        ([{"path": "a", "field": "x"}], {}, r"\.field: unknown key; did you mean data\.train\[0\]\.text_key\?"),
        ([{"path": "a", "type": "alpaca"}], {}, "no such key, since the keys of a row tell its layout"),
        ([{"path": "a", "dtype": "x"}], {}, "known here: path, text_key, task, weight"),
        ([{"path": "a", "task": "tekst"}], {}, r"data\.train\[0\]\.task is 'tekst'; it must be text or instruct"),
        (["a", {"path": "b", "task": "instruct"}], {}, "set data.task: instruct, and task: text for the sources"),
        (["a", "b"], {"task": "classify"}, "classify reads one file; put the examples into one"),
    ],
)  # fmt: skip
def test_lists_that_cannot_be(train, data, told):
    with pytest.raises(ConfigError, match=told):
        parsed(train, **data)


def test_a_list_is_read_from_the_command_line_and_written_back(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {config: llama_60m}\ntrain: {lr: 0.01, max_steps: 5}\n")
    (tmp_path / "2024").write_text("x")
    made = config.load(str(tmp_path / "c.yaml"), ["data.train=[{path: a.txt, weight: 2}, {path: 2024}, 007]"])
    assert [(source.path, source.weight) for source in made.data.train] == [
        ("a.txt", 2), (str(tmp_path / "2024"), 1), ("007", 1)
    ]  # fmt: skip
    (tmp_path / "d.yaml").write_text(config.dump(made))
    assert config.load(str(tmp_path / "d.yaml")) == made
    assert config.differences(made.model_dump(mode="json"), made) == []
