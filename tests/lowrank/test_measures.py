import math

import bitsandbytes as bnb
import numpy as np
import pytest
import scipy.linalg
import torch

from qgalore import convert, optimizer
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.subspace import measures, search
from qgalore.lowrank.tensors.projected import ProjectedTensor
from qgalore.quant import basis, int8


def orthonormal(dim, rank, seed):
    return search.orthonormal(torch.randn(dim, rank, generator=torch.Generator().manual_seed(seed)))


def test_angle_cosines_are_scipys():
    old = orthonormal(64, 12, 0)
    new = search.orthonormal(old @ torch.randn(12, 12) + 0.3 * torch.randn(64, 12))
    angles = scipy.linalg.subspace_angles(old.double().numpy(), new.double().numpy())
    wanted = np.quantile(np.cos(angles), measures.QUANTILES)
    # a cosine is the root of an eigenvalue known to fp32: an error of 2⁻²³ under the root is 3.5e-4 at zero
    assert measures.angle_cosines(old, new) == pytest.approx(wanted.tolist(), abs=1e-3)
    assert measures.angle_cosines(old, old) == pytest.approx([1.0] * 5, abs=1e-5)


def test_orthogonal_subspaces_have_cosines_of_zero():
    both = orthonormal(32, 16, 1)
    assert measures.angle_cosines(both[:, :8], both[:, 8:]) == pytest.approx([0.0] * 5, abs=1e-3)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_captured_energy_and_spectrum_are_the_svds(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(gradient)
    energy, spectrum = measures.captured(gradient, search.exact_basis(gradient, 8))
    assert energy == pytest.approx(float(values[:8].square().sum() / values.square().sum()), rel=1e-5)
    assert spectrum == pytest.approx(
        np.quantile((values[:8] / values[0]).numpy(), measures.QUANTILES).tolist(), abs=2e-5
    )
    assert measures.captured(torch.zeros(shape), orthonormal(shape[1], 8, 0)) == (0.0, None)


def test_moment_shares_count_the_codes():
    leaf = torch.nn.Parameter(torch.zeros(64, 128))
    inner = bnb.optim.AdamW8bit([leaf], lr=0.1)
    leaf.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    leaf.grad[:16] = 0  # a quarter of the rows: whole blocks of zeros
    inner.step()
    shares = measures.moments(inner.state.values())
    state = inner.state[leaf]
    for number in (1, 2):
        code, absmax = state[f"qmap{number}"], state[f"absmax{number}"]
        values = bnb.functional.dequantize_blockwise(
            state[f"state{number}"].view(-1), absmax=absmax, code=code, blocksize=256
        ).view(-1, 256)
        assert shares[f"moment{number}_zero"] == pytest.approx(float((values == 0).float().mean()))
        top = values.abs() >= absmax[:, None] * (0.992 if number == 1 else 1.0)  # the lowest code is −0.99297
        top &= (values != 0) & ((values < 0) | (values >= absmax[:, None]))
        assert shares[f"moment{number}_saturated"] == pytest.approx(float(top.float().mean()), abs=1e-6)
        assert shares[f"moment{number}_zero"] >= 0.25
        assert shares[f"moment{number}_saturated"] >= 0.75 / 256  # the peak of each block that is not zero


def test_a_large_moment_is_sampled_without_bias():
    code = bnb.functional.create_dynamic_map(signed=True)
    codes = torch.randint(0, 256, (1 << 20,), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    codes[::256] = int((code == 0).nonzero())  # a pattern of the block length: a stride of 256 would see it alone
    state = {"state1": codes, "qmap1": code, "absmax1": torch.ones(codes.numel() // 256)}
    shares = measures.moments([state])
    assert shares["moment2_zero"] is None
    wanted = float((codes == int((code == 0).nonzero())).float().mean())
    assert shares["moment1_zero"] == pytest.approx(wanted, abs=5 * math.sqrt(wanted / measures.SAMPLE_CODES))


@pytest.mark.parametrize("states", [[], [{"exp_avg": torch.zeros(8)}], [{"state1": torch.zeros(8)}]])
def test_moments_that_are_not_8_bit_have_no_shares(states):
    assert set(measures.moments(states).values()) == {None}


@pytest.mark.parametrize("shape", [(96, 256), (256, 96), (256, 320)], ids=["wide", "tall", "odd groups"])
@pytest.mark.parametrize("shrink", [0.0, 0.02])
@pytest.mark.parametrize("size", [1e-3, 1e-1])
def test_int8_change_against_the_known_update(shape, shrink, size):
    """The estimate of the noise, which sees only the weights, against the noise itself."""
    generator = torch.Generator().manual_seed(5)
    module = LowRankLinear(torch.randn(shape, generator=generator) * 0.05, None, rank=32, group_size=32)
    for side in (module.left, module.right):
        if side is not None:
            side.assign(orthonormal(side.dim, 32, 6))
    rows = basis.update_rows(torch.randn(module.delta.shape, generator=generator), *module.columns(), size)
    before = measures.lines_before(module, 11)
    q, scale = module.weight.clone(), module.weight_scale.clone()
    old = int8.dequantize(module.weight, module.weight_scale)
    int8.write_back(module.weight.detach(), module.weight_scale, rows, shrink=shrink, key=(1, 2))
    change = measures.int8_change(module, before)

    take = [slice(None)] * 2
    take[before.dim] = slice(before.start, before.start + measures.SAMPLE_LINES)
    take = tuple(take)
    moved = int8.dequantize(module.weight, module.weight_scale) - old
    noise = (moved - (rows(0, shape[0]) - shrink * old))[take]
    share = float(noise.square().sum() / moved[take].square().sum())
    assert change["int8_changed"] == pytest.approx(float((module.weight != q)[take].float().mean()))
    # 8 lines of at least 64 free dimensions: the mean of 512 squares has a relative error of √(2/512) = 6 %
    assert change["int8_noise_share"] == pytest.approx(share, rel=0.2)
    if before.dim == 0:
        assert change["int8_rescaled"] == pytest.approx(float((module.weight_scale != scale)[take].float().mean()))


def test_without_a_change_or_room_there_is_no_noise():
    basis = orthonormal(32, 24, 0)
    lines = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    assert measures.noise_share(torch.zeros(4, 32), lines, basis[:, :8]) is None
    assert measures.noise_share(lines, lines, basis) is None


FIELDS = {"version", "rank", "shape", "angle_cosines", "spectrum", "int8_changed", "int8_rescaled", "int8_noise_share"}
FIELDS |= {f"moment{n}_{what}" for n in (1, 2) for what in ("zero", "saturated")}


@pytest.mark.parametrize("stepping", ["fused", "deferred"])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_every_refresh_record_is_completed(tiny_llama, token_batches, stepping, proj_type):
    model = tiny_llama(hidden_size=128, intermediate_size=160)
    convert(model, rank=40, proj_type=proj_type)
    opt = optimizer(model, lr=5e-3, stepping=stepping, update_proj_gap=2)
    modules = {slot.name: slot.module for slot in opt.tensors if isinstance(slot, ProjectedTensor)}
    for batch in token_batches(steps=5):
        model(input_ids=batch, labels=batch).loss.backward()
        opt.step()
        opt.zero_grad()
    assert any(not event["first"] for event in opt.events)
    for event in opt.events:
        assert set(event) >= FIELDS
        assert event["shape"] == list(modules[event["layer"]].weight.shape)
        assert (event["version"], event["rank"], event["spectrum"][-1]) == (measures.VERSION, 40, 1.0)
        assert 0 < event["int8_changed"] <= 1
        assert 0 <= event["int8_rescaled"] <= 1
        assert 0 < event["int8_noise_share"] <= 1
        assert event["first"] == (event["angle_cosines"] is None)
        eight_bit = modules[event["layer"]].delta.numel() >= 4096  # bitsandbytes keeps smaller moments in fp32
        assert (event["moment1_zero"] is not None) == (eight_bit and not event["first"])
        if not event["first"]:
            squares = np.square(event["angle_cosines"])
            assert squares[0] - 1e-3 <= event["overlap"] <= squares[-1] + 1e-3


def test_records_do_not_change_training(tiny_llama, token_batches, monkeypatch):
    """Weights of a run without the measurements are the same bits."""
    weights = []
    for measured in (True, False):
        if not measured:
            monkeypatch.setattr(measures, "lines_before", lambda *_: None)
            monkeypatch.setattr(measures, "moments", lambda *_: {})
            monkeypatch.setattr(measures, "angle_cosines", lambda *_: None)
        model = tiny_llama()
        convert(model, rank=16)
        opt = optimizer(model, lr=5e-3, update_proj_gap=2)
        for batch in token_batches(steps=4):
            model(input_ids=batch, labels=batch).loss.backward()
            opt.step()
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_record_is_short(tiny_llama, token_batches):
    """Under a kilobyte, whatever the layer's size: 7B's 224 layers at a gap of 500 write 450 kB in a thousand steps."""
    import json

    model = tiny_llama()
    convert(model, rank=16)
    opt = optimizer(model, lr=5e-3, update_proj_gap=1)
    for batch in token_batches(steps=3):
        model(input_ids=batch, labels=batch).loss.backward()
        opt.step()
    assert max(len(json.dumps(event)) for event in opt.events) < 1024
