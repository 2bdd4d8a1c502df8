"""The device that is not there refuses and counts what a GPU would."""

from contextlib import suppress

import pytest
import torch
from pretended import pretended
from pretended_device import DEVICE, Generator, RefusedByCudaError
from torch._subclasses.fake_tensor import DynamicOutputShapeException


@pytest.fixture
def device():
    with pretended() as there, there.mode, there:
        yield there


def test_tensors_say_that_they_are_there_and_autograd_works(device):
    weight = torch.nn.Parameter(torch.randn(4, 4, device="cuda", dtype=torch.bfloat16))
    (torch.ones(2, 4, device=DEVICE, dtype=torch.bfloat16) @ weight).sum().backward()
    assert weight.is_cuda
    assert weight.grad.device == DEVICE
    weight.data = torch.zeros(4, 4, dtype=torch.bfloat16)
    assert weight.device.type == "cpu", "data may come to rest elsewhere"


def test_devices_do_not_mix(device):
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="cuda") + torch.ones(3)
    torch.ones(3, device="cuda") + torch.tensor(2.0)  # a number of the host's may take part


@pytest.mark.parametrize(
    "operation",
    [
        lambda: torch.ones(32, 8, dtype=torch.int8, device="cuda") @ torch.ones(8, 8, dtype=torch.int8, device="cuda"),
        lambda: torch.linalg.qr(torch.ones(8, 8, dtype=torch.bfloat16, device="cuda")),
        lambda: torch._int_mm(*(torch.ones(16, 16, dtype=torch.int8, device="cuda") for _ in "ab")),
        lambda: torch.randn(3, generator=Generator("cpu"), device="cuda"),
        lambda: torch.ones(3, device="cuda").numpy(),
    ],
    ids=["int8 by mm", "QR in bf16", "few tokens", "generator", "numpy"],
)
def test_what_cuda_has_no_code_for_is_refused(device, operation):
    with pytest.raises(RefusedByCudaError):
        operation()


def test_waits_are_counted(device):
    x = torch.ones(4, device="cuda")
    for wait in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.tolist(), lambda: x.cpu(), lambda: x[x > 0]):
        before = device.account.waits.total()
        with suppress(DynamicOutputShapeException):  # how many are chosen is not known here
            wait()
        assert device.account.waits.total() == before + 1
    torch.ones(4).sum().item()  # of the host's own
    assert device.account.waits.total() == before + 1


def test_copies_are_counted_and_only_locked_pages_run_beside_the_rest(device):
    locked, x = torch.empty(1024, pin_memory=True), torch.empty(1024, device="cuda")
    x.copy_(locked, non_blocking=True)
    locked.copy_(x, non_blocking=True)
    assert (device.account.to_device, device.account.to_host) == (4096, 4096)
    assert not device.account.waits
    assert not device.account.pageable
    torch.empty(1024).to("cuda", non_blocking=True)
    assert device.account.pageable.total() == 1
    torch.empty(1024).to("cuda")
    assert device.account.waits.total() == 1


def test_views_launch_nothing_and_operations_do(device):
    x = torch.empty(4, 4, device="cuda")
    x.T[1:].unsqueeze(0).expand(2, 3, 4)
    before = device.account.launches
    x.add_(1).mul(2)
    assert device.account.launches == before + 2
