"""Streamed blocks: whatever the order of events and the speed of copies, a turn finds the values of the last one."""

import random
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from qgalore.steps.streaming.copies import CopyError, Moment, ThreadCopies
from qgalore.steps.streaming.records import ALIGNMENT, GROUPS, fields_of_block, lay_out
from qgalore.steps.streaming.stream import Stream

CPU = torch.device("cpu")
DTYPES = (torch.int8, torch.uint8, torch.bfloat16, torch.float32)


class Block(nn.Module):
    """Some tensors of odd sizes and several dtypes; calling it adds up their sums."""

    def __init__(self, dice: random.Random):
        super().__init__()
        for number in range(dice.randint(1, 4)):
            values = torch.tensor([dice.randint(-9, 9) % 256 for _ in range(dice.randint(1, 700))])
            self.register_buffer(f"t{number}", values.to(dice.choice(DTYPES)))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, hidden):
        return hidden + sum(value.to(torch.float64).sum() for value in self.buffers())


def slow(dice: random.Random) -> ThreadCopies:
    return ThreadCopies(lambda: dice.choice((0.0, 0.0, 0.0, 1e-4, 1e-3)))


def values_of(blocks) -> list[list[torch.Tensor]]:
    return [[tensor.clone() for tensor in block.buffers()] for block in blocks]


def same(block: nn.Module, values: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(block.buffers(), values, strict=True))


def change(block: Block, values: list[torch.Tensor], dice: random.Random) -> None:
    """Change some tensors and what they are expected to be; in place, or by new ones as an optimizer may make."""
    for number in range(len(values) - 1):
        fresh = torch.randint(0, 100, values[number].shape).to(values[number].dtype)
        kind = dice.randrange(3)
        if kind == 0:
            getattr(block, f"t{number}").copy_(fresh)
        elif kind == 1:
            setattr(block, f"t{number}", fresh.clone())
        if kind < 2:
            values[number] = fresh


def one_walk(stream: Stream, expected, dice: random.Random) -> None:
    blocks = stream.blocks
    stream.begin()
    for number, block in enumerate(blocks):
        stream.enter(number, backward=False)
        assert same(block, expected[number]), f"forward, block {number}"
        stream.leave(number, stepped=False)
    if dice.random() < 0.8:
        for number in reversed(range(dice.randrange(len(blocks)), len(blocks))):
            stream.enter(number, backward=True)
            assert same(blocks[number], expected[number]), f"backward, block {number}"
            change(blocks[number], expected[number], dice)
            stream.leave(number, stepped=True)
    stream.end(whole=True)


@pytest.mark.parametrize("first", range(0, 240, 40))
def test_any_schedule_finds_what_was_left(first):
    for seed in range(first, first + 40):
        dice = random.Random(seed)
        torch.manual_seed(seed)
        model = nn.Sequential(*(Block(dice) for _ in range(dice.randint(1, 6))))
        expected = values_of(model)
        stream = Stream(model, list(model), CPU, slots=dice.choice((2, 3, 4)), copies=slow(dice))
        for _ in range(3):
            what = dice.randrange(4)
            if what == 0:  # between two walks anybody may write: a checkpoint is loaded, say
                number = dice.randrange(len(model))
                change(model[number], expected[number], dice)
            elif what == 1:
                total = sum(value.to(torch.float64).sum() for values in expected for value in values)
                assert model(torch.zeros((), dtype=torch.float64)) == total
            one_walk(stream, expected, dice)
        assert all(same(block, values) for block, values in zip(model, expected, strict=True)), f"seed {seed}"


def small(count: int = 5) -> nn.Sequential:
    dice = random.Random(1)
    return nn.Sequential(*(Block(dice) for _ in range(count)))


def test_a_turn_is_in_a_slot_and_nothing_stays_there():
    model = small()
    stream = Stream(model, list(model), CPU)
    stream.begin()
    memories = {slot.memory.untyped_storage().data_ptr() for slot in stream._slots.all}
    for number, block in enumerate(model):
        stream.enter(number, backward=False)
        storages = [tensor.untyped_storage() for tensor in block.buffers() if tensor.ndim]
        assert {storage.data_ptr() for storage in storages} <= memories
        del storages
        stream.leave(number, stepped=False)
        assert memories.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in block.buffers())
    stream.end(whole=True)
    memories = [StorageWeakRef(slot.memory.untyped_storage()) for slot in stream._slots.all]
    stream._made = None
    assert all(memory.expired() for memory in memories), "some tensor still lies in a slot"


def test_a_tensor_that_outlives_its_turn_is_refused():
    model = small()
    stream = Stream(model, list(model), CPU)
    stream.begin()
    stream.enter(0, backward=False)
    kept = model[0].t0.view(-1)[:1].expand(4)  # a view, as a module's cache may be
    with pytest.raises(RuntimeError, match=r"block 0 cannot be streamed.*memory.stream to none"):
        stream.leave(0, stepped=False)
    del kept


def test_shared_tensors_stay_where_they_are():
    model = small(3)
    model[1].shared = model[2].shared = nn.Parameter(torch.ones(9))
    model.outer = model[0].outer = nn.Parameter(torch.ones(9))
    stream = Stream(model, list(model)[:3], CPU)
    streamed = {id(entry.find()) for record in stream.records for entry in record.fields}
    assert streamed.isdisjoint({id(model[1].shared), id(model.outer)})
    assert sum(len(record.fields) for record in stream.records) == sum(len(list(b.buffers())) - 1 for b in model[:3])


def test_bytes_are_counted():
    """Forward all weights; backward all that the slots have lost; back all that stepped."""
    for blocks, slots in ((6, 2), (6, 3), (2, 2), (1, 2)):
        model = small(blocks)
        stream = Stream(model, list(model), CPU, slots=slots)
        one_walk_of_all(stream)
        sizes = [record.nbytes for record in stream.records]
        assert stream.copied["in"] == sum(sizes) + sum(sizes[: max(0, blocks - slots)])
        assert stream.copied["out"] == sum(sizes)
        assert stream.host_bytes == sum(sizes)
        assert stream.slot_bytes == max(sizes)
        assert [slot.memory.nbytes for slot in stream._slots.all] == [max(sizes)] * slots


def one_walk_of_all(stream: Stream, at=None) -> None:
    stream.begin()
    whole = False
    try:
        for number in range(len(stream.blocks)):
            stream.enter(number, backward=False)
            stream.leave(number, stepped=False)
        for number in reversed(range(len(stream.blocks))):
            stream.enter(number, backward=True)
            if at is not None:
                at(number)
            stream.leave(number, stepped=True)
        whole = True
    finally:
        stream.end(whole)


def test_a_record_is_aligned_and_its_groups_are_ranges():
    record = lay_out(fields_of_block(small(1)[0], set()))
    assert all(entry.first % ALIGNMENT == 0 for entry in record.fields)
    assert record.spans(GROUPS) == [(0, record.nbytes)]
    assert not record.spans(("bases",))
    assert record.size(("weights",)) == record.nbytes


class Failing(ThreadCopies):
    """Fails at one of its copies."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def start(self, way, target, source, span, after, what) -> Moment:
        self.left -= 1
        if self.left == 0:
            target = torch.empty(0, dtype=torch.uint8)  # a buffer that is too short, as a real fault would have it
        return super().start(way, target, source, span, after, what)


@pytest.mark.parametrize(
    ("at", "named"), [(1, "block 0 to the device"), (3, "block 2"), (8, "block 3 back to host memory")]
)
def test_a_failing_copy_ends_the_step_and_names_its_block(at, named):
    model = small()
    stream = Stream(model, list(model), CPU, copies=Failing(at))
    with pytest.raises(CopyError, match=named):
        one_walk_of_all(stream)


def test_an_error_in_a_turn_leaves_the_record_and_the_error():
    model = small()
    stream = Stream(model, list(model), CPU)
    before = values_of(model)

    def fail(number: int) -> None:
        model[number].t0.add_(1)
        if number == 2:
            raise KeyError("the error of the step")

    with pytest.raises(KeyError, match="the error of the step"):
        one_walk_of_all(stream, fail)
    assert [same(block, values) for block, values in zip(model, before, strict=True)] == [True] * 3 + [False] * 2
    one_walk_of_all(stream)


def test_the_next_block_comes_while_one_computes():
    """The copies of two turns overlap the turns: with a copy that cannot end before the next turn is entered."""
    gate, model = threading.Event(), small(2)
    stream = Stream(model, list(model), CPU, copies=ThreadCopies(lambda: gate.wait(10) and 0.0))
    gate.set()
    stream.begin()
    stream.enter(0, backward=False)
    gate.clear()
    stream.leave(0, stepped=False)  # does not wait for block 1
    gate.set()
    stream.enter(1, backward=False)
    stream.leave(1, stepped=False)
    stream.end(whole=True)


def test_a_backward_pass_outside_of_a_walk_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    Stream(model, list(model), CPU)
    with pytest.raises(RuntimeError, match="outside of a walk"):
        model(torch.ones(1, 4)).sum().backward()


def test_a_size_that_changed_is_named():
    model = small()
    stream = Stream(model, list(model), CPU)

    def grow(number: int) -> None:
        model[number].t0 = torch.zeros(1000)

    with pytest.raises(ValueError, match=r"t0 of block 4 is \(1000,\).*its record has room for"):
        one_walk_of_all(stream, grow)


def test_one_slot_is_refused():
    with pytest.raises(ValueError, match="too few"):
        Stream(small(), [], CPU, slots=1)


def test_old_memory_is_given_back():
    model = small()
    before = weakref.ref(model[0].t0)
    memory = StorageWeakRef(model[0].t0.untyped_storage())
    Stream(model, list(model), CPU)
    assert before() is model[0].t0
    assert memory.expired()
