import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgalore.data.chat import PLAIN_TEMPLATE, encode
from qgalore.data.conversations import messages_of
from qgalore.data.instruct import conversations_to_disk, fit
from qgalore.data.packing import IGNORED, PackedSequences
from qgalore.data.tokenizer import train_tokenizer
from qgalore.errors import ConfigError

LENGTH = 96
ROWS = [{"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(1, n + 1)))} for n in range(1, 25)]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [row["prompt"] + row["completion"] for row in ROWS]
    made = train_tokenizer(texts, vocab_size=300, report=lambda line: None)
    made.chat_template = PLAIN_TEMPLATE
    return made


@pytest.fixture
def write(tmp_path, tokenizer):
    """A function rows → (the token file of them, what was printed)."""

    def make(rows, **options):
        path = tmp_path / "rows.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not path.exists() or path.read_text() != text:  # a file written anew is another file to the cache
            path.write_text(text)
        lines = []
        options = {"sequence_length": LENGTH, "cache_dir": tmp_path / "cache", "report": lines.append, **options}
        return conversations_to_disk(str(path), options.pop("tokenizer", tokenizer), **options), lines

    return make


def rendered(tokenizer, rows):
    return encode(tokenizer, [(messages_of(row, "here"), "here") for row in rows])


def test_every_conversation_is_whole_in_one_row_and_only_answers_count(write, tokenizer):
    made, lines = write(ROWS)
    expected = rendered(tokenizer, ROWS)
    assert max(len(one.ids) for one in expected) <= LENGTH
    assert made.n_documents == len(ROWS)
    assert len(made.tokens) % LENGTH == 0
    wanted = {tuple(one.ids.tolist()): one.answer for one in expected}
    for start, end in zip(made.offsets[:-1], made.offsets[1:], strict=True):
        assert start // LENGTH == (end - 1) // LENGTH
        ids = made.tokens[start:end].tolist()
        (match,) = [key for key in wanted if tuple(ids[: len(key)]) == key and key[-1] == ids[len(key) - 1]]
        answer = wanted.pop(match)
        assert made.answers[start : start + len(match)].tolist() == answer.tolist()
        assert set(ids[len(match) :]) <= {tokenizer.eos_token_id}
        assert not made.answers[start + len(match) : end].any()
    assert not wanted
    assert f"{int(made.answers.sum())} of them in answers" in lines[0]


def test_packed_rows_ask_for_answers_only(write):
    made, _ = write(ROWS)
    packed = PackedSequences(made, sequence_length=LENGTH)
    assert len(packed) == len(made.tokens) // LENGTH
    batch = packed.batch(range(len(packed)))
    counted = batch["labels"] != IGNORED
    # Answers start behind a prompt, so each of their tokens is asked for, once.
    assert int(counted.sum()) == int(made.answers.sum())
    following = torch.from_numpy(made.tokens.astype(np.int64)).view(-1, LENGTH)[:, 1:]
    assert torch.equal(batch["labels"][:, :-1][counted[:, :-1]], following[counted[:, :-1]])
    starts = torch.zeros(len(made.tokens), dtype=torch.bool)
    starts[torch.from_numpy(made.offsets[:-1])] = True
    assert torch.equal(batch["position_ids"] == 0, starts.view(-1, LENGTH))
    assert (counted.sum(dim=1) > 0).all()


def test_long_ones_are_cut_and_those_without_an_answer_left_out_and_both_are_said(write, tokenizer):
    cut = {"prompt": "Count.", "completion": " ".join(map(str, range(200)))}
    nothing = {"messages": [{"role": "user", "content": "Hello?"}]}
    too_late = {"prompt": "Count. " * 100, "completion": "1"}
    made, lines = write([ROWS[0], cut, nothing, too_late])
    assert "1 conversation longer than sequence_length was cut short" in lines[0]
    assert "2 without an answer to learn (or none before the cut) were left out" in lines[0]
    long, short = rendered(tokenizer, [cut, ROWS[0]])
    assert made.tokens.tolist()[:LENGTH] == long.ids[:LENGTH].tolist()
    assert made.answers[:LENGTH].tolist() == long.answer[:LENGTH].tolist()
    assert made.tokens.tolist()[LENGTH : LENGTH + len(short.ids)] == short.ids.tolist()
    with pytest.raises(ConfigError, match="none of the 2 conversations"):
        write([nothing, too_late])


def test_the_cache_is_reused_and_keyed_by_template_and_length(write, tokenizer, tmp_path):
    first, _ = write(ROWS)
    again, lines = write(ROWS)
    assert "reused" in lines[0]
    assert np.array_equal(first.answers, again.answers)
    assert first.digest() == again.digest()
    write(ROWS, sequence_length=64)
    other = train_tokenizer([row["prompt"] + row["completion"] for row in ROWS], vocab_size=300, report=lambda _: None)
    other.chat_template = PLAIN_TEMPLATE.replace("###", "##")
    write(ROWS, tokenizer=other)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_damaged_mask_is_built_again(write, tmp_path):
    first, _ = write(ROWS)
    (answers,) = (tmp_path / "cache").glob("*/answers.bin")
    answers.write_bytes(answers.read_bytes()[:-1])
    again, lines = write(ROWS)
    assert "damaged" in lines[0]
    assert np.array_equal(first.answers, again.answers)


def test_the_digest_tells_the_mask(write):
    made, _ = write(ROWS)
    other = type(made)(made.tokens, made.offsets, made.vocab_high, made.answers.copy(), made.row_length)
    assert other.digest() == made.digest()
    other.answers[int(np.flatnonzero(other.answers)[-1])] = False
    assert other.digest() != made.digest()


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.49])
def test_the_tail_is_cut_between_rows(write, fraction):
    made, _ = write(ROWS)
    train, valid = made.split_tail(fraction)
    assert len(train.tokens) % LENGTH == 0 == len(valid.tokens) % LENGTH
    assert train.answers.tolist() + valid.answers.tolist() == made.answers.tolist()
    packs = [PackedSequences(part, sequence_length=LENGTH) for part in (train, valid)]
    assert sum(map(len, packs)) == len(made.tokens) // LENGTH
    whole = PackedSequences(made, sequence_length=LENGTH)
    last = whole.batch([len(whole) - 1])
    assert all(torch.equal(value, last[name]) for name, value in packs[1].batch([len(packs[1]) - 1]).items())


def test_rows_of_another_length_are_refused(write):
    made, _ = write(ROWS)
    with pytest.raises(ConfigError, match=f"rows of {LENGTH}"):
        PackedSequences(made, sequence_length=32)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_fit_places_each_once_within_the_bound(lengths):
    rows = fit(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
    # No two rows could be one, or the later one's items would have gone into the first: so at most twice the least.
    assert len(rows) <= 2 * -(-sum(lengths) // 20)
