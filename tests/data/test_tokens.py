import gzip
import json
import multiprocessing
import os
import sys

import numpy as np
import pytest
from helpers import no_file_larger_than
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors

from qgalore.data import tokenizing
from qgalore.data.cache import tokenizer_fingerprint
from qgalore.data.tokenizer import train_tokenizer
from qgalore.data.tokens import TokenFile, tokenize_to_disk
from qgalore.errors import ConfigError

TEXTS = [f"Document {n} tells of the sea. " * (n % 5 + 1) for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=280)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.jsonl.gz"
    texts = [*TEXTS[:10], "", *TEXTS[10:], " \n"]
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return str(path)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "deep" / "cache"


def folders(cache):
    return sorted(path.name for path in cache.iterdir())


def only_folder(cache):
    (name,) = folders(cache)
    return cache / name


def test_tokens_and_documents(source, tokenizer, cache):
    lines = []
    made = tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lines.append)
    assert isinstance(made.tokens, np.memmap)
    assert (made.tokens.dtype, made.tokens.ndim, made.offsets.dtype) == (np.uint16, 1, np.int64)
    assert made.n_documents == len(TEXTS)
    assert (made.offsets[0], made.offsets[-1]) == (0, len(made.tokens))
    for text, start, end in zip(TEXTS, made.offsets, made.offsets[1:], strict=False):
        ids = made.tokens[start:end].tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == text
    assert made.vocab_high == made.tokens.max()
    assert "2 blank documents skipped" in lines[0]
    assert "tokens/s" in lines[0]
    meta = json.loads((only_folder(cache) / "meta.json").read_text())
    assert meta["source"] == source
    assert (meta["documents"], meta["tokens"], meta["blank_documents"]) == (len(TEXTS), len(made.tokens), 2)


@pytest.mark.parametrize("puts_it", [True, False])
def test_bos_only_where_the_tokenizer_itself_puts_it(source, cache, puts_it):
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    if puts_it:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
    made = tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lambda line: None)
    assert (made.tokens[made.offsets[:-1]] == bos).all() == puts_it
    assert (made.tokens[made.offsets[1:] - 1] == tokenizer.eos_token_id).all()
    assert (np.asarray(made.tokens) == bos).sum() == len(TEXTS) * puts_it


def test_large_vocabulary_is_uint32(source, cache):
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    tokenizer.add_tokens([f"<extra{n}>" for n in range(2**16 - len(tokenizer))])
    assert tokenizing.id_dtype(tokenizer) == np.uint16
    tokenizer.add_tokens(["Document 0"])
    made = tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lambda line: None)
    assert made.tokens.dtype == np.uint32
    assert made.tokens[0] == made.vocab_high == 2**16
    assert tokenizer.decode(made.tokens[: made.offsets[1] - 1].tolist()) == TEXTS[0]


def test_reuse_and_what_makes_a_new_key(source, tokenizer, cache):
    lines = []

    def make(**changes):
        return tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lines.append, **changes)

    first, again = make(), make()
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.offsets, again.offsets)
    assert first.vocab_high == again.vocab_high
    assert "written to" in lines[0]
    assert f"{len(first.tokens):,} tokens of {len(TEXTS):,} documents reused from" in lines[1]
    make(max_tokens=50)
    assert len(folders(cache)) == 2
    os.utime(source, ns=(1, 1))  # the same bytes
    make(max_tokens=50)
    assert len(folders(cache)) == 2
    make(max_tokens=51)
    assert len(folders(cache)) == 3
    tokenize_to_disk(source, train_tokenizer(TEXTS, vocab_size=270), cache_dir=cache, report=lines.append)
    assert len(folders(cache)) == 4
    assert [("reused" in line) for line in lines] == [False, True, False, True, False, False]


def test_tokenizer_fingerprint_ignores_how_it_was_called():
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(TEXTS[:2], truncation=True, max_length=4, padding="max_length")
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["sea"])
    assert tokenizer_fingerprint(tokenizer) != before


@pytest.mark.parametrize("limit", [1, 7, 100, 10**6])
def test_max_tokens(source, tokenizer, cache, limit):
    whole = tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lambda line: None)
    part = tokenize_to_disk(source, tokenizer, cache_dir=cache, max_tokens=limit, report=lambda line: None)
    assert len(part.tokens) == min(limit, len(whole.tokens))
    assert np.array_equal(part.tokens, whole.tokens[:limit])
    assert part.offsets[-1] == len(part.tokens)
    assert (np.diff(part.offsets) > 0).all()
    assert np.array_equal(part.offsets[:-1], whole.offsets[: part.n_documents])


def test_max_tokens_ends_a_stream_that_never_ends(tokenizer, tmp_path):
    from qgalore.data.sources import DocumentStream

    def forever():
        while True:
            yield "the sea "

    totals = tokenizing.write_tokens(
        DocumentStream("forever", forever()),
        tokenizer,
        tmp_path / "t",
        tmp_path / "o.npy",
        dtype=np.dtype(np.uint16),
        max_tokens=1000,
        report=print,
    )
    assert totals.tokens == 1000


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def raise_id_in_meta(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_high": 5}))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: truncate(folder / "tokens.bin"), "tokens.bin has"),
        (lambda folder: truncate(folder / "offsets.npy"), "ValueError"),
        (lambda folder: np.save(folder / "offsets.npy", np.arange(5)), "offsets.npy has"),
        (lambda folder: (folder / "offsets.npy").write_bytes(b""), "offsets.npy has 0 bytes"),
        (lambda folder: (folder / "offsets.npy").unlink(), "FileNotFoundError"),
        (lambda folder: flip(folder / "tokens.bin", 0), "tokens.bin has other bytes"),
        (lambda folder: flip(folder / "tokens.bin", -1), "tokens.bin has other bytes"),
        (lambda folder: flip(folder / "offsets.npy", -8), "offsets.npy has other bytes"),
        (lambda folder: raise_id_in_meta(folder / "meta.json"), "meta.json has changed"),
        (lambda folder: truncate(folder / "meta.json"), "JSONDecodeError"),
        (lambda folder: (folder / "meta.json").write_text("{}"), "KeyError"),
        (lambda folder: (folder / "meta.json").unlink(), "FileNotFoundError"),
    ],
)
def test_damaged_cache_is_built_again(source, tokenizer, cache, damage, why):
    first = np.array(tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lambda line: None).tokens)
    damage(only_folder(cache))
    lines = []
    again = tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lines.append)
    assert "is damaged" in lines[0]
    assert why in lines[0]
    assert np.array_equal(again.tokens, first)
    lines.clear()
    tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lines.append)
    assert len(lines) == 1
    assert "reused" in lines[0]
    only_folder(cache)  # nothing temporary stays


def test_meta_of_other_inputs_is_not_trusted(source, tokenizer, cache):
    tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lambda line: None)
    path = only_folder(cache) / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split": "other"}))
    lines = []
    tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lines.append)
    assert "disagrees on split" in lines[0]


def test_a_failure_leaves_nothing(tokenizer, cache, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "x"}\n{')
    with pytest.raises(ConfigError, match="line 2 is not valid JSON"):
        tokenize_to_disk(str(path), tokenizer, cache_dir=cache)
    assert not cache.exists(), "it was made for them"


def build(source, tokenizer, cache, barrier, results):
    barrier.wait()
    made = tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lambda line: None)
    results.put((int(np.asarray(made.tokens, dtype=np.int64).sum()), made.n_documents))


def test_processes_building_at_once(source, tokenizer, cache):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive the fork
    try:
        workers = [context.Process(target=build, args=(source, tokenizer, cache, barrier, results)) for _ in range(4)]
        for worker in workers:
            worker.start()
        seen = {results.get(timeout=30) for _ in workers}
        for worker in workers:
            worker.join(30)
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
    assert [worker.exitcode for worker in workers] == [0] * 4
    whole = tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lambda line: None)
    assert seen == {(int(np.asarray(whole.tokens, dtype=np.int64).sum()), len(TEXTS))}
    only_folder(cache)


@pytest.mark.parametrize("rival", ["good", "damaged"])
def test_a_rival_that_was_first(source, tokenizer, cache, rival):
    lines = []

    def report(line):
        # "written to" is printed between writing and naming: the moment a rival can come in.
        if "written to" in line and not lines:
            lines.append(line)
            tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lambda line: None)
            finished = next(path for path in cache.iterdir() if not path.name.startswith("."))
            if rival == "damaged":
                (finished / "tokens.bin").write_bytes(b"")
            else:
                (finished / "rival").touch()
        lines.append(line)

    made = tokenize_to_disk(source, tokenizer, cache_dir=cache, report=report)
    assert made.n_documents == len(TEXTS)
    assert (only_folder(cache) / "rival").exists() == (rival == "good")
    assert any("is damaged" in line for line in lines) == (rival == "damaged")


def test_full_disk_names_the_folder(tokenizer, cache, tmp_path):
    """A limit on file size is as near to a full disk as a test can get without one."""
    path = tmp_path / "long.txt"
    path.write_text("the sea " * 20_000)
    with pytest.raises(ConfigError) as refused, no_file_larger_than(4096):
        tokenize_to_disk(str(path), tokenizer, cache_dir=cache)
    assert f"the token cache '{cache}' cannot be used (File too large)" in str(refused.value)
    assert not cache.exists()


def test_cache_folder_that_is_a_file(source, tokenizer, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigError, match=r"token cache '.*taken' cannot be used"):
        tokenize_to_disk(source, tokenizer, cache_dir=tmp_path / "taken")


def test_argument_errors(source, tokenizer, cache):
    endless = train_tokenizer(TEXTS, vocab_size=280)
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-document token"):
        tokenize_to_disk(source, endless, cache_dir=cache)


@pytest.mark.skipif(sys.stderr.isatty(), reason="a terminal gets a bar instead")
def test_lines_while_it_takes_long(source, tokenizer, cache, monkeypatch):
    monkeypatch.setattr(tokenizing, "_LINE_EVERY", 0.0)
    monkeypatch.setattr(tokenizing, "_BATCH_DOCUMENTS", 10)
    lines = []
    tokenize_to_disk(source, tokenizer, cache_dir=cache, report=lines.append)
    assert ["so far" in line for line in lines] == [True, True, True, True, False]
    assert "of 10 documents" in lines[0]


def test_batches_do_not_matter(source, tokenizer, tmp_path, monkeypatch):
    whole = tokenize_to_disk(source, tokenizer, cache_dir=tmp_path / "a", max_tokens=300, report=lambda line: None)
    monkeypatch.setattr(tokenizing, "_BATCH_DOCUMENTS", 3)
    small = tokenize_to_disk(source, tokenizer, cache_dir=tmp_path / "b", max_tokens=300, report=lambda line: None)
    assert np.array_equal(whole.tokens, small.tokens)
    assert np.array_equal(whole.offsets, small.offsets)
    assert whole.vocab_high == small.vocab_high


def token_file(*lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenFile(np.arange(offsets[-1], dtype=np.uint16), offsets, int(offsets[-1]))


@pytest.mark.parametrize(
    ("lengths", "fraction", "train", "valid"),
    [
        ([10] * 10, 0.2, [10] * 8, [10] * 2),
        ([10] * 10, 0.25, [10] * 7, [10] * 3),  # at least the fraction
        ([10, 980, 10], 0.02, [10, 980], [10]),  # half of it rather than nearly everything
        ([500, 500], 0.01, [500, 490], [10]),  # no document is near the right size
        ([100], 0.1, [90], [10]),
        ([2], 0.001, [1], [1]),
        ([1, 1], 0.999, [1], [1]),
    ],
)
def test_split_tail(lengths, fraction, train, valid):
    front, tail = token_file(*lengths).split_tail(fraction)
    assert np.diff(front.offsets).tolist() == train
    assert np.diff(tail.offsets).tolist() == valid


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.floats(0.001, 0.999))
def test_split_tail_loses_nothing(lengths, fraction):
    whole = token_file(*lengths)
    if len(whole.tokens) < 2:
        return
    front, tail = whole.split_tail(fraction)
    assert np.array_equal(np.concatenate([front.tokens, tail.tokens]), whole.tokens)
    assert np.shares_memory(front.tokens, whole.tokens)
    assert np.shares_memory(tail.tokens, whole.tokens)
    wanted = min(max(round(fraction * len(whole.tokens)), 1), len(whole.tokens) - 1)
    assert wanted / 2 <= len(tail.tokens) <= 2 * wanted
    for part in (front, tail):
        assert part.n_documents >= 1
        assert (part.offsets[0], part.offsets[-1]) == (0, len(part.tokens))
        assert (np.diff(part.offsets) > 0).all()
    inside = len(front.tokens) not in whole.offsets
    assert front.n_documents + tail.n_documents == whole.n_documents + inside


def test_tokens_that_are_only_marked_as_special_are_counted_too(tmp_path):
    """``<|im_start|>`` has no role such as eos, and is no text all the same."""
    tokenizer = train_tokenizer(["some words of text"] * 3, vocab_size=280, report=lambda line: None)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<think>", special=False)])
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "some <|im_start|> words <think>"}) + "\n")
    lines = []
    tokenize_to_disk(str(path), tokenizer, cache_dir=tmp_path / "cache", report=lines.append)
    (line,) = [line for line in lines if "strings of special tokens" in line]
    assert "'<|im_start|>' 1 times;" in line
    assert "think" not in line


def test_a_reader_of_the_output_that_goes_is_no_fault_of_the_cache(source, tokenizer, cache):
    def nobody_reads(line):
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        tokenize_to_disk(source, tokenizer, cache_dir=cache, report=nobody_reads)
