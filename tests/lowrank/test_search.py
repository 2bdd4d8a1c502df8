from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from qgalore.lowrank.subspace import search, sides

SHAPES = [(60, 40), (40, 60), (50, 50), (33, 7), (16, 200)]


def gradient(shape, device="cpu", decay=0.7, seed=0):
    """A matrix with singular values decay^i: a subspace that is well defined, unlike pure noise's."""
    generator = torch.Generator().manual_seed(seed)
    k = min(shape)
    u = torch.linalg.qr(torch.randn(shape[0], k, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(shape[1], k, generator=generator)).Q
    return ((u * decay ** torch.arange(k)) @ v.T).to(device)


def random_generator(device):
    return torch.Generator(device).manual_seed(5)


def assert_orthonormal(columns):
    eye = torch.eye(columns.shape[1], device=columns.device)
    # Householder QR in fp32: an error of a small multiple of 2⁻²⁴ · √dim
    assert float((columns.T @ columns - eye).abs().max()) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_basis_is_scipys(shape, device):
    g = gradient(shape, device)
    basis = search.exact_basis(g, 6)
    assert_orthonormal(basis)
    reference = np.linalg.svd(g.cpu().double().numpy())[2][:6].T
    assert np.max(subspace_angles(basis.cpu().double().numpy(), reference)) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_randomized_basis_captures_what_the_exact_one_does(shape, device):
    g = gradient(shape, device, decay=0.9)
    basis = search.randomized_basis(g, 6, random_generator(device))
    assert basis.shape == (shape[1], 6)
    assert_orthonormal(basis)
    best = search.captured_energy(g, search.exact_basis(g, 6))
    assert search.captured_energy(g, basis) >= 0.999 * best


def test_randomized_basis_is_ordered(device):
    g = gradient((60, 40), device)
    basis = search.randomized_basis(g, 6, random_generator(device))
    energies = (g @ basis).square().sum(0)
    assert bool((energies[:-1] >= energies[1:]).all())
    assert abs(search.first_vector_cosine(search.exact_basis(g, 1), basis)) > 0.999


def test_warm_start_helps_on_a_flat_spectrum(device):
    """The reason to keep the old basis: on noise-like gradients, of which one iteration finds too little, the second
    starts from it and misses a third or less of what it misses without."""
    g = torch.randn(200, 160, generator=torch.Generator().manual_seed(1)).to(device)
    drifted = g + 0.1 * torch.randn(200, 160, generator=torch.Generator().manual_seed(2)).to(device)
    warm = search.exact_basis(g, 20)
    exact, cold, warm = (
        search.captured_energy(drifted, basis)
        for basis in (
            search.exact_basis(drifted, 20),
            *(search.randomized_basis(drifted, 20, random_generator(device), w) for w in (None, warm)),
        )
    )
    assert exact - warm < (exact - cold) / 3
    assert warm > 0.995 * exact


@pytest.mark.parametrize("shape", [(200, 160), (160, 200)])
def test_a_gradient_of_few_directions_needs_one_iteration_and_ignores_the_old_basis(shape, device):
    """So that the overlap of successive bases says how the gradient has moved, not where the search began."""
    g = gradient(shape, device, decay=0.8)
    old = search.random_basis(shape[1], 20, random_generator(device), device)
    cold, warm, one = (
        search.randomized_basis(g, 20, random_generator(device), *start) for start in ((), (old,), (old, 1))
    )
    assert torch.equal(cold, warm)
    assert torch.equal(cold, one)
    # 1 - 0.8⁴⁰ of the energy is there to be found, and an orthonormal basis cannot capture more than all
    assert search.captured_energy(g, cold) >= 0.98 * (1 - 0.8**40)


@pytest.mark.parametrize("used", [1, 5, 20])
def test_rows_of_which_few_are_not_zero_are_all_found(used, device):
    """Each sum has rows of its own: those of a sparse gradient seldom meet, and a sum of two has both where it goes."""
    g = torch.zeros(300, 100)
    g[:: 300 // used][:used] = torch.randn(used, 100, generator=torch.Generator().manual_seed(3))
    basis = search.randomized_basis(g.to(device), 24, random_generator(device))
    assert_orthonormal(basis)
    assert search.captured_energy(g.to(device), basis) == pytest.approx(1.0, abs=1e-5)


def test_captured_share_is_within_two_percent_where_one_iteration_is_enough(device):
    """A spectrum with a flat tail: 98 % in six directions and the rest everywhere."""
    noise = torch.randn(120, 90, generator=torch.Generator().manual_seed(4)).to(device)
    g = gradient((120, 90), device, decay=0.5)
    g += noise * 0.1 * torch.linalg.vector_norm(g) / torch.linalg.vector_norm(noise)
    basis = search.randomized_basis(g, 8, random_generator(device))
    assert_orthonormal(basis)
    best = search.captured_energy(g, search.exact_basis(g, 8))
    assert 0.98 * best <= search.captured_energy(g, basis) <= best * (1 + 1e-5)


def test_full_rank_captures_everything(device):
    g = gradient((33, 7), device)
    basis = search.randomized_basis(g, 7, random_generator(device))
    assert search.captured_energy(g, basis) == pytest.approx(1.0, abs=1e-5)


def test_rank_deficient_and_zero_gradients_still_give_orthonormal_columns(device):
    for g in (torch.zeros(30, 20, device=device), torch.ones(30, 20, device=device)):
        basis = search.randomized_basis(g, 6, random_generator(device))
        assert_orthonormal(basis)
    assert search.captured_energy(torch.zeros(30, 20, device=device), basis) == 0.0


def test_overlap_is_the_mean_squared_cosine_of_principal_angles(device):
    a, b = (search.random_basis(50, 8, torch.Generator().manual_seed(s), "cpu") for s in (1, 2))
    angles = subspace_angles(a.double().numpy(), b.double().numpy())
    wanted = float(np.mean(np.cos(angles) ** 2))
    assert search.overlap(a.to(device), b.to(device)) == pytest.approx(wanted, abs=1e-5)


def test_overlap_ignores_signs_and_rotations_where_the_first_vector_does_not():
    basis = search.random_basis(50, 8, torch.Generator().manual_seed(1), "cpu")
    turned = basis @ search.random_basis(8, 8, torch.Generator().manual_seed(2), "cpu")
    assert search.overlap(basis, turned) == pytest.approx(1.0, abs=1e-5)
    assert search.overlap(basis, -basis) == pytest.approx(1.0, abs=1e-5)
    assert search.first_vector_cosine(basis, -basis) == pytest.approx(-1.0, abs=1e-5)
    assert abs(search.first_vector_cosine(basis, turned)) < 0.9


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (400, 40)])
def test_signs_of_a_basis_are_the_gradients_not_the_draws(shape, mirrored, device):
    """Of a gradient that is the same up to 0.1 % noise, found with other random sums each time: all signs agree. The
    last shape takes the way of tall gradients. Eight draws would agree by chance once in 128, in each column."""
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 4, generator=generator)).Q for n in shape)
    g = u @ torch.diag(torch.tensor([10.0, 6.0, 3.0, 1.5])) @ v.T
    bases = []
    for seed in range(8):
        noisy = (-g if mirrored else g) + 1e-3 * torch.randn(shape, generator=generator)
        bases.append(search.randomized_basis(noisy.to(device), 4, torch.Generator(device).manual_seed(seed)))
    for one, two in pairwise(bases):
        assert float(torch.nn.functional.cosine_similarity(one, two, dim=0).min()) > 0.99


def test_chance_level_of_random_subspaces():
    overlaps = [
        search.overlap(*(search.random_basis(64, 16, torch.Generator().manual_seed(2 * i + j), "cpu") for j in (0, 1)))
        for i in range(200)
    ]
    removed = [search.above_chance(o, 16, 64) for o in overlaps]
    assert abs(np.mean(removed)) < 5 * np.std(removed) / 200**0.5
    assert search.above_chance(1.0, 16, 64) == 1.0
    assert search.above_chance(1.0, 64, 64) == 1.0


TALL = [(700, 40), (600, 33), (2000, 8)]


@pytest.mark.parametrize("shape", TALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [1 << 24, 5000])
def test_tall_gradients_have_the_exact_basis(shape, dtype, tile, device, monkeypatch):
    monkeypatch.setattr(sides, "TILE_ELEMENTS", tile)
    g = gradient(shape, device, decay=0.6).to(dtype)
    basis = search.randomized_basis(g, 6, random_generator(device))
    assert_orthonormal(basis)
    exact = search.exact_basis(g, 6)
    # the sketch leaves σ₂₃ and below out, 0.6¹⁶ of σ₇: after five products that is nothing; rounding is all there is
    assert search.overlap(exact, basis) > 0.9999
    energies = (g.float() @ basis).square().sum(0)
    assert bool((energies[:-1] >= energies[1:] * (1 - 1e-4)).all())
    assert search.captured_energy(g, basis) == pytest.approx(
        float((g.float() @ exact).square().sum() / g.float().square().sum()), rel=1e-4
    )


@pytest.mark.parametrize("one_pass", [search._pass, search._tall_pass])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (700, 40)])
def test_one_pass_gives_the_singular_vectors_of_the_gradient_in_the_range_of_its_sketch(one_pass, shape, device):
    """Against numpy, in double precision. Nyström's approximation of GᵀG from S is Gᵀ P G with P the projection onto
    the range of G S."""
    g = gradient(shape, device, decay=0.8)
    start = search.random_basis(shape[1], 12, random_generator(device), device)
    captured, basis, factor = one_pass(g, start, torch.tensor(2.0, device=device))
    turn, values = search.in_order(factor)
    columns = basis @ turn
    assert_orthonormal(columns)
    wide = g.cpu().double().numpy() / 2.0
    image = wide @ start.cpu().double().numpy()
    wanted = np.linalg.svd(np.linalg.qr(image)[0].T @ wide, full_matrices=False)
    assert float(captured) == pytest.approx(np.sum(image**2), rel=1e-5)
    assert values.cpu().numpy() == pytest.approx(wanted[1], rel=1e-4)
    assert np.max(subspace_angles(columns.cpu().double().numpy(), wanted[2].T)) < 1e-3


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_small_gaps_between_singular_values_cost_nothing(gap, device):
    """Values that differ by little in a matrix of a thousandfold range: vectors may turn among their like, but the span
    and its energy are those of numpy's decomposition in double precision."""
    values = torch.cat((1.0 - gap * torch.arange(12), 1e-3 * (1.0 - gap * torch.arange(12)))).double()
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    factor = ((u * values) @ v.T).float().to(device)
    turn, found = search.in_order(factor)
    assert_orthonormal(turn)
    assert found.cpu().numpy() == pytest.approx(values.numpy(), rel=1e-4)
    for kept in (12, 18):
        energy = float((turn[:, :kept].cpu().double().T @ factor.cpu().double()).square().sum())
        assert energy == pytest.approx(float(values[:kept].square().sum()), rel=1e-6)
    assert np.max(subspace_angles(turn[:, :12].cpu().double().numpy(), u[:, :12].numpy())) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.7, 0.999])
def test_the_basis_of_the_eigenproblem_is_the_exact_one(shape, decay, device):
    """What a GPU takes in place of a full SVD, also where neighbouring values differ by a part in a thousand."""
    g = gradient(shape, device, decay=decay)
    basis = search.gram_basis(g, 6)
    assert_orthonormal(basis)
    reference = np.linalg.svd(g.cpu().double().numpy())[2][:6].T
    assert np.max(subspace_angles(basis.cpu().double().numpy(), reference)) < 1e-3
    assert abs(search.first_vector_cosine(torch.tensor(reference[:, :1]).float().to(device), basis)) > 0.999


def test_a_tall_gradient_so_small_that_its_squares_underflow(device):
    g = gradient((700, 40), device, decay=0.6) * 1e-25
    basis = search.randomized_basis(g, 6, random_generator(device))
    assert search.overlap(search.exact_basis(g, 6), basis) > 0.9999


def test_tall_zero_gradients_still_give_orthonormal_columns(device):
    for g in (torch.zeros(300, 20, device=device), torch.ones(300, 20, device=device)):
        assert_orthonormal(search.randomized_basis(g, 6, random_generator(device)))


@pytest.mark.parametrize("with_left", [True, False])
@pytest.mark.parametrize("with_right", [True, False])
def test_projection_by_tiles(with_left, with_right, device, monkeypatch):
    g = gradient((60, 40), device)
    left = search.random_basis(60, 5, random_generator(device), device) if with_left else None
    right = search.random_basis(40, 5, random_generator(device), device) if with_right else None
    whole = sides.project(g, left, right)
    monkeypatch.setattr(sides, "TILE_ELEMENTS", 300)
    torch.testing.assert_close(sides.project(g, left, right), whole, rtol=1e-5, atol=1e-6)
    wanted = g if left is None else left.T @ g
    wanted = wanted if right is None else wanted @ right
    torch.testing.assert_close(whole, wanted, rtol=1e-5, atol=1e-6)
    rounded = g.to(torch.bfloat16)
    torch.testing.assert_close(sides.project(rounded, left, right), sides.project(rounded.float(), left, right))
    assert sides.project(rounded, left, right).dtype == torch.float32
