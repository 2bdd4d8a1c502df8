"""The invariants of a step: equal to AdamW at full rank, fused equal to deferred, nothing left out, nothing kept."""

import copy

import pytest
import torch
from helpers import QUICK, assert_same, distance, loss_of, stored, train

from qgalore.errors import ConfigError, NumericalError
from qgalore.lowrank.factory import optimizer
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.tensors.projected import ProjectedTensor
from qgalore.models.convert import convert

LAZY = {"update_proj_gap": 3, "moments": "rotate"}


@pytest.mark.parametrize("stepping", ["fused", "deferred"])
@pytest.mark.parametrize("converted", [True, False])
def test_full_rank_steps_are_adamws(tiny_llama, token_batches, device, stepping, converted):
    """Invariant 1. Both sum the same fp32 terms in another order (p·decay + Δ against p·decay − step): a rounding of
    2⁻²⁴ of each weight a step, fed back through Adam's normalisation; 1e-4 of the way travelled is far above that and
    far below any difference in the rule."""
    model = tiny_llama(device)
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    if converted:
        convert(model, rank=None, weight_format="none")
    rest = {"stepping": stepping, "dense": not converted}
    opt = optimizer(model, lr=1e-3, inner="adamw", scale=1.0, weight_decay=0.1, **rest)
    groups = [
        {"params": [p for p in twin.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    batches = token_batches(device, steps=12)
    train(model, opt, batches)
    train(twin, torch.optim.AdamW(groups, lr=1e-3), batches)
    names = list(dict(twin.named_parameters()))
    mine = model.state_dict()
    assert distance([mine[n] for n in names], list(twin.parameters()), list(start.parameters())) < 1e-4


def galore_reference(weight, gradients, *, rank, lr, scale, gap, betas=(0.9, 0.999), eps=1e-8):
    """GaLore's Algorithm 2 (arXiv 2403.03507) on one matrix, written from the paper: project, Adam, project back.

    The paper keeps the moments as they are when the subspace changes, so the result depends on the signs that an SVD
    leaves open: the decomposition is taken of the tall orientation, as the package does.
    """
    tall = weight.shape[0] >= weight.shape[1]
    weight, m, v, basis = weight.clone(), 0.0, 0.0, None
    for step, gradient_of in enumerate(gradients):
        gradient = gradient_of(weight)
        if step % gap == 0:
            basis = torch.linalg.svd(gradient if tall else gradient.T, full_matrices=False).Vh[:rank].T
        r = gradient @ basis if tall else basis.T @ gradient
        m = betas[0] * m + (1 - betas[0]) * r
        v = betas[1] * v + (1 - betas[1]) * r * r
        n = (m / (1 - betas[0] ** (step + 1))) / ((v / (1 - betas[1] ** (step + 1))).sqrt() + eps)
        weight -= lr * scale * (n @ basis.T if tall else basis @ n)
    return weight


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("stepping", ["fused", "deferred"])
def test_galore_is_the_papers_algorithm(shape, stepping, device):
    """50 steps, a new subspace in steps 0, 20 and 40, on a least-squares problem with noise in every step."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator).to(device) * 0.1
    data = [torch.randn(64, shape[1], generator=generator).to(device) for _ in range(50)]
    target = torch.randn(shape, generator=generator).to(device)

    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False)).to(device)
    with torch.no_grad():
        model[0].weight.copy_(start)
    convert(model, rank=6, weight_format="none", basis_format="fp32")
    options = {"update_proj_gap": 20, "cos_threshold": 2.0, "stagger": False, "projector": "exact", "moments": "keep"}
    opt = optimizer(model, lr=0.02, scale=0.5, inner="adamw", stepping=stepping, **options)
    for x in data:
        ((model(x) - x @ target.T).square().sum() / 64).backward()
        opt.step()

    def gradient_of(x):
        return lambda weight: 2 / 64 * (x @ (weight - target).T).T @ x

    wanted = galore_reference(start, [gradient_of(x) for x in data], rank=6, lr=0.02, scale=0.5, gap=20)
    assert model[0].weight.shape == shape
    # fp32 against fp32 through three SVDs and 50 Adam steps; a wrong sign or side moves the distance to order one
    assert distance([model[0].weight], [wanted], [start]) < 1e-3
    assert len(opt.events) == 3


@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_fused_and_deferred_give_the_same_bits(tiny_llama, token_batches, device, moments, proj_type):
    results = []
    for stepping in ("fused", "deferred"):
        model = tiny_llama(device)
        convert(model, **QUICK, proj_type=proj_type)
        opt = optimizer(model, lr=5e-3, weight_decay=0.01, stepping=stepping, update_proj_gap=3, moments=moments)
        train(model, opt, token_batches(device, steps=8))
        state = opt.state_dict()["slots"]
        inner = {f"{s}.{k}": v for s, parts in state.items() for k, v in parts["inner"].items() if torch.is_tensor(v)}
        results.append({**stored(model), **inner})
        assert opt.refresh_counts()[0] > 14 * 2
    assert_same(*results)


def test_accumulation_is_one_larger_batch(tiny_llama, token_batches, device):
    """Invariant 2, with refreshes inside. In the very first step the basis comes from the first micro-batch alone, so
    the comparison starts from a model that has its bases; the rest is fp32's order of summation."""
    batches = token_batches(device, steps=6, rows=8)
    runs = []
    for micro in (1, 4):
        model = tiny_llama(device)
        convert(model, rank=8, weight_format="none", basis_format="fp32")
        opt = optimizer(model, lr=2e-3, inner="adamw", projector="exact", **LAZY)
        train(model, opt, batches[:1], micro=1)
        start = [value.clone() for value in model.state_dict().values()]
        train(model, opt, batches[1:], micro=micro)
        runs.append(list(model.state_dict().values()))
        names = list(model.state_dict())
        assert opt.refresh_counts()[0] > 14
    weights = [i for i, name in enumerate(names) if name.endswith("weight")]
    assert distance(*([run[i] for i in weights] for run in runs), [start[i] for i in weights]) < 1e-3


def test_every_trainable_tensor_changes(tiny_llama, token_batches, device):
    """Invariant 3: embeddings, norms and the untied head included."""
    for stepping in ("fused", "deferred"):
        model = tiny_llama(device)
        convert(model, **QUICK)
        before = stored(model)
        opt = optimizer(model, lr=5e-3, stepping=stepping)
        train(model, opt, token_batches(device, steps=1))
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        trained = {n for n in before if n.endswith(".weight")}
        assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= trained <= changed
        assert opt.untouched == []


def test_a_tensor_without_gradient_is_named(tiny_llama, token_batches):
    model = tiny_llama()
    model.unused = torch.nn.Linear(8, 8)
    convert(model, **QUICK, exclude=["unused"])
    opt = optimizer(model, lr=1e-3)
    train(model, opt, token_batches(steps=1))
    assert opt.untouched == ["unused.weight", "unused.bias"]


def live_gradients(model):
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def test_fused_mode_holds_one_tensors_gradient_at_a_time(tiny_llama, token_batches, device):
    """Measured at every moment a gradient is complete, in a step that refreshes all layers and in one without.

    The hook that measures is registered before the optimizer's, so it sees each gradient before it is freed.
    """
    peaks = {}
    for stepping in ("fused", "deferred"):
        model = tiny_llama(device)
        convert(model, **QUICK)
        seen = []
        for parameter in model.parameters():
            if parameter.is_floating_point():
                keep = parameter.requires_grad
                parameter.requires_grad_(True).register_post_accumulate_grad_hook(
                    lambda p, m=model, s=seen: s.append((live_gradients(m), p.grad.nbytes))
                )
                parameter.requires_grad_(keep)
        opt = optimizer(model, lr=1e-3, stepping=stepping)
        peaks[stepping] = []
        for batch in token_batches(device, steps=2):
            seen.clear()
            train(model, opt, [batch])
            assert len(seen) == len(opt.tensors)
            peaks[stepping].append((max(live for live, _ in seen), max(own for _, own in seen)))
    print(f"\nlive gradients at most, bytes: { ({k: [live for live, _ in v] for k, v in peaks.items()}) }")
    for live, largest in peaks["fused"]:
        assert live == largest
    everything = sum(slot.shape.numel() * 4 for slot in opt.tensors)
    assert peaks["deferred"][1][0] == everything
    assert everything > 3 * peaks["fused"][1][0]


def test_fused_refuses_a_second_backward(tiny_llama, token_batches):
    model = tiny_llama()
    convert(model, **QUICK)
    opt = optimizer(model, lr=1e-3, stepping="fused")
    loss_of(model, token_batches()[0]).backward()
    assert opt.stepped
    with pytest.raises(RuntimeError, match="stepping='deferred'"):
        loss_of(model, token_batches()[0]).backward()


def test_clipping_sees_every_gradient(tiny_llama, token_batches, device):
    model = tiny_llama(device)
    convert(model, **QUICK)
    opt = optimizer(model, lr=1e-3)
    loss_of(model, token_batches(device)[0]).backward()
    opt.refresh()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    after = torch.stack([slot.gradient().norm() for slot in opt.tensors]).norm()
    assert float(norm) > 0.01
    assert float(after) == pytest.approx(0.01, rel=1e-3)
    opt.step()
    assert opt.grad_norm == pytest.approx(0.01, rel=1e-3)


def test_learning_rate_comes_from_the_groups(tiny_llama, token_batches):
    """A torch scheduler drives it: at a rate of zero nothing moves, int8 weights included."""
    model = tiny_llama()
    convert(model, **QUICK)
    opt = optimizer(model, lr=1e-2, weight_decay=0.1)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.0)
    before = {n: v for n, v in stored(model).items() if "codes" not in n and "left" not in n and "right" not in n}
    train(model, opt, token_batches(steps=2))
    assert_same(before, {n: v for n, v in model.state_dict().items() if n in before})


@pytest.mark.parametrize("name", ["adamw", "torch.optim.SGD", "torch.optim.RMSprop", "bitsandbytes.optim.Lion8bit"])
def test_any_optimizer_trains(tiny_llama, token_batches, name):
    model = tiny_llama()
    convert(model, **QUICK)
    lr = {"torch.optim.SGD": 0.5}.get(name, 2e-3)
    opt = optimizer(model, lr=lr, scale=1.0, inner=name, moments="keep", stepping="fused")
    batch = token_batches(steps=1)
    first = float(loss_of(model, batch[0]))
    train(model, opt, batch * 15)
    assert float(loss_of(model, batch[0])) < first - 0.3


def test_resume_continues_bit_for_bit(tiny_llama, token_batches, device):
    """Before, at and after refreshes, and with grown gaps: stop after every possible step."""
    batches = token_batches(device, steps=7)
    options = {"lr": 5e-3, "weight_decay": 0.01, "update_proj_gap": 2, "cos_threshold": -1.0, "queue_size": 1}

    def fresh():
        model = tiny_llama(device)
        convert(model, **QUICK)
        return model, optimizer(model, stepping="fused", **options)

    model, opt = fresh()
    whole = stored(train(model, opt, batches))
    for cut in (1, 2, 3, 5):
        model, opt = fresh()
        train(model, opt, batches[:cut])
        state, saved = copy.deepcopy(opt.state_dict()), stored(model)
        model, opt = fresh()
        model.load_state_dict(saved)
        opt.load_state_dict(state)
        assert_same(whole, stored(train(model, opt, batches[cut:])))


def test_state_of_another_model_is_refused(tiny_llama):
    states = []
    for layers in (1, 2):
        model = tiny_llama(num_hidden_layers=layers)
        convert(model, **QUICK)
        opt = optimizer(model, lr=1e-3)
        states.append(opt.state_dict())
    with pytest.raises(ValueError, match="differ in 9 tensors"):
        opt.load_state_dict(states[0])


@pytest.mark.parametrize("stepping", ["deferred", "fused"])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_gradient_that_is_not_finite_stops_before_it_is_used(tiny_llama, token_batches, stepping, bad_step):
    model = tiny_llama()
    convert(model, **QUICK)
    opt = optimizer(model, lr=1e-3, stepping=stepping)
    batches = token_batches()
    train(model, opt, batches[:bad_step])
    before = stored(model)
    model.model.layers[0].mlp.down_proj.register_full_backward_pre_hook(lambda m, g: (g[0] * float("nan"),))
    with pytest.raises(NumericalError, match=f"not finite in optimizer step {bad_step}"):
        train(model, opt, batches[bad_step : bad_step + 1])
    assert opt.inside_step == (stepping == "fused")
    if stepping == "deferred" and bad_step:
        assert_same(before, model.state_dict())
    assert all(bool(torch.isfinite(v.float()).all()) for v in model.state_dict().values())


def test_a_failed_decomposition_keeps_the_old_basis(tiny_llama, token_batches, monkeypatch):
    model = tiny_llama()
    convert(model, **QUICK)
    opt = optimizer(model, lr=1e-3, update_proj_gap=2, stagger=False)
    train(model, opt, token_batches(steps=2))
    codes = {n: v for n, v in stored(model).items() if n.endswith("codes")}

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr("qgalore.lowrank.subspace.search.randomized_basis", fail)
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    opt.events.clear()
    train(model, opt, token_batches(steps=1))
    assert_same(codes, {n: v for n, v in model.state_dict().items() if n in codes})
    assert [e["failed"] for e in opt.events] == ["did not converge"] * 14
    assert all(s.schedule.failures == 1 for s in opt.tensors if isinstance(s, ProjectedTensor))
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, before)


def test_refresh_records(tiny_llama, token_batches):
    model = tiny_llama()
    convert(model, **QUICK)
    opt = optimizer(model, lr=1e-3, update_proj_gap=3, max_gap=6)
    train(model, opt, token_batches(steps=8))
    first = [e for e in opt.events if e["first"]]
    later = [e for e in opt.events if not e["first"]]
    assert {e["step"] for e in first} == {0}
    assert len(first) == 14
    assert len({e["step"] for e in later}) > 3  # staggered
    for event in later:
        assert 0 < event["energy_before"] <= 1
        assert 0 < event["energy"] <= 1
        assert -0.2 < event["overlap_above_chance"] <= event["overlap"] <= 1
        assert event["next_refresh"] - event["step"] == event["gap"] <= 6
    done, skipped = opt.refresh_counts()
    assert done == len(opt.events)
    assert skipped >= 0


def test_bf16_vectors_keep_an_fp32_master(tiny_llama, token_batches):
    """Updates of 1e-5 on a norm weight of 1 vanish in bf16 (step 2⁻⁷); the master gathers them."""
    model = tiny_llama().to(torch.bfloat16)
    convert(model, **QUICK)
    opt = optimizer(model, lr=1e-5, inner="adamw")
    train(model, opt, token_batches(steps=3))
    masters = [slot.master for slot in opt.tensors if getattr(slot, "master", None) is not None]
    assert len(masters) == 5
    for master in masters:
        assert 0 < float((master - 1).abs().max()) < 1e-4
    assert model.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": 0},
        {"lr": -1e-3},
        {"stepping": "soon"},
        {"policy": "cosine"},
        {"update_proj_gap": 0},
        {"moments": "lose"},
    ],
)
def test_bad_values_are_named(tiny_llama, bad):
    model = tiny_llama()
    convert(model, **QUICK)
    name, value = next(iter(bad.items()))
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        optimizer(model, **{"lr": 1e-3, **bad})


def test_a_frozen_model_is_refused():
    model = torch.nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing would be trained"):
        optimizer(model, lr=1e-3, dense=True)


def test_a_model_that_was_never_converted_is_refused_unless_that_is_asked_for(tiny_llama):
    with pytest.raises(ConfigError, match=r"no low-rank layer.* Call qgalore\.convert"):
        optimizer(tiny_llama(), lr=1e-3)
    model = tiny_llama()
    assert len(optimizer(model, lr=1e-3, dense=True).tensors) == len(list(model.parameters()))


def test_converted_layers_are_all_slots(tiny_llama):
    model = tiny_llama()
    report = convert(model, **QUICK)
    opt = optimizer(model, lr=1e-3)
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(layers) == len(report.converted) == len([s for s in opt.tensors if isinstance(s, ProjectedTensor)]) == 14


def test_a_zero_gradient_gives_no_basis_but_another_try(tiny_llama, token_batches):
    """Behind a zero head every layer's first gradient is zero; the step after has one."""
    model = tiny_llama()
    convert(model, **QUICK)
    torch.nn.init.zeros_(model.lm_head.weight)
    opt = optimizer(model, lr=1e-2)
    train(model, opt, token_batches(steps=2))
    assert {e["failed"] for e in opt.events if e["step"] == 0} == {"the gradient is zero"}
    second = [e for e in opt.events if e["step"] == 1]
    assert len(second) == 14
    assert all(e["failed"] is None and e["energy"] > 0.1 for e in second)


def test_half_precision_is_refused(tiny_llama):
    model = tiny_llama().to(torch.float16)
    convert(model, **QUICK)
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        optimizer(model, lr=1e-3)
