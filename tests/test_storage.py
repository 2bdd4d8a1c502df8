import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qgalore import storage
from qgalore.storage import Deferred, file_bytes, write_safetensors


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
    monkeypatch.setattr(storage._Progress, "INTERVAL", 0.0)
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(600), "b": torch.zeros(200)})
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"x\.safetensors: 7\d%, \d+ MB/s", lines[1])
    assert "100%" in lines[2]


def test_a_deferred_tensor_of_another_shape_is_a_bug(tmp_path):
    with pytest.raises(AssertionError, match="promised"):
        write_safetensors(tmp_path / "x", {"a": Deferred(torch.float32, (2,), lambda: torch.zeros(3))})
