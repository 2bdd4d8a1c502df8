"""Page-locking in parts, by a driver that notes what it is asked for: a list that refuses after some parts."""

import gc

import pytest
import torch
from torch import nn

from qgalore.steps.streaming import locking, stream
from qgalore.steps.streaming.records import host_memory

PAGE = 4096


class Driver:
    def __init__(self, most: int | None = None) -> None:
        self.parts: dict[int, int] = {}
        self.most = most

    def register(self, address: int, size: int) -> int:
        if self.most is not None and len(self.parts) == self.most:
            return 2
        assert address % PAGE == 0, "a part begins on a page"
        assert all(address + size <= a or a + s <= address for a, s in self.parts.items()), "no byte is locked twice"
        self.parts[address] = size
        return 0

    def release(self, address: int) -> int:
        del self.parts[address]
        return 0


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(locking, "PART", 4 * PAGE)


def test_every_byte_is_locked_once_and_released():
    memories, driver = [host_memory(9 * PAGE + 5), host_memory(PAGE)], Driver()
    locked = locking.Locked(memories, driver.register, driver.release)
    assert sorted(driver.parts.values()) == sorted([4 * PAGE, 4 * PAGE, PAGE + 5, PAGE])
    assert locked.nbytes == sum(driver.parts.values()) == locked.total
    locked.release()
    assert not driver.parts


def test_a_refusal_leaves_the_rest_unlocked_and_says_so():
    driver = Driver(most=2)
    locked = locking.Locked([host_memory(12 * PAGE)], driver.register, driver.release)
    assert (locked.nbytes, locked.refused) == (8 * PAGE, 2)
    assert "CUDA error 2" in str(locked)
    assert "ulimit -l" in str(locked)
    del locked
    gc.collect()
    assert not driver.parts, "what was locked is released with the object"


def test_host_memory_begins_on_a_page_and_is_zero():
    memory = host_memory(PAGE + 1)
    assert memory.data_ptr() % PAGE == 0
    assert memory.nbytes == PAGE + 1
    assert torch.equal(memory, torch.zeros_like(memory))


def test_a_stream_keeps_its_pages_locked_as_long_as_it_lives(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(stream, "lock", lambda memories: locking.Locked(memories, driver.register, driver.release))
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128))
    found = stream.Stream(model, list(model), torch.device("cpu"))
    assert "page-locked" in found.lock()
    gc.collect()
    assert {record.memory.data_ptr() for record in found.records} <= driver.parts.keys()
    assert sum(driver.parts.values()) == found.host_bytes
    del found, model  # the blocks' hooks hold the stream too
    gc.collect()
    assert not driver.parts
