"""Ranks that follow the gradient: the right one, within the budget, with its moments, and the same after a resume."""

import pytest
import torch
from helpers import save_checkpoint

import qgalore
from qgalore.errors import ConfigError
from qgalore.files import checkpoint
from qgalore.lowrank.inner.adam4bit import AdamW4bit
from qgalore.lowrank.inner.adam8bit import AdamW8bitCPU
from qgalore.lowrank.subspace import moments, ranks, search
from qgalore.lowrank.tensors.adaptive import AdaptiveTensor

AUTO = {"rank": "auto", "max_rank": 32, "mean_rank": 16, "group_size": 32}


def orthonormal(dim, rank, seed):
    return torch.linalg.qr(torch.randn(dim, rank, generator=torch.Generator().manual_seed(seed))).Q


def with_spectrum(shape, values):
    """A matrix of ``shape`` with singular values ``values``."""
    return orthonormal(shape[0], len(values), 1) * torch.tensor(values) @ orthonormal(shape[1], len(values), 2).T


def one_layer(shape, *, energy, max_rank, mean_rank=None, inner="adamw", **options):
    """(a function of a gradient that takes a step with it, the layer's module, the optimizer), with fp32 moments: in 8
    bits so small a layer may take more bytes at a lower rank, and keeps the higher one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
    qgalore.convert(model, rank="auto", max_rank=max_rank, mean_rank=mean_rank, group_size=32)
    opt = qgalore.optimizer(model, lr=1e-3, energy=energy, update_proj_gap=1, inner=inner, **options)

    def step(gradient):
        (model(torch.eye(shape[1])) * gradient.T).sum().backward()  # whose gradient is ``gradient``
        opt.step()

    return step, model[0], opt


def flat(count):
    return [1.0] * count


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)], ids=["right", "left"])
@pytest.mark.parametrize(
    ("values", "energy", "wanted"),
    [
        (flat(20), 0.97, 24),  # 20 of 20
        (flat(20), 0.77, 16),  # 16 of 20: 15.4
        (flat(20), 0.37, 8),
        (flat(40), 0.61, 32),  # 25 of 40 in whole steps of 8
        ([2.0**-i for i in range(20)], 0.9999, 8),  # 1 − 4⁻ʳ ≥ 0.9999 from r = 7 on
        (flat(60), 0.9, 48),  # the ceiling: 54 would be wanted
        (flat(20), 1.0, 48),  # all of it, whatever rounding says
    ],
)
def test_a_known_spectrum_gets_its_rank(shape, values, energy, wanted):
    step, layer, opt = one_layer(shape, energy=energy, max_rank=48)
    step(with_spectrum(shape, values))
    assert layer.rank == opt.events[0]["rank"] == wanted
    basis = layer.left or layer.right
    assert basis.rank == wanted
    assert layer.delta.shape == layer.delta_shape(wanted)
    assert opt.tensors[0].parts[0].state()["exp_avg"].shape == layer.delta.shape
    gradient = with_spectrum(shape, values)
    kept = search.captured_energy(gradient if layer.right else gradient.T, search.orthonormal(basis.columns()))
    # int4 steps are 1/7 of a group's largest value, about 2.4 standard deviations of 64 or 96: the rounding's energy is
    # (2.4 / 7)² / 12 = 1 % of a vector's
    assert kept > min(energy, sum(v * v for v in values[:48]) / sum(v * v for v in values)) - 0.02


def test_a_rank_moves_with_the_gradient_but_not_with_its_noise():
    step, layer, opt = one_layer((96, 64), energy=0.97, max_rank=64)
    seen = []
    for count in (64, 57, 33, 38, 8, 20):
        step(with_spectrum((96, 64), flat(count)))
        seen.append(layer.rank)
    # 64 → 56 is a change of 1/8, which stays; then 40, which is right for 38 too
    assert seen == [64, 64, 40, 40, 8, 24]
    assert [event["rank"] for event in opt.events] == seen
    assert sum(kept.nbytes for kept in (layer.right.codes, layer.right.scale)) == 24 * (
        32 + 2
    )  # int4 and a bf16 scale each


def test_no_gradient_and_no_decomposition_leave_the_rank(monkeypatch):
    step, layer, opt = one_layer((96, 64), energy=0.9, max_rank=48)
    step(torch.zeros(96, 64))
    assert layer.rank == 48
    step(with_spectrum((96, 64), flat(20)))
    before = layer.right.codes.clone()

    def fails(*_):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(search, "randomized_basis", fails)
    step(with_spectrum((96, 64), flat(4)))
    assert layer.rank == 24
    assert opt.events[-1]["failed"]
    assert torch.equal(layer.right.codes, before)
    fresh, other, _ = one_layer((96, 64), energy=0.9, max_rank=48, mean_rank=16)
    fresh(with_spectrum((96, 64), flat(4)))
    assert (other.rank, other.right.codes.shape[0]) == (16, 16)


def test_a_rank_above_the_matrix_is_its_side():
    step, layer, _ = one_layer((12, 64), energy=1.0, max_rank=48)
    assert (layer.rank, layer.max_rank) == (12, 12)
    step(torch.randn(12, 64))
    assert layer.rank == 12


def trained(model, batches, opt):
    for tokens in batches:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        opt.step()


def converted(tiny_llama, **options):
    """A model in which some layers want more than the mean rank and others less, and its optimizer."""
    model = tiny_llama(hidden_size=128, vocab_size=512, num_hidden_layers=1)
    qgalore.convert(model, **AUTO)
    return model, qgalore.optimizer(model, lr=5e-3, **{"energy": 0.8, "update_proj_gap": 2, **options})


def held(slots):
    """Bytes of the bases and moments of ``slots``."""
    values = [v for slot in slots for part in slot.parts for v in part.state().values() if torch.is_tensor(v)]
    sides = [side for slot in slots for side in (slot.module.left, slot.module.right) if side is not None]
    return sum(value.nbytes for value in [*values, *(v for side in sides for v in (side.codes, side.scale))])


@pytest.mark.parametrize("inner", ["adamw8bit", "adamw4bit", "adamw"])
def test_the_budget_is_never_exceeded(tiny_llama, token_batches, monkeypatch, inner):
    """After every single change of a rank; and it binds: a layer has grown beyond the mean, and wanted more."""
    model, opt = converted(tiny_llama, inner=inner, energy=0.95)
    slots = [slot for slot in opt.tensors if isinstance(slot, AdaptiveTensor)]
    budget, adopt = slots[0].budget, AdaptiveTensor.adopt
    seen = []

    def checked(slot, *arguments):
        adopt(slot, *arguments)
        assert all(used <= limit for used, limit in zip(budget.used(), budget.limit, strict=True))
        assert held(slots) <= budget.limit[0]
        seen.append(slot.module.rank)

    monkeypatch.setattr(AdaptiveTensor, "adopt", checked)
    assert budget.used() == budget.limit
    for tokens in token_batches(steps=6):
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        assert sum(s.gradient().nbytes for s in slots if s.gradient() is not None) <= budget.limit[1]
        opt.step()
        assert held(slots) == budget.used()[0] <= budget.limit[0]
    assert max(seen) > 16 > min(seen)
    assert any(event["energy"] < 0.94 for event in opt.events)


@pytest.mark.parametrize("inner", [AdamW8bitCPU, AdamW4bit, torch.optim.AdamW])
@pytest.mark.parametrize("shape", [(100, 24), (1000, 24), (24, 1000), (1003, 25), (40, 40)])
def test_bytes_of_moments_are_those_of_the_shape(inner, shape):
    leaf = torch.nn.Parameter(torch.zeros(shape))
    leaf.grad = torch.ones(shape)
    optimizer = inner([leaf])
    optimizer.step()
    own = {
        name: value for name, value in optimizer.state[leaf].items() if not name.startswith("qmap")
    }  # all share these
    wanted = sum(value.nbytes for value in own.values() if torch.is_tensor(value))
    assert ranks.measured_bytes(inner, torch.device("cpu"))(leaf.shape) == wanted


def test_what_is_not_needed_is_freed(tiny_llama, token_batches):
    model, opt = converted(tiny_llama, energy=0.2)
    slots = [slot for slot in opt.tensors if isinstance(slot, AdaptiveTensor)]
    trained(model, token_batches(steps=1), opt)
    assert {slot.module.rank for slot in slots} == {8}
    assert held(slots) < 0.7 * slots[0].budget.limit[0]  # half, but for small moments, which are in fp32


@pytest.mark.parametrize("stagger", [True, False])
def test_fused_and_deferred_give_the_same_weights(tiny_llama, token_batches, stagger):
    """Also where several layers reach for the same room in one step."""
    made = []
    for stepping in ("fused", "deferred"):
        model, opt = converted(tiny_llama, stepping=stepping, stagger=stagger)
        trained(model, token_batches(steps=6), opt)
        made.append((model.state_dict(), [event["rank"] for event in opt.events]))
    assert made[0][1] == made[1][1]
    assert len(set(made[0][1])) > 2
    for name, value in made[0][0].items():
        assert torch.equal(value, made[1][0][name]), name


@pytest.mark.parametrize("through", ["files", "dicts", "dicts, optimizer first"])
def test_resumed_equals_uninterrupted(tiny_llama, token_batches, tmp_path, through):
    batches = token_batches(steps=7)
    whole, opt = converted(tiny_llama)
    trained(whole, batches, opt)
    half, opt = converted(tiny_llama)
    trained(half, batches[:4], opt)
    again, other = converted(tiny_llama)
    assert len({slot.module.rank for slot in opt.tensors if isinstance(slot, AdaptiveTensor)}) > 1
    if through == "files":
        path = save_checkpoint(tmp_path / "step-00000004", half, opt.state_dict(), {})
        checkpoint.load_into(path, checkpoint.read_state(path), again, other)
    elif through == "dicts":
        again.load_state_dict(half.state_dict())
        other.load_state_dict(opt.state_dict())
    else:
        other.load_state_dict(opt.state_dict())
        again.load_state_dict(half.state_dict())
    trained(again, batches[4:], other)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_loaded_before_the_optimizer_is_built(tiny_llama, token_batches, tmp_path):
    """The budget is that of the mean rank, not of the ranks that a file happens to have."""
    model, opt = converted(tiny_llama)
    trained(model, token_batches(steps=2), opt)
    path = save_checkpoint(tmp_path / "step-00000002", model, opt.state_dict(), {})
    again = tiny_llama(hidden_size=128, vocab_size=512, num_hidden_layers=1)
    qgalore.convert(again, **AUTO)
    qgalore.load(again, path)
    other = qgalore.optimizer(again, lr=5e-3)
    found, wanted = ([s.module.rank for s in o.tensors if isinstance(s, AdaptiveTensor)] for o in (other, opt))
    assert found == wanted != [16] * 7
    assert other.tensors[0].budget.limit == opt.tensors[0].budget.limit
    assert other.tensors[0].budget.used() == opt.tensors[0].budget.used()


def test_a_fixed_rank_takes_no_other_ranks_tensors(tiny_llama):
    model, opt = converted(tiny_llama)
    fixed = tiny_llama(hidden_size=128, vocab_size=512, num_hidden_layers=1)
    qgalore.convert(fixed, rank=24, group_size=32)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fixed.load_state_dict(model.state_dict())
    with pytest.raises(KeyError, match="rank"):
        opt.load_state_dict(qgalore.optimizer(fixed, lr=1e-3).state_dict())


def stepped(make, shape):
    leaf = torch.nn.Parameter(torch.zeros(shape))
    inner = make([leaf])
    leaf.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inner.step()
    return inner.state[leaf]


def adam(params):
    return torch.optim.AdamW(params, lr=0.1)


def adam8bit(params):
    return AdamW8bitCPU(params, lr=0.1)


@pytest.mark.parametrize(("old", "new"), [(24, 8), (8, 24)], ids=["shrink", "grow"])
def test_moments_are_projected_onto_the_new_subspace(old, new):
    """m P_oldᵀ, projected by P_new: what lies in both subspaces stays, what does not is lost, nothing is added."""
    larger = orthonormal(64, 24, 5)
    before, after = larger[:, :old], larger[:, :new] @ orthonormal(new, new, 6)
    source, target = stepped(adam, (40, old)), stepped(adam, (40, new))
    m, v = source["exp_avg"].clone(), source["exp_avg_sq"].clone()
    source["step"] += 4
    change = moments.change_of_basis(before, after)
    moments.carry(source, target, None, change)
    torch.testing.assert_close(target["exp_avg"] @ after.T, m @ before.T @ (after @ after.T), rtol=1e-4, atol=1e-6)
    shared = min(old, new)  # the first vectors are in both
    torch.testing.assert_close(target["exp_avg"].square().sum(), m[:, :shared].square().sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(target["exp_avg_sq"].sum(), v[:, :shared].sum(), rtol=1e-4, atol=0)
    assert bool((target["exp_avg_sq"] >= 0).all())
    assert float(target["step"]) == 5


@pytest.mark.parametrize(("old", "new"), [(128, 64), (64, 128), (32, 128)], ids=["8 bit", "grow", "from fp32"])
def test_eight_bit_moments_are_carried_within_their_resolution(old, new):
    """The state has the format of its new size: 8 bits from 4,096 values on."""
    after = orthonormal(256, max(old, new), 5)
    source, target = stepped(adam8bit, (64, old)), stepped(adam8bit, (64, new))
    assert (source["state1"].dtype == torch.uint8) == (64 * old >= 4096)
    change = moments.change_of_basis(after[:, :old], after[:, :new])
    moments.carry(source, target, None, change)
    assert target["state1"].dtype == torch.uint8
    m, carried = moments.read(source, "state1"), moments.read(target, "state1")
    shared = min(old, new)
    # one 8-bit dynamic rounding: a relative step of at most 7 %, half of it at most in error
    assert float((carried[:, :shared] - m[:, :shared]).norm() / m[:, :shared].norm()) < 0.04
    assert target["step"] == 1


@pytest.mark.parametrize("moments_do", ["keep", "reset"])
def test_moments_that_are_not_turned_begin_again(capsys, moments_do):
    step, _, opt = one_layer((96, 64), energy=0.97, max_rank=64, moments=moments_do)
    assert ("cannot be kept" in capsys.readouterr().out) == (moments_do == "keep")
    for count in (60, 60, 20):
        step(with_spectrum((96, 64), flat(count)))
    state = opt.tensors[0].parts[0].state()
    assert state["exp_avg"].shape == (96, 24)
    assert float(state["step"]) == 1


def test_large_layers_step_in_parts(monkeypatch):
    from qgalore.lowrank import factory

    made = []
    for limit in (1 << 30, 4096):
        monkeypatch.setattr(factory, "PART_ELEMENTS", limit)
        step, layer, opt = one_layer((512, 64), energy=0.97, max_rank=64)
        for count in (60, 20, 30):
            step(with_spectrum((512, 64), flat(count)))
        made.append((layer.weight.clone(), layer.rank, len(opt.tensors[0].parts)))
    assert [entry[1:] for entry in made] == [(32, 1), (32, 8)]
    assert torch.equal(made[0][0], made[1][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "auto", "mean_rank": 4}, "ranks move by 8"),
        ({"rank": "auto", "max_rank": 7}, "ranks move by 8"),
        ({"rank": "auto", "max_rank": 16, "mean_rank": 24}, "above max_rank"),
        ({"rank": "auto", "proj_type": "full"}, "one spectrum"),
        ({"rank": 8, "max_rank": 16}, "rank 'auto' only"),
        ({"rank": "some"}, "'auto'"),
    ],
)
def test_conversions_that_cannot_work_are_refused(tiny_llama, options, message):
    with pytest.raises(ConfigError, match=message):
        qgalore.convert(tiny_llama(), **options)


def test_optimizers_that_cannot_work_are_refused(tiny_llama):
    model = tiny_llama()
    report = qgalore.convert(model, rank="auto")
    assert "quarter of the smaller side" in str(report)
    assert "≤ 16" in str(report)
    for energy in (0.0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"energy is .* \(0, 1\]"):
            qgalore.optimizer(model, lr=1e-3, energy=energy)
    with pytest.raises(ConfigError, match="only rule galore moves ranks"):
        qgalore.optimizer(model, lr=1e-3, rule="fira", stepping="fused")
