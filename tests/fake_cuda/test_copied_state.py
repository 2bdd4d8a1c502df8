"""The copy that a checkpoint is written from, off a device that is not there."""

import pytest
import torch
from pretended import pretended

from qgalore.files import safetensors


@pytest.fixture
def device():
    with pretended() as device, device.mode, device:
        yield device


def test_the_state_comes_into_locked_pages_and_is_waited_for_once(device, tmp_path):
    state = {
        "weight": torch.empty(1000, 3, dtype=torch.bfloat16, device="cuda"),
        "turned": torch.empty(40, 50, dtype=torch.int8, device="cuda").t(),
        "step": torch.ones((), device="cpu"),
    }
    safetensors.create(tmp_path / "file", state)
    copied = safetensors.Copied(state)
    assert copied.locked
    assert device.account.to_host == 6000 + 2000
    assert not device.account.pageable
    assert device.account.waits.total() == 1
    copied.write(tmp_path / "file")
    assert device.account.waits.total() == 1
    assert not safetensors.Copied({"step": state["step"]}).locked
