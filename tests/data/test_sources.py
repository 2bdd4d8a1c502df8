import gzip
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qgalore.data import sources
from qgalore.data.sources import documents, fingerprint
from qgalore.errors import ConfigError


def rows(*texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write(path, data: bytes):
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return str(path)


def write_parquet(path, columns: dict, **options):
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_txt_is_one_document(tmp_path, name):
    path = write(tmp_path / name, "\ufeffFirst line\nzweite Zeile ß\n".encode())
    assert list(documents(path)) == ["First line\nzweite Zeile ß\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl(tmp_path, name):
    path = write(tmp_path / name, rows("one", "", "two\nlines", "  \n", None, "drei ß") + b"\n")
    stream = documents(path)
    assert list(stream) == ["one", "two\nlines", "drei ß"]
    assert (stream.documents, stream.blank) == (3, 3)


def test_parquet_in_row_groups(tmp_path):
    texts = [f"text {i}" for i in range(3000)]
    path = write_parquet(tmp_path / "a.parquet", {"n": list(range(3000)), "body": texts}, row_group_size=700)
    assert list(documents(path, text_key="body")) == texts


def test_text_key(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"body": "x", "text": "y"}\n')
    assert list(documents(path, text_key="body")) == ["x"]


def test_folder_is_sorted_and_recursive(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "z.txt", b"2")
    write(tmp_path / "b-a.jsonl.gz", rows("3", "4"))
    write_parquet(tmp_path / "c.parquet", {"text": ["5"]})
    write(tmp_path / "a.txt.gz", b"1")
    write(tmp_path / "notes.md", b"not read")
    write(tmp_path / "._a.txt", b"\xff hidden")
    assert list(documents(str(tmp_path))) == ["1", "2", "3", "4", "5"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", b"here")
    assert list(documents("~/a.txt")) == ["here"]
    assert fingerprint("~/a.txt") == fingerprint(str(tmp_path / "a.txt"))


def test_errors_of_the_path_come_at_once(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", rows("x"))
    write(tmp_path / "table.csv", b"x")
    (tmp_path / "empty").mkdir()
    for call in (documents, fingerprint):
        with pytest.raises(ConfigError, match=r"does not exist\. Close names in that folder: train\.jsonl"):
            call(str(tmp_path / "trian.jsonl"))
        with pytest.raises(ConfigError, match=r"folder .*nowhere' does not exist either"):
            call(str(tmp_path / "nowhere" / "a"))
        with pytest.raises(ConfigError, match=r"has no file that can be read; .*\.txt, .*\.parquet"):
            call(str(tmp_path / "empty"))
        with pytest.raises(ConfigError, match=r"table\.csv' has an ending that is not read"):
            call(str(tmp_path / "table.csv"))
    monkeypatch.chdir(tmp_path)
    for source in ("trian.jsonl", "./trian", "../x/a"):
        with pytest.raises(ConfigError, match="does not exist"):
            documents(source)


def jsonl(second: bytes) -> bytes:
    return rows("fine") + second + b"\n"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"ab\xffc", r"a\.txt' is not UTF-8 \(byte 0xff at offset 2\)"),
        ("a.jsonl", jsonl(b'{"text": "\xe9"}'), r"a\.jsonl' line 2 is not UTF-8"),
        ("a.jsonl", jsonl(b'{"text": '), r"a\.jsonl' line 2 is not valid JSON"),
        ("a.jsonl", jsonl(b"[" * 100_000), r"a\.jsonl' line 2 is not valid JSON"),
        ("a.jsonl.gz", jsonl(b'["text"]'), r"line 2 is a JSON list, not an object"),
        ("a.jsonl", jsonl(b'{"body": "x", "n": 1}'), r"line 2 has no 'text'; the keys present are 'body', 'n'"),
        ("a.jsonl", jsonl(b'{"text": 5}'), r"line 2: 'text' is of type int, not text"),
        ("a.txt", b"", r"holds 1 document, all blank"),
        ("a.jsonl", b"", r"holds no rows \(it is empty\)"),
        ("a.jsonl", rows("", " "), r"holds 2 documents, all blank"),
        ("a.parquet", b"no parquet", r"a\.parquet' could not be read"),
        ("a.parquet", b"", r"a\.parquet' could not be read"),
    ],
)
def test_errors_of_the_contents(tmp_path, name, data, message):
    with pytest.raises(ConfigError, match=message):
        list(documents(write(tmp_path / name, data)))


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(rows(*map(str, range(500))))
    for data in (whole[:-20], b"no gzip", whole[:30] + b"\x00\xff\x00" + whole[33:]):
        (tmp_path / "a.jsonl.gz").write_bytes(data)
        with pytest.raises(ConfigError, match=r"a\.jsonl\.gz' could not be read"):
            list(documents(str(tmp_path / "a.jsonl.gz")))


def test_parquet_errors(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"body": ["x"], "n": [1]})
    with pytest.raises(ConfigError, match=r"has no 'text'; the keys present are 'body', 'n'"):
        list(documents(path))
    with pytest.raises(ConfigError, match="row 1: 'n' is of type int"):
        list(documents(path, text_key="n"))
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    with pytest.raises(ConfigError, match="a column is not UTF-8"):
        list(documents(write_parquet(tmp_path / "b.parquet", {"text": broken})))


def test_parquet_without_rows(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})
    with pytest.raises(ConfigError, match="holds no rows"):
        list(documents(path))


def test_the_fingerprint_is_of_names_and_contents_not_of_dates(tmp_path):
    one = tmp_path / "one.txt"
    write(one, b"abc")
    write(tmp_path / "two.txt", b"abc")
    os.utime(one, ns=(10**18, 10**18))
    before, alone = fingerprint(str(tmp_path)), fingerprint(str(one))
    os.utime(one, ns=(10**18, 10**18 + 1))
    assert (fingerprint(str(tmp_path)), fingerprint(str(one))) == (before, alone)
    os.utime(one, ns=(10**18, 10**18))
    write(one, b"abd")
    os.utime(one, ns=(10**18, 10**18))  # as many bytes and the same date
    assert fingerprint(str(one)) != alone
    assert fingerprint(str(tmp_path)) != before
    write(one, b"abc")
    assert fingerprint(str(tmp_path)) == before
    one.rename(tmp_path / "renamed.txt")
    assert fingerprint(str(tmp_path)) != before


def test_fingerprint_of_a_dataset_is_its_id():
    assert fingerprint("allenai/c4:en") == "allenai/c4:en"


@pytest.fixture
def dataset_folder(tmp_path):
    """What load_dataset takes in place of an id, so that the datasets library itself runs."""
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", rows("one", "", "two"))
    write(folder / "validation.jsonl", rows("three"))
    return str(folder)


def test_dataset_splits(dataset_folder):
    stream = sources.DocumentStream("x", sources._dataset_texts(dataset_folder, "train", "text"))
    assert list(stream) == ["one", "two"]
    assert stream.blank == 1
    assert list(sources._dataset_texts(dataset_folder, "validation", "text")) == ["three"]


def test_dataset_is_streamed(tmp_path):
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    write(folder / "a.jsonl", rows("good", "good"))
    write(folder / "b.jsonl", b"{not json\n")
    texts = sources._dataset_texts(str(folder.parent), "train", "text")
    # The second file is only read, and found broken, after the first has been given out.
    assert [next(texts) for _ in range(2)] == ["good", "good"]
    with pytest.raises(ConfigError, match="could not be streamed"):
        next(texts)


def test_dataset_errors(dataset_folder):
    with pytest.raises(ConfigError, match=r"split 'test'.*could not be streamed.*test"):
        next(sources._dataset_texts(dataset_folder, "test", "text"))
    with pytest.raises(ConfigError, match=r"row 1 has no 'body'; the keys present are 'id', 'text'"):
        next(sources._dataset_texts(dataset_folder, "train", "body"))
    with pytest.raises(ConfigError, match=r"config 'en'.*could not be streamed"):
        next(sources._dataset_texts(f"{dataset_folder}:en", "train", "text"))


def run_offline(program: str, tmp_path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hub_without_network(tmp_path):
    program = (
        "from qgalore.data.sources import documents\n"
        "from qgalore.errors import ConfigError\n"
        "try: next(documents('no-such-owner/no-such-set:en', split='train'))\n"
        "except ConfigError as error: print(error)\n"
    )
    said = run_offline(program, tmp_path)
    assert "dataset 'no-such-owner/no-such-set' (config 'en', split 'train') is no local path" in said
    for remedy in ("give a local file or folder", "HF_HOME", "HF_HUB_OFFLINE=1"):
        assert remedy in said


def test_stream_left_early_ends_cleanly(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_parquet(folder / "train.parquet", {"text": ["x"] * 5000})
    program = (
        "from qgalore.data import hub, sources\n"
        "wait = hub._let_go\n"
        "hub._let_go = lambda: print('waits', wait())\n"
        f"print(next(sources._dataset_texts({str(folder)!r}, 'train', 'text')))\n"
    )
    assert run_offline(program, tmp_path) == "x\nwaits None\n"


def test_threads_of_arrow_have_let_go_before_the_program_ends(tmp_path):
    # What a stream of ``datasets`` does inside, left at the worst of times; without the wait 19 of 20 programs abort.
    pq.write_table(pa.table({"text": [f"x{n}" for n in range(50_000)]}), tmp_path / "rows.parquet", row_group_size=5000)
    program = (
        "import atexit, gc, pyarrow.dataset\n"
        "from qgalore.data import hub\n"
        "atexit.register(hub._let_go)\n"
        "def batches():\n"
        f"    with open({str(tmp_path / 'rows.parquet')!r}, 'rb') as file:\n"
        "        fragment = pyarrow.dataset.ParquetFileFormat().make_fragment(file)\n"
        "        yield from fragment.to_batches(batch_size=1000, batch_readahead=0, fragment_readahead=0)\n"
        "left = batches()\n"
        "print(next(left).num_rows)\n"
        "del left\n"
        "gc.collect()\n"
    )
    assert run_offline(program, tmp_path) == "1000\n"


def test_misspelt_local_folder_is_suggested(dataset_folder, tmp_path):
    program = (
        f"import os; os.chdir({str(tmp_path)!r})\n"
        "from qgalore.data.sources import documents\n"
        "from qgalore.errors import ConfigError\n"
        "try: next(documents('sett'))\n"
        "except ConfigError as error: print(error)\n"
    )
    environment_path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    said = run_offline(f"import sys; sys.path[:0] = {environment_path.split(os.pathsep)!r}\n{program}", tmp_path)
    assert "Close names in that folder: set." in said


def test_a_link_to_a_file_that_is_read_anyway_is_not_read_again(tmp_path):
    (tmp_path / "text" / "sub").mkdir(parents=True)
    write(tmp_path / "text" / "sub" / "b.txt", b"b")
    write(tmp_path / "text" / "z.txt", b"z")
    write(tmp_path / "elsewhere.txt", b"e")
    (tmp_path / "text" / "a.txt").symlink_to(tmp_path / "text" / "z.txt")
    (tmp_path / "text" / "also").symlink_to(tmp_path / "text" / "sub")
    (tmp_path / "text" / "e.txt").symlink_to(tmp_path / "elsewhere.txt")
    stream = documents(str(tmp_path / "text"))
    assert list(stream) == ["e", "b", "z"]
    (line,) = stream.notes.lines()
    assert line == "links to files that are read anyway are not read again: 2 (a.txt, also/b.txt)"


def test_utf16_without_a_mark_is_no_text_of_zero_bytes(tmp_path):
    write(tmp_path / "a.txt", "hello there".encode("utf-16-le"))
    with pytest.raises(ConfigError, match=r"a\.txt' holds a zero byte .* convert the file to UTF-8"):
        list(documents(str(tmp_path / "a.txt")))


def test_a_file_that_states_a_size_no_text_has_is_refused_before_any_of_it_is_read(tmp_path):
    write(tmp_path / "a.txt.gz", bytes(1 << 25))
    with pytest.raises(ConfigError, match=r"expands to more than 33,554,432"):
        next(documents(str(tmp_path / "a.txt.gz")))


def test_a_name_that_no_file_can_have(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        documents(str(tmp_path / ("a" * 300 + ".txt")))
