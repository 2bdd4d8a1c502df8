import bitsandbytes as bnb
import pytest
import torch

from qgalore.errors import ConfigError
from qgalore.lowrank.subspace import moments


def stepped(make, shape, steps=3, device="cpu"):
    leaf = torch.nn.Parameter(torch.zeros(shape, device=device))
    inner = make([leaf])
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        leaf.grad = torch.randn(shape, generator=generator).to(device)
        inner.step()
    return inner, leaf


def orthogonal(r, seed=3):
    return torch.linalg.qr(torch.randn(r, r, generator=torch.Generator().manual_seed(seed))).Q


def test_rotation_follows_the_definition_on_each_side():
    inner, leaf = stepped(lambda p: torch.optim.AdamW(p, lr=0.1), (6, 4))
    m, v = inner.state[leaf]["exp_avg"].clone(), inner.state[leaf]["exp_avg_sq"].clone()
    left, right = orthogonal(6), orthogonal(4)
    moments.rotate(inner, leaf, left, right)
    torch.testing.assert_close(inner.state[leaf]["exp_avg"], left @ m @ right.T)
    torch.testing.assert_close(inner.state[leaf]["exp_avg_sq"], left.square() @ v @ right.square().T)
    assert bool((inner.state[leaf]["exp_avg_sq"] >= 0).all())
    assert float(inner.state[leaf]["step"]) == 3


def test_projected_momentum_is_the_same_vector_in_both_coordinates():
    """m P_oldᵀ seen through the new basis: what rotate is for."""
    old, new = (torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(s))).Q for s in (1, 2))
    inner, leaf = stepped(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), (5, 8))
    m = inner.state[leaf]["momentum_buffer"].clone()
    moments.rotate(inner, leaf, None, moments.change_of_basis(old, new))
    torch.testing.assert_close(inner.state[leaf]["momentum_buffer"], m @ old.T @ new)


def test_identity_leaves_moments_alone():
    inner, leaf = stepped(lambda p: torch.optim.AdamW(p, lr=0.1), (6, 4))
    before = {k: v.clone() for k, v in inner.state[leaf].items()}
    moments.rotate(inner, leaf, None, torch.eye(4))
    assert all(torch.equal(before[k], v) for k, v in inner.state[leaf].items())


def test_eight_bit_moments_rotate_within_their_resolution(device):
    inner, leaf = stepped(lambda p: bnb.optim.AdamW8bit(p, lr=0.1, weight_decay=0.0), (64, 128), device=device)
    state = inner.state[leaf]
    assert state["state1"].dtype == torch.uint8

    def dense(number):
        flat = bnb.functional.dequantize_blockwise(
            state[f"state{number}"].view(-1),
            absmax=state[f"absmax{number}"],
            code=state[f"qmap{number}"],
            blocksize=256,
        )
        return flat.view(64, 128)

    m, v = dense(1).clone(), dense(2).clone()
    turn = orthogonal(128).to(device)
    moments.rotate(inner, leaf, None, turn)
    for got, wanted in ((dense(1), m @ turn.T), (dense(2), v @ turn.square().T)):
        error = float((got - wanted).norm() / wanted.norm())
        assert error < 0.05  # one 8-bit dynamic rounding: a relative step of at most 7 %, half of it at most in error
    assert state["state1"].dtype == torch.uint8


def test_reset_starts_bias_correction_again():
    inner, leaf = stepped(lambda p: torch.optim.AdamW(p, lr=0.1), (6, 4))
    moments.reset(inner, leaf)
    assert leaf not in inner.state


def test_unknown_state_is_refused():
    inner, leaf = stepped(lambda p: torch.optim.Adagrad(p, lr=0.1), (6, 4))
    with pytest.raises(ConfigError, match=r"'sum'.*keep"):
        moments.rotate(inner, leaf, None, torch.eye(4))
