import torch

from qgalore.quant import dense, int8
from qgalore.quant.counter import derive_key


def test_fp32_takes_the_update_as_it_is(device):
    weight = torch.randn(6, 10, device=device)
    update = torch.randn(6, 10, device=device)
    wanted = weight * (1 - 0.25) + update
    dense.write_back(weight, lambda a, b: update[a:b], shrink=0.25, key=(0, 0))
    assert torch.equal(weight, wanted)


def test_bf16_rounds_to_a_neighbour_and_is_unbiased(device):
    """bf16 has 8 significant bits: around 1.5 its step is 2⁻⁷, and a tenth of it must survive on average."""
    n = 100_000
    for sign in (1, -1):
        weight = torch.full((100, n // 100), 1.5 * sign, dtype=torch.bfloat16, device=device)
        update = torch.full(weight.shape, 0.1 * 2.0**-7, device=device)
        dense.write_back(weight, lambda a, b, u=update: u[a:b], shrink=0.0, key=derive_key(3))
        mean = float((weight.double() - 1.5 * sign).mean()) / 2.0**-7
        assert abs(mean - 0.1) <= 5 * (0.1 * 0.9 / n) ** 0.5
        assert weight.unique().numel() == 2


def test_bf16_without_update_stays(device):
    weight = torch.randn(64, 64, device=device).to(torch.bfloat16)
    before = weight.clone()
    dense.write_back(weight, lambda a, b: torch.zeros(b - a, 64, device=device), shrink=0.0, key=derive_key(1))
    assert torch.equal(weight, before)


def test_bf16_tiles_do_not_show(device, monkeypatch):
    """Random bits are numbered through the whole tensor, whatever the tiles; one part's rows are the whole's, too."""
    start = torch.randn(37, 96, generator=torch.Generator().manual_seed(1)).to(device).to(torch.bfloat16)
    update = torch.randn(37, 96, generator=torch.Generator().manual_seed(2)).mul_(0.001).to(device)
    key, results = derive_key(6), []
    for tile in (1 << 20, 96 * 5, 1):
        monkeypatch.setattr(int8, "TILE_ELEMENTS", tile)
        weight = start.clone()
        dense.write_back(weight, lambda a, b: update[a:b], shrink=0.001, key=key)
        results.append(weight)
    assert all(torch.equal(weight, results[0]) for weight in results)
    part = start[20:].clone()
    dense.write_back(part, lambda a, b: update[20 + a : 20 + b], shrink=0.001, key=key, first_row=20)
    assert torch.equal(part, results[0][20:])
    assert not torch.equal(results[0], start)
