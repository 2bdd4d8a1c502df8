import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qgalore.lowrank.layers.head import chunked_cross_entropy, vocabulary_blocks
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.subspace.sides import PROJ_TYPES

WIDTH = 32


def hidden_and_labels(tokens, vocabulary, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(device, dtype).requires_grad_()
    return hidden, torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)


def linear_head(vocabulary, device, dtype=torch.float32, bias=True):
    torch.manual_seed(4)
    head = nn.Linear(WIDTH, vocabulary, bias=bias, dtype=dtype)
    nn.init.normal_(head.weight, std=0.3)
    return head.to(device)


def low_rank_head(vocabulary, device, proj_type, *, rank=5, group_size=16, dtype=torch.float32):
    dense = linear_head(vocabulary, device, dtype)
    options = {"rank": rank, "proj_type": proj_type or "std", "basis_format": "fp32", "group_size": group_size}
    head = LowRankLinear(dense.weight.detach(), dense.bias.detach(), **options)
    for side in (head.left, head.right):
        if side is not None:
            side.assign(torch.linalg.qr(torch.randn(side.dim, side.rank)).Q.to(device))
    return head


def plain(hidden, head, labels):
    return nn.functional.cross_entropy(head(hidden).float(), labels, ignore_index=-100, reduction="sum")


def gradients(loss_of, hidden, head):
    """(loss, hidden's gradient and each leaf's by name), under a gradient of the loss other than one."""
    hidden.grad = None
    head.zero_grad(set_to_none=True)
    loss = loss_of()
    (loss * 0.37).backward()
    named = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    return loss.detach(), {"hidden": hidden.grad.clone(), **named}


def assert_equal_up_to(got, wanted, tolerance):
    """Errors relative to the whole tensor's norm: entries that cancel have no relative accuracy of their own."""
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype, name
        assert got[name].shape == wanted[name].shape, name
        error = float((got[name].float() - wanted[name].float()).norm() / wanted[name].float().norm())
        assert error <= tolerance, (name, error)


# fp32 sums of at most 1000 terms in another order: an error of about √1000 · 2⁻²⁴, with some room
FP32 = 1e-5
# bf16 rounds entries by up to 2⁻⁹, in each of: logits (equal in both), p, projected columns, the product, block sums
BF16 = 4 * 2.0**-9


def compare(hidden, head, labels, limit, tolerance):
    wanted_loss, wanted = gradients(lambda: plain(hidden, head, labels), hidden, head)
    loss, got = gradients(lambda: chunked_cross_entropy(hidden, head, labels, limit=limit), hidden, head)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6 if tolerance == FP32 else 2.0**-9, atol=0.0)
    assert_equal_up_to(got, wanted, tolerance)
    return wanted


@pytest.mark.parametrize("vocabulary", [97, 1000])
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("limit", [1, 13 * 7, 13 * 70, 1 << 24], ids=lambda n: f"limit{n}")
@pytest.mark.parametrize("bias", ["bias", ""])
def test_linear_head_gives_the_plain_loss_and_gradients(vocabulary, tokens, limit, bias, device):
    hidden, labels = hidden_and_labels(tokens, vocabulary, device)
    labels[1::4] = -100
    wanted = compare(hidden, linear_head(vocabulary, device, bias=bool(bias)), labels, limit, FP32)
    assert set(wanted) == {"hidden", "weight", *(["bias"] if bias else [])}


@pytest.mark.parametrize("proj_type", [*PROJ_TYPES, None])
@pytest.mark.parametrize("vocabulary", [11, 97])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("leaf", ["delta", "probe"])
def test_low_rank_head_gives_the_plain_loss_and_gradients(proj_type, vocabulary, group_size, leaf, device):
    hidden, labels = hidden_and_labels(13, vocabulary, device)
    labels[2] = -100
    rank = None if proj_type is None else 5
    head = low_rank_head(vocabulary, device, proj_type, rank=rank, group_size=group_size)
    head.delta.requires_grad_(leaf == "delta")
    head.probe.requires_grad_(leaf == "probe")
    wanted = compare(hidden, head, labels, 13 * 20, FP32)
    assert set(wanted) == {"hidden", "bias", leaf}


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_bfloat16(proj_type, device):
    hidden, labels = hidden_and_labels(40, 500, device, torch.bfloat16)
    compare(hidden, linear_head(500, device, torch.bfloat16), labels, 40 * 64, BF16)
    head = low_rank_head(500, device, proj_type, dtype=torch.bfloat16)
    head.probe.requires_grad_(True)
    assert set(compare(hidden, head, labels, 40 * 64, BF16)) == {"hidden", "bias", "delta", "probe"}


def test_autocast_computes_in_its_dtype(device):
    hidden, labels = hidden_and_labels(20, 97, device)
    head = linear_head(97, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        wanted_loss, wanted = gradients(lambda: plain(hidden, head, labels), hidden, head)
        loss, got = gradients(lambda: chunked_cross_entropy(hidden, head, labels, limit=20 * 64), hidden, head)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0.0)
    assert_equal_up_to(got, wanted, BF16)


def test_all_labels_ignored_is_zero_with_zero_gradients(device):
    hidden, labels = hidden_and_labels(5, 97, device)
    head = linear_head(97, device)
    labels[:] = -100
    loss, got = gradients(lambda: chunked_cross_entropy(hidden, head, labels), hidden, head)
    assert float(loss) == 0.0
    assert set(got) == {"hidden", "weight", "bias"}
    assert not any(bool(gradient.any()) for gradient in got.values())


def test_a_label_outside_the_vocabulary_is_not_silent(device):
    hidden, labels = hidden_and_labels(5, 97, device)
    for wrong in (97, -1):
        labels[2] = wrong
        assert torch.isnan(chunked_cross_entropy(hidden, linear_head(97, device), labels, limit=5 * 64))


def test_large_logits_do_not_overflow(device):
    hidden, labels = hidden_and_labels(5, 97, device)
    head = linear_head(97, device)
    with torch.no_grad():
        head.weight.mul_(1e3)
    torch.testing.assert_close(
        chunked_cross_entropy(hidden, head, labels, limit=5 * 10), plain(hidden, head, labels), rtol=1e-6, atol=0.0
    )


def test_frozen_leaves_get_no_gradient(device):
    hidden, labels = hidden_and_labels(5, 97, device)
    head = linear_head(97, device).requires_grad_(False)
    _, got = gradients(lambda: chunked_cross_entropy(hidden, head, labels), hidden, head)
    assert set(got) == {"hidden"}
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, head, labels).requires_grad


def test_other_heads_are_refused(device):
    hidden, labels = hidden_and_labels(5, 97, device)
    with pytest.raises(TypeError, match="Sequential"):
        chunked_cross_entropy(hidden, nn.Sequential(linear_head(97, device)), labels)


@pytest.mark.parametrize(("tokens", "limit"), [(1, 64), (7, 1000), (1000, 10), (13, 1 << 24), (0, 64)])
def test_blocks_cover_the_vocabulary_within_the_limit(tokens, limit):
    blocks = vocabulary_blocks(tokens, 1000, limit)
    assert [a for a, _ in blocks] == [0, *(b for _, b in blocks[:-1])]
    assert blocks[-1][1] == 1000
    for a, b in blocks:
        assert tokens * (b - a) <= max(limit, tokens)
    if limit // max(tokens, 1) >= 64:
        assert all((b - a) % 64 == 0 for a, b in blocks[:-1])


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns, but for those shaped like a stored weight."""

    def __init__(self, *allowed):
        super().__init__()
        self.allowed, self.largest = set(allowed), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for value in output if isinstance(output, tuple | list) else [output]:
            if torch.is_tensor(value) and tuple(value.shape) not in self.allowed:
                self.largest = max(self.largest, value.numel())
        return output


@pytest.mark.parametrize("kind", ["linear", "int8", "int8 left", "int8 probe"])
def test_no_tensor_of_tokens_times_vocabulary_is_made(kind, device):
    tokens, vocabulary, limit = 256, 1024, 256 * 64
    hidden, labels = hidden_and_labels(tokens, vocabulary, device)
    if kind == "linear":
        head = linear_head(vocabulary, device)
    else:
        head = low_rank_head(vocabulary, device, "left" if "left" in kind else "std")
        head.probe.requires_grad_("probe" in kind)
    # nothing but a block of logits, or a weight-shaped gradient; the dequantized weight exists in blocks only
    with LargestTensor((vocabulary, WIDTH)) as made:
        plain(hidden, head, labels).backward()
    assert made.largest == tokens * vocabulary
    allowed = [(vocabulary, WIDTH)] if kind in ("linear", "int8 probe") else []
    with LargestTensor(*allowed) as made:
        chunked_cross_entropy(hidden, head, labels, limit=limit).backward()
    assert made.largest == limit
    assert limit < vocabulary * WIDTH


def test_a_gradient_hook_fires_once(device):
    hidden, labels = hidden_and_labels(13, 97, device)
    head = low_rank_head(97, device, "std")
    calls = []
    head.delta.register_post_accumulate_grad_hook(lambda leaf: calls.append(leaf.grad.clone()))
    for expected in (1, 2):
        head.delta.grad = None
        chunked_cross_entropy(hidden, head, labels, limit=13 * 10).backward()
        assert len(calls) == expected
    assert torch.equal(calls[0], calls[1])


def test_checkpointing_the_layers_below_changes_nothing(device):
    hidden, labels = hidden_and_labels(13, 97, device)
    head = low_rank_head(97, device, "std")
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).to(device)

    def run(through):
        block.zero_grad(set_to_none=True)
        loss, got = gradients(lambda: chunked_cross_entropy(through(hidden), head, labels, limit=999), hidden, head)
        return {"loss": loss, **got, "block": block[0].weight.grad.clone()}

    direct, again = run(block), run(lambda h: checkpoint(block, h, use_reentrant=False))
    assert direct.keys() == again.keys()
    for name in direct:
        assert torch.equal(direct[name], again[name]), name
