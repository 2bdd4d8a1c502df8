"""What waits between the two passes comes back as it was, on the device or on the host."""

import pytest
import torch

from qgalore.steps.activations import Activations, Arguments, OnDevice, OnHost
from qgalore.steps.blocks import Call


@pytest.mark.parametrize("kind", [OnDevice, OnHost])
def test_what_is_put_comes_back(kind, device):
    store, kept = kind(), {}
    for block in range(2):
        for number in range(3):
            kept[block, number] = torch.randn(4, 5, device=device)
            store.put(block, number, kept[block, number].clone())
    for (block, number), value in kept.items():
        ahead = (block, number + 1)
        assert torch.equal(store.get(block, number, drop=False, ahead=ahead), value)
    for block, number in reversed(kept):
        found = store.get(block, number, ahead=(block, number - 1))
        assert found.device == value.device
        assert torch.equal(found, kept[block, number])
    with pytest.raises(KeyError):
        store.get(0, 0)


def test_the_host_keeps_copies_and_uses_its_buffers_again():
    store = OnHost()
    for round_ in range(3):
        tensors = [torch.full((8, 8), float(n + round_)) for n in range(3)]
        for number, tensor in enumerate(tensors):
            store.put(0, number, tensor)
            if number:
                tensors[number - 1].zero_()  # the device's memory is somebody else's by now
        assert [float(store.get(0, n, ahead=(0, n + 1))[0, 0]) for n in range(3)] == [
            0 + round_,
            1 + round_,
            2 + round_,
        ]
        assert store.host_bytes == 3 * 8 * 8 * 4


def test_a_tensor_that_was_fetched_ahead_is_fetched_once():
    store, fetched = OnHost(), []
    fetch = store._fetch
    store._fetch = lambda key: fetched.append(key) or fetch(key)
    for number in range(3):
        store.put(0, number, torch.full((2,), float(number)))
    for number in range(3):
        assert float(store.get(0, number, ahead=(0, number + 1))[0]) == number
    assert fetched == [(0, 0), (0, 1)]  # the newest was on the device still


def test_an_overwritten_key_gives_the_new_value():
    store = OnHost()
    store.put(0, 0, torch.zeros(3))
    store.put(0, 1, torch.ones(3))
    store.get(0, 1, ahead=(0, 0))
    store.put(0, 0, torch.full((3,), 7.0))
    store.put(0, 2, torch.ones(3))
    assert store.get(0, 0).tolist() == [7.0] * 3


def test_clearing_forgets_tensors_and_keeps_buffers():
    kept = Activations(where="host")
    kept.inputs.put(0, 0, torch.ones(4))
    kept.gradients.put(0, 0, torch.ones(4))
    kept.clear()
    with pytest.raises(KeyError):
        kept.inputs.get(0, 0)
    kept.inputs.put(5, 1, torch.ones(4))
    assert kept.host_bytes == 32


def test_large_arguments_are_parked_once_for_all_calls():
    store = OnHost()
    arguments = Arguments(store)
    masks = [torch.full((256, 256), float(n)) for n in range(2)]
    small, leaf = torch.ones(3), torch.randn(256, 256, requires_grad=True)
    for number, mask in enumerate(masks):
        arguments.put(number, [Call((None, mask), {"pair": (mask, small), "bias": leaf}, 0) for _ in range(3)])
    assert store.host_bytes == 2 * 256 * 256 * 4
    for number in (0, 1):
        call = arguments.get(1, number)
        assert torch.equal(call.args[1], masks[number])
        assert call.kwargs["pair"][0] is call.args[1]
        assert call.kwargs["pair"][1] is small
        assert call.kwargs["bias"] is leaf


def test_an_unknown_place_is_an_error():
    with pytest.raises(ValueError, match="choose device or host"):
        Activations(where="disk")
