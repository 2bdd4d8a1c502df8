"""Files and folders are written whole or not at all, with ordinary permissions and one message."""

import errno
import os
import shutil
import stat

import pytest
import torch
from helpers import no_file_larger_than
from safetensors import SafetensorError
from safetensors.torch import save_file

from qgalore.errors import ConfigError
from qgalore.files import atomic


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_replaced_and_looks_like_any_other(tmp_path):
    path, plain = tmp_path / "a", tmp_path / "plain"
    plain.touch()
    for text in ("old", "nëw\n"):
        atomic.write_text(path, text)
        assert path.read_bytes() == text.encode()
    with atomic.replacing(tmp_path / "b") as fresh:
        fresh.unlink()  # a library may make the file anew, and closed to others
        os.close(os.open(fresh, os.O_CREAT | os.O_WRONLY, 0o600))
    assert mode(path) == mode(tmp_path / "b") == mode(plain)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "plain"}


def test_an_error_leaves_the_old_content(tmp_path):
    path = tmp_path / "a"
    atomic.write_text(path, "old")
    message = r"the record could not be written: .*too large.*\. Free space"
    refused = pytest.raises(ConfigError, match=message)
    with refused, atomic.explained("the record", "Free space"), no_file_larger_than(100):
        atomic.write_text(path, "x" * 200)
    with pytest.raises(OSError, match="too large"), atomic.replacing(path) as fresh, no_file_larger_than(100):
        save_file({"w": torch.zeros(100)}, fresh)  # SafetensorError, in the library's own words
    with pytest.raises(KeyError), atomic.replacing(path) as fresh:
        raise KeyError("a fault of ours stays one")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "out"
    for name in ("one", "two"):
        with atomic.replacing_folder(target) as fresh:
            (fresh / "inner").mkdir()
            (fresh / "inner" / name).write_text(name)
            (fresh / "inner" / name).chmod(0o600)
            assert not (target / "inner" / name).exists()
        assert [p.name for p in (target / "inner").iterdir()] == [name]
    (tmp_path / "plain").touch()
    assert mode(target / "inner" / "two") == mode(tmp_path / "plain")
    with pytest.raises(FileNotFoundError), atomic.replacing_folder(target) as fresh:
        (fresh / "half").rename(fresh / "gone" / "whole")
    assert (target / "inner" / "two").read_text() == "two"
    with pytest.raises(FileNotFoundError), atomic.replacing_folder(tmp_path / "new" / "inner" / "out") as fresh:
        (fresh / "half").rename(fresh / "gone")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "plain"}, "folders made for it go with it"


@pytest.mark.parametrize("words", ["I/O error: failed to fill", "IoError(Os { code: 28, kind: StorageFull })"])
def test_every_error_of_safetensors_is_one_of_the_disk(tmp_path, words):
    refused = pytest.raises(ConfigError, match=r"export could not be written: .*while serializing.*\. Free space")
    with refused as error, atomic.explained("the export", "Free space"), atomic.replacing_folder(tmp_path / "out"):
        raise SafetensorError(f"Error while serializing: {words}")
    assert error.value.__cause__.errno in (None, errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_has_made_stays(tmp_path):
    """Whether it came before the exchange, or in the middle of it; one that is not whole is replaced."""
    target = tmp_path / "out"

    def make(text):
        target.mkdir()
        (target / "text").write_text(text)

    def is_whole(folder):
        return (folder / "text").exists() and (folder / "text").read_text() == "whole"

    make("damaged")
    for text in ("whole", "another"):
        with atomic.replacing_folder(target, is_whole) as fresh:
            (fresh / "text").write_text(text)
        assert (target / "text").read_text() == "whole"
    shutil.rmtree(target)
    with atomic.replacing_folder(target, is_whole) as fresh:
        (fresh / "text").write_text("mine")
        make("whole")
    assert (target / "text").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [target], "nothing stays beside it"


def test_links_stay_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "file").write_text("old")
    (tmp_path / "file").symlink_to("real/file")
    atomic.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"
    with atomic.replacing_folder(tmp_path / "link") as fresh:
        (fresh / "other").touch()
    assert (tmp_path / "link").is_symlink()
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["other"]


def test_only_our_own_leftovers_are_swept(tmp_path):
    theirs = (".git", ".snapshot", ".a.tmp", "a.12345678.tmp", ".a.1234567x.tmp")
    for name in theirs:
        (tmp_path / name).mkdir()
    (tmp_path / ".config.yaml.0123abcd.tmp").touch()
    (tmp_path / ".export.0123abcd.old").mkdir()
    atomic.sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(theirs)
