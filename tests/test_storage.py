import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qgalore.files import safetensors
from qgalore.files.safetensors import (
    Deferred,
    Rows,
    altered,
    create,
    file_bytes,
    joined,
    write_safetensors,
    write_share,
)


def test_writer_handles_odd_tensors(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.arange(12.0).view(3, 4).T,
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_size == file_bytes(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value), name


def test_deferred_tensors_are_made_one_at_a_time(tmp_path):
    made = []

    def make(value):
        made.append(value)
        return torch.full((2, 3), value)

    entries = {str(v): Deferred(torch.float32, (2, 3), lambda v=v: make(float(v))) for v in range(3)}
    assert made == []
    write_safetensors(tmp_path / "x.safetensors", entries, metadata={"format": "pt"})
    assert made == [0.0, 1.0, 2.0]
    assert torch.equal(load_file(tmp_path / "x.safetensors")["1"], torch.ones(2, 3))
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_long_write_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(safetensors._Progress, "INTERVAL", 0.0)
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(600), "b": torch.zeros(200)})
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"x\.safetensors: 7\d%, \d+ MB/s", lines[1])
    assert "100%" in lines[2]


def test_a_deferred_tensor_of_another_shape_is_a_bug(tmp_path):
    with pytest.raises(AssertionError, match="promised"):
        write_safetensors(tmp_path / "x", {"a": Deferred(torch.float32, (2,), lambda: torch.zeros(3))})


@pytest.mark.parametrize("piece", [100, 1000, safetensors.PIECE])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_several_write_the_file_that_one_writes(tmp_path, monkeypatch, piece, size):
    """Each its own rows, and an even share of what all have; every byte is sealed once."""
    monkeypatch.setattr(safetensors, "PIECE", piece)
    make = torch.Generator().manual_seed(size)
    whole = {
        "scalar": torch.tensor(3.5),
        "split": torch.randint(-9, 9, (30, 7), generator=make, dtype=torch.int8),
        "flat": torch.rand(60, generator=make, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "both": torch.rand(60, 11, generator=make),
        "turned": torch.rand(40, 30, generator=make).T,
    }
    one, path = tmp_path / "one", tmp_path / "several"
    write_safetensors(one, whole)
    create(path, whole)
    shares = []
    for rank in reversed(range(size)):
        mine = dict(whole)
        for name in ("split", "flat"):
            parts = whole[name].chunk(size)
            holders = tuple((number, part.nbytes) for number, part in enumerate(parts))
            mine[name] = Rows(parts[rank].clone(), whole[name].dtype, tuple(whole[name].shape), holders)
        shares.append(write_share(path, mine, rank, size))
    content = one.read_bytes()
    assert path.read_bytes() == content
    written = [sum(count for _, count, _ in share) for share in shares]
    split = (whole["split"].nbytes + whole["flat"].nbytes) // size  # beside the rest, dealt out in pieces
    even = (len(content) - split * size) / size
    assert max(abs(count - split - even) for count in written) <= max(min(piece, len(content) / size), 1)
    pieces = joined(shares, len(content))
    assert max(count for count, _ in pieces) <= piece
    with pytest.raises(AssertionError, match=r"by nobody|bytes were"):
        joined(shares[1:], len(content))
    for place in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        found = [altered(path, pieces, rank, 3) for rank in range(3)]
        (bad,) = [span for span in found if span is not None]
        assert bad[0] <= place < bad[1]


def test_what_one_process_holds_and_what_some_hold_no_rows_of(tmp_path):
    whole = {"few": torch.arange(6.0).view(2, 3), "one": torch.arange(5), "all": torch.ones(3)}
    write_safetensors(tmp_path / "one", whole)
    create(tmp_path / "three", whole)
    shares = []
    for rank in range(3):
        few = Rows(whole["few"][rank : rank + 1], torch.float32, (2, 3), ((0, 12), (1, 12), (2, 0)))
        one = Rows(whole["one"] if rank == 1 else None, torch.int64, (5,), ((1, 40),))
        shares.append(write_share(tmp_path / "three", {"few": few, "one": one, "all": whole["all"]}, rank, 3))
    content = (tmp_path / "one").read_bytes()
    assert (tmp_path / "three").read_bytes() == content
    joined(shares, len(content))
