"""Each rule against a dense version written from its paper's equations; resuming, stepping, training int8 weights."""

import copy
import math

import pytest
import torch
from helpers import QUICK, assert_same, distance, loss_of, save_checkpoint, stored, train

from qgalore.errors import ConfigError
from qgalore.files import checkpoint
from qgalore.lowrank.factory import optimizer
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.rules import RULES
from qgalore.lowrank.rules.apollo import random_projection
from qgalore.lowrank.rules.common import GrowthLimiter, unit_rms_rows
from qgalore.lowrank.rules.orthogonal import SEQUENCES
from qgalore.lowrank.rules.sinkgd import sinkhorn_rms_
from qgalore.models.convert import convert
from qgalore.quant.counter import derive_key

SHAPES = {"wide": (24, 41), "tall": (41, 24), "square": (33, 33)}
RANK, STEPS, GAP, SEED = 5, 30, 8, 3
WITH_BASIS = ("fira",)


class Adam:
    """m̂ / (√v̂ + ε) for a sequence of gradients."""

    def __init__(self):
        self.m = self.v = 0.0
        self.t = 0

    def __call__(self, gradient):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        return (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)


class Limiter:
    """If the norm has grown by more than γ = 1.01, it is brought down to that growth."""

    def __init__(self):
        self.last, self.times = None, 0

    def __call__(self, update):
        if self.last is not None and update.norm() > 1.01 * self.last:
            update, self.times = update * 1.01 * self.last / update.norm(), self.times + 1
        self.last = float(update.norm())
        return update


def leading(gradient, tall):
    """The leading singular vectors of the shorter side, of the tall orientation as the package decomposes it."""
    return torch.linalg.svd(gradient if tall else gradient.T, full_matrices=False).Vh[:RANK].T


def dense_apollo(shape, tensor_wise):
    """Algorithm 1 of arXiv 2412.05270, on the matrix turned so that its first dimension is the shorter one."""
    tall, adam, limit = shape[0] >= shape[1], Adam(), Limiter()
    rank = 1 if tensor_wise else RANK

    def update(gradient, step):
        g = gradient.T if tall else gradient
        p = random_projection(g.shape[0], rank, derive_key(SEED, step // GAP, 0, 1))
        r = p.T @ g
        n = adam(r)
        s = n.norm() / r.norm() if tensor_wise else torch.diag(n.norm(dim=0) / r.norm(dim=0))
        u = limit(g * s if tensor_wise else g @ s)
        return u.T if tall else u

    return update, limit


def dense_scale(shape):
    """θ (in, out) with normalised columns: G_:j / ‖G_:j‖, times √in as in the authors' code."""

    def update(gradient, step):
        theta = gradient.T
        return torch.stack([column / column.norm() for column in theta.T], dim=1).T * math.sqrt(shape[1])

    return update, None


def dense_fira(shape):
    """arXiv 2410.01623: W ← W − lr (P ψ(R) + φ(S) S), moments kept when the subspace changes."""
    tall, adam, limit, basis = shape[0] >= shape[1], Adam(), Limiter(), None

    def update(gradient, step):
        nonlocal basis
        if step % GAP == 0:
            basis = leading(gradient, tall)
        g = gradient.T if tall else gradient  # (short, long)
        r = basis.T @ g
        n = adam(r)
        residual = (torch.eye(len(g)) - basis @ basis.T) @ g
        u = basis @ n + limit(residual * (n.norm(dim=0) / r.norm(dim=0)))
        return u.T if tall else u

    return update, limit


def dense_muon(shape):
    """B = μ B + G, U = 0.2 √max · polar(G + μ B). The polar factor is iterated in fp64 with the same polynomials."""
    momentum = torch.zeros(shape, dtype=torch.float64)

    def update(gradient, step):
        nonlocal momentum
        g = gradient.double()
        momentum = 0.7 * momentum + g
        u, s, vh = torch.linalg.svd(g + 0.7 * momentum, full_matrices=False)
        s = s / s.norm()
        for a, b, c in SEQUENCES["polar_express"][:5]:
            s = a * s + b * s**3 + c * s**5
        return (0.2 * math.sqrt(max(shape)) * (u * s) @ vh).float()

    return update, None


def dense_sinkgd(shape):
    """Algorithm 2 of arXiv 2502.06742: diagonal matrices of row and column norms, applied in turn."""

    def update(gradient, step):
        x = gradient.double()
        for _ in range(5):
            x = math.sqrt(shape[1]) * torch.diag(1 / x.norm(dim=1)) @ x
            x = math.sqrt(shape[0]) * x @ torch.diag(1 / x.norm(dim=0))
        return x.float()

    return update, None


DENSE = {
    "muon": dense_muon,
    "sinkgd": dense_sinkgd,
    "apollo": lambda shape: dense_apollo(shape, tensor_wise=False),
    "apollo_mini": lambda shape: dense_apollo(shape, tensor_wise=True),
    "scale": dense_scale,
    "fira": dense_fira,
}


def options_of(rule):
    return {"rule": rule, "rank": RANK if rule == "apollo" else None}


EXACT = {"muon": {"momentum": "fp32", "mu": 0.7}}


def compare(rule, shape, dense):
    """30 steps of a least-squares problem with noise, four subspaces or projections, weight decay, fp32 throughout.

    Both sides round each of 30 steps in fp32 (2⁻²⁴), through the decomposition of a gradient and Adam's division; 1e-3
    of the way travelled is far above that, and any wrong side, power or order of operations is far above 1e-3.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator) * 0.1
    data = [torch.randn(64, shape[1], generator=generator) for _ in range(STEPS)]
    target = torch.randn(shape, generator=generator)

    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(start)
    convert(model, rank=RANK if rule in WITH_BASIS else None, weight_format="none", basis_format="fp32")
    fixed = {"update_proj_gap": GAP, "cos_threshold": 2.0, "stagger": False, "projector": "exact", "seed": SEED}
    how = {"inner": "adamw", "stepping": "fused", "weight_decay": 0.1, "moments": "keep", "scale": 0.5}
    opt = optimizer(model, lr=0.02, **options_of(rule), **EXACT.get(rule, {}), **fixed, **how)
    for x in data:
        ((model(x) - x @ target.T).square().sum() / 64).backward()
        opt.step()

    weight, (update, limiter) = start.clone(), dense
    for step, x in enumerate(data):
        gradient = 2 / 64 * (x @ (weight - target).T).T @ x
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * 0.5 * update(gradient, step)
    assert distance([model[0].weight], [weight], [start]) < 1e-3
    assert limiter is None or 0 < limiter.times < STEPS - 1  # both of its branches were taken


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_papers_equations(rule, shape):
    compare(rule, shape, DENSE[rule](shape))


def fresh(tiny_llama, rule, **changes):
    model = tiny_llama()
    convert(model, **{**QUICK, "rank": 8 if rule in WITH_BASIS else None})
    how = {"lr": 5e-3, "weight_decay": 0.01, "update_proj_gap": 2, "stepping": "fused", **options_of(rule), **changes}
    return model, optimizer(model, **how)


def everything(model, opt):
    slots = opt.state_dict()["slots"]
    parts = [
        (f"{s}.{kind}.{k}", v) for s, p in slots.items() for kind in ("inner", "extra") for k, v in p[kind].items()
    ]
    return {**stored(model), **{name: v.clone() for name, v in parts if torch.is_tensor(v)}}


@pytest.mark.parametrize("inner", ["adamw8bit", "adamw"])
@pytest.mark.parametrize("rule", RULES)
def test_resume_continues_bit_for_bit(tiny_llama, token_batches, rule, inner):
    batches = token_batches(steps=6)
    model, opt = fresh(tiny_llama, rule, inner=inner)
    train(model, opt, batches)
    whole = everything(model, opt)
    for cut in (1, 3):
        model, opt = fresh(tiny_llama, rule, inner=inner)
        train(model, opt, batches[:cut])
        state, saved = copy.deepcopy(opt.state_dict()), stored(model)
        model, opt = fresh(tiny_llama, rule, inner=inner)
        model.load_state_dict(saved)
        opt.load_state_dict(state)
        train(model, opt, batches[cut:])
        assert_same(whole, everything(model, opt))


@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_holds_a_rules_state(tiny_llama, token_batches, rule, tmp_path):
    model, opt = fresh(tiny_llama, rule)
    train(model, opt, token_batches(steps=3))
    path = save_checkpoint(tmp_path / "step-00000003", model, opt.state_dict(), {})
    other, twin = fresh(tiny_llama, rule)
    checkpoint.load_into(path, checkpoint.read_state(path), other, twin)
    assert_same(everything(model, opt), everything(other, twin))


@pytest.mark.parametrize("moments", ["rotate", "keep", "reset"])
@pytest.mark.parametrize("rule", RULES)
def test_fused_and_deferred_give_the_same_bits(tiny_llama, token_batches, rule, moments):
    results = []
    for stepping in ({"stepping": "fused"}, {"stepping": "deferred", "full_gradients": "keep"}):
        model, opt = fresh(tiny_llama, rule, moments=moments, **stepping)
        train(model, opt, token_batches(steps=5))
        results.append(everything(model, opt))
        assert opt.refresh_counts()[0] == (0 if rule not in WITH_BASIS else len(opt.events))
    assert_same(*results)


@pytest.mark.parametrize("rule", RULES)
def test_accumulated_micro_batches_are_one_batch(tiny_llama, token_batches, rule):
    """Before the step, gradients differ only by fp32's order of summation; one step is compared, since normalised
    directions amplify rounding where a gradient is nearly zero."""
    batch, finals, start = token_batches(steps=1, rows=8), [], None
    for micro in (1, 4):
        model = tiny_llama()
        convert(model, rank=8 if rule in WITH_BASIS else None, weight_format="none", basis_format="fp32")
        start = [p.detach().clone() for n, p in model.named_parameters() if n.endswith("_proj.weight")]
        how = {"stepping": "deferred", "full_gradients": "keep", "inner": "adamw", "projector": "exact"}
        train(model, optimizer(model, lr=2e-3, **options_of(rule), **how), batch, micro=micro)
        finals.append([p for n, p in model.named_parameters() if n.endswith("_proj.weight")])
    assert distance(*finals, start) < 1e-2


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_trains_int8_weights(tiny_llama, token_batches, rule):
    """Every layer moves and the loss on the training batch falls well below where it began, ln 96 = 4.56."""
    lr = {"apollo": 5e-3, "apollo_mini": 2e-3, "fira": 5e-3}.get(rule, 2e-3)
    model, opt = fresh(tiny_llama, rule, lr=lr, weight_decay=0.0, update_proj_gap=5)
    before, batch = stored(model), token_batches(steps=1)
    first = float(loss_of(model, batch[0]))
    train(model, opt, batch * 15)
    assert float(loss_of(model, batch[0])) < first - 0.5
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert all(m.weight.dtype == torch.int8 for m in layers.values())
    assert all(not torch.equal(m.weight, before[f"{name}.weight"]) for name, m in layers.items())


def kept_bytes(opt):
    """Bytes of optimizer state for the low-rank layers, bitsandbytes' 256-entry tables left out."""
    slots = [parts for parts in opt.state_dict()["slots"].values() if "schedule" in parts]
    named = [(k, v) for p in slots for kind in ("inner", "extra") for k, v in p[kind].items()]
    return sum(v.nbytes for k, v in named if torch.is_tensor(v) and not k.startswith("qmap"))


@pytest.mark.parametrize("rule", ["apollo", "apollo_mini", "scale", "sinkgd"])
def test_rules_without_a_basis_store_none(tiny_llama, token_batches, rule):
    model, opt = fresh(tiny_llama, rule)
    train(model, opt, token_batches(steps=1))
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert all(m.left is None and m.right is None for m in layers)
    rank = {"apollo": RANK, "apollo_mini": 1}.get(rule, 0)
    two_moments = sum(2 * 4 * rank * max(m.weight.shape) for m in layers)  # fp32 below bitsandbytes' 4,096 elements
    limits = 0 if rank == 0 else 4 * len(layers)
    steps = 0
    assert kept_bytes(opt) == two_moments + limits + steps


@pytest.mark.parametrize("fmt", ["4bit", "8bit", "bf16", "fp32"])
def test_a_momentum_of_every_format_resumes_to_the_same_bits(tiny_llama, token_batches, fmt, tmp_path):
    """Through the files of a checkpoint, into fresh objects. The 4-bit code is read with the bits of its last write, so
    that a step which is not saved would show."""
    batches = token_batches(steps=5)
    model, opt = fresh(tiny_llama, "muon", momentum=fmt)
    train(model, opt, batches[:3])
    path = save_checkpoint(tmp_path / "step-00000003", model, opt.state_dict(), {})
    train(model, opt, batches[3:])
    other, twin = fresh(tiny_llama, "muon", momentum=fmt)
    checkpoint.load_into(path, checkpoint.read_state(path), other, twin)
    assert {int(slot.rule.written) for slot in twin.tensors if slot.keeps_whole} == {2}
    train(other, twin, batches[3:])
    assert_same(everything(model, opt), everything(other, twin))


@pytest.mark.parametrize("weights", ["int8", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_of_muon_has_adams_size(weights, dtype):
    """A root mean square of 0.2 · lr · scale in wide and tall matrices alike, in every format of a weight."""
    for shape in ((96, 32), (32, 96)):
        generator = torch.Generator().manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
        torch.nn.init.normal_(model[0].weight, generator=generator)
        model.to(dtype)
        convert(model, rank=None, weight_format=weights, group_size=32)
        opt = optimizer(model, lr=0.5, rule="muon", stepping="fused", scale=0.5)
        before = model[0].dense_weight().detach().float().clone()
        model(torch.randn(256, shape[1], generator=generator).to(dtype)).square().sum().backward()
        opt.step()
        moved = (model[0].dense_weight().detach().float() - before).square().mean().sqrt()
        assert float(moved) == pytest.approx(0.2 * 0.5 * 0.5, rel=0.12)  # singular values end within 13 % of 1


def test_an_expert_without_tokens_keeps_its_momentum_and_its_step():
    """What is not stepped is not written, and is read with the step that wrote it."""
    model = torch.nn.ModuleList([torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(64, 32, bias=False)])
    convert(model, rank=None, group_size=32)
    opt = optimizer(model, lr=1e-3, rule="muon", stepping="fused")
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    (model[0](x).square().sum() + model[1](x).square().sum()).backward()
    opt.step()
    idle = opt.tensors[1].rule
    kept = idle.momentum.read(idle._key(int(idle.written)))
    for _ in range(2):
        model[0](x).square().sum().backward()
        opt.step()
    assert [int(slot.rule.written) for slot in opt.tensors] == [2, 0]
    assert torch.equal(idle.momentum.read(idle._key(int(idle.written))), kept)


def test_the_size_of_a_gradient_does_not_matter_to_sinkgd():
    """Mean losses of large models give gradients near 1e-9; a floor meant for larger ones would shrink their step."""
    gradient = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sinkhorn_rms_(gradient * 2.0**-40), sinkhorn_rms_(gradient.clone()))
    gradient[3], gradient[:, 5] = 0.0, 0.0
    found = sinkhorn_rms_(gradient)
    assert not found[3].any()
    assert not found[:, 5].any()
    assert torch.isfinite(found).all()


def test_only_one_full_gradient_lives_in_fused_stepping(tiny_llama, token_batches):
    model, opt = fresh(tiny_llama, "scale")
    alive = []
    for parameter in [leaf for slot in opt.tensors for leaf in slot.leaves()]:
        parameter.register_post_accumulate_grad_hook(  # after the optimizer's hook, which has freed it
            lambda p: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    train(model, opt, token_batches(steps=1))
    assert len(alive) == len(opt.tensors)
    assert set(alive) == {0}


def test_the_random_projection_has_the_papers_distribution():
    """Entries N(0, 1/r): the mean of n has a deviation of √(1/(r n)), the variance one of √2/(r√n); five of each."""
    dim, rank = 500, 101  # an odd count of entries
    p = random_projection(dim, rank, derive_key(0, 0, 0, 1))
    n = p.numel()
    assert abs(float(p.mean())) < 5 / math.sqrt(rank * n)
    assert abs(float(p.var()) * rank - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((p * math.sqrt(rank)).pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)  # as of a normal variable
    assert torch.equal(p, random_projection(dim, rank, derive_key(0, 0, 0, 1)))
    other = random_projection(dim, rank, derive_key(0, 1, 0, 1))
    cosine = float(torch.nn.functional.cosine_similarity(p.flatten(), other.flatten(), dim=0))
    assert abs(cosine) < 5 / math.sqrt(n)


def test_every_layer_and_draw_has_its_own_projection(tiny_llama, token_batches, monkeypatch):
    keys = []

    def noted(dim, rank, key, device):
        keys.append(key)
        return random_projection(dim, rank, key, device)

    monkeypatch.setattr("qgalore.lowrank.rules.apollo.random_projection", noted)
    model, opt = fresh(tiny_llama, "apollo", update_proj_gap=2)
    train(model, opt, token_batches(steps=4))
    first, again, second = set(keys[:14]), set(keys[14:28]), set(keys[28:42])
    assert len(keys) == 4 * 14
    assert len(first) == 14
    assert first == again
    assert not first & second


def test_the_limiter_starts_afresh_after_a_zero_update():
    limiter = GrowthLimiter(torch.device("cpu"))
    factors = [float(limiter.factor(torch.tensor(norm))) for norm in (2.0, 4.0, 1.0, 0.0, 5.0, 5.0)]
    assert factors == pytest.approx([1.0, 2.02 / 4, 1.0, 1.0, 1.0, 1.0])


def test_rows_of_zeros_stay_zero():
    rows = unit_rms_rows(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    assert torch.equal(rows[0], torch.zeros(2))
    assert float(rows[1].square().mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("rule", RULES)
def test_a_zero_gradient_changes_nothing_and_the_run_goes_on(tiny_llama, token_batches, rule):
    """Behind a zero head every layer's first gradient is zero; the step after has one."""
    model, opt = fresh(tiny_llama, rule, weight_decay=0.0)
    torch.nn.init.zeros_(model.lm_head.weight)
    layer, batches = model.model.layers[0].mlp.down_proj, token_batches(steps=2)
    before = layer.weight.clone()
    train(model, opt, batches[:1])
    assert torch.equal(layer.weight, before)
    train(model, opt, batches[1:])
    assert not torch.equal(layer.weight, before)
    assert torch.isfinite(loss_of(model, batches[0]))


REFUSED = {
    "unknown": ({"rule": "adam"}, None, "rule is 'adam'"),
    "deferred": ({"rule": "scale", "stepping": "deferred"}, None, "full_gradients='keep'"),
    "bad policy": ({"rule": "scale", "full_gradients": "some"}, None, "full_gradients is 'some'"),
    "apollo without a rank": ({"rule": "apollo"}, None, "rule apollo needs the rank of its random projection"),
    "a rank that is not read": ({"rule": "scale", "rank": 4}, None, "does not read it"),
    "a momentum that is not read": ({"rule": "sinkgd", "momentum": "8bit"}, None, "does not read it"),
    "an unknown momentum": ({"rule": "muon", "momentum": "2bit"}, None, "momentum is '2bit'"),
    "a share of one": ({"rule": "muon", "mu": 1.0}, None, "mu is 1.0"),
    "a basis that is not read": ({"rule": "scale"}, 8, "convert the model with rank=None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_rule_cannot_do_is_refused(tiny_llama, case):
    options, rank, message = REFUSED[case]
    model = tiny_llama()
    convert(model, rank=rank)
    with pytest.raises(ConfigError, match=message):
        optimizer(model, **{"lr": 1e-3, "stepping": "fused", **options})


def test_an_embedding_under_muon_is_said(tiny_llama, capsys):
    model = tiny_llama()
    convert(model, rank=None, embeddings="int8")
    optimizer(model, lr=1e-3, rule="muon", stepping="fused")
    assert "rule muon orthogonalises the int8 embedding model.embed_tokens too" in capsys.readouterr().out


def test_a_clamped_rank_is_said(tiny_llama, capsys):
    model = tiny_llama()
    convert(model, rank=None)
    optimizer(model, lr=1e-3, rule="apollo", rank=50, stepping="fused")
    assert "rank 50 is above the smaller side of 4 layers" in capsys.readouterr().out
