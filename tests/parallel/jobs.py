"""What several tests of jobs share: a run as one process lives it, a small model whose bases are choices of axes, and
what went over the wire."""

import contextlib
import io
import json
import os
import signal
from collections import Counter
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qgalore
from qgalore.combinations import RULES
from qgalore.config import Mesh
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.tensors.splitting import split_rows
from qgalore.parallel import job, shards
from qgalore.parallel.gathered import Gathered
from qgalore.parallel.kept import Kept
from qgalore.parallel.mesh import mesh_of
from qgalore.steps.trial import try_walk
from qgalore.steps.turns import AlwaysThere
from qgalore.training.parts import Stepping
from qgalore.training.stepping import LayerMajor

MICRO_BATCHES, WIDTH, LONG, RANK = 4, 64, 2048, 8  # a quarter of Δ has 4,096 values, from where on moments have 8 bits
SMALL = 256  # whose Δ has 2,048: fp32 moments


def plain(state):
    """Tensors that numpy, and so a queue between processes, can carry."""
    return {n: v.float() if torch.is_tensor(v) and v.dtype == torch.bfloat16 else v for n, v in state.items()}


def diagonals(features):
    """(WIDTH, features): diagonals side by side, each of another number, since other processes may hold their rows."""
    times = -(-features // WIDTH)
    numbers = torch.arange(1.0, times + 1).repeat_interleave(WIDTH)
    return (torch.eye(WIDTH).repeat(1, times) * numbers)[:, :features]


class _Hand(torch.autograd.Function):
    """Hands ``hidden`` on and its gradient back, and gives ``other`` the ``gradient``. So the values of ``other``,
    which training makes odd, never enter what is computed from integers."""

    @staticmethod
    def forward(ctx, hidden, other, gradient):
        ctx.save_for_backward(gradient)
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, ctx.saved_tensors[0], None


class ChainBlock(nn.Module):
    """A layer from WIDTH features, repeated as often as it has some, whose weight's gradient is a diagonal of
    integers."""

    def __init__(self, weight, rank, most):
        super().__init__()
        self.layer = LowRankLinear(weight, None, rank=rank, group_size=32, max_rank=most)

    def forward(self, hidden, skipped=False):
        if skipped:
            return hidden.clone()
        out, width = self.layer.out_features, self.layer.in_features
        rows = self.layer(hidden.detach() @ torch.eye(WIDTH, width))
        return _Hand.apply(hidden, rows, diagonals(out))


class Chain(nn.Module):
    """A model that can be walked: three blocks, or several ``times`` as many. The last one all micro-batches of the
    first step skip, and all but one of later steps. There are a vector before them, one behind, and one in both
    places. With ``most`` ranks are free to move up to that, and in two of three steps some axes have no gradient."""

    def __init__(self, rank=RANK, times=1, most=None, many=MICRO_BATCHES):
        super().__init__()
        self.free, self.many = most is not None, many
        make = torch.Generator().manual_seed(3)
        shapes = ((LONG, WIDTH), (WIDTH, LONG), (SMALL, WIDTH))
        weights = [torch.randn(*shape, generator=make) for shape in shapes * times]
        self.blocks = nn.ModuleList(ChainBlock(weight, rank, most) for weight in weights)
        self.behind, self.both = (nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))
        self.before = nn.Parameter(torch.zeros(WIDTH, dtype=torch.bfloat16))

    def loss(self, batch):
        """Of a (step, number): micro-batch ``number`` of as ``many`` as a step has, with its own diagonals."""
        step, number = batch
        make = torch.Generator().manual_seed(step)
        order = torch.randperm(WIDTH, generator=make)
        wobble = torch.randint(0, 2, (self.many, WIDTH), generator=make)[number].float()
        large = number < MICRO_BATCHES  # more of them would make sums of more bits than fp32 has
        hidden = torch.diag(2 * (order + 1) * large + wobble)
        if self.free:
            hidden[order >= (64, 32, 16)[step % 3]] = 0
        for vector in (self.before, self.both):  # sums of these integers are none of bf16's
            hidden = _Hand.apply(hidden, vector, 101 * (wobble + number))
        for block in self.blocks:
            rare = step == 0 or number != (step + 2) % MICRO_BATCHES
            hidden = block(hidden, skipped=block is self.blocks[-1] and rare)
        return hidden.sum() + ((self.behind + self.both) * wobble).sum()


def chain_of(team, how, options, steps=1, clip=0.0, times=1, ranks=(RANK, None), on_host=False, many=MICRO_BATCHES):
    """A :class:`Chain` of ``team``, its optimizer, and its order of steps. ``ranks``: mean and largest. ``on_host``:
    whether rows of what is split wait in host memory."""
    mean, most = ranks if RULES[options.get("rule", "galore")].uses_basis else (None, None)
    model = Chain(mean, times, most, many)
    split = how != "replicate" and team.size > 1
    if split:
        replicas = how if isinstance(how, int) else 1
        split_rows(model.blocks, mesh_of(team, Mesh(replicas, team.size // replicas), "cpu"), on_host)
    given = {"update_proj_gap": 5, "seed": 1, "weight_decay": 0.1, **options}
    optimizer = qgalore.optimizer(model, lr=0.02, stepping="manual", team=team, **given)
    trial = try_walk(model, (0, 3), Chain.loss)
    assert trial.layout is not None, trial.why
    stepping = Stepping(lambda step: 0.02, 0, steps, 1, many, clip)
    turns = Gathered(model.blocks) if split else AlwaysThere()
    return model, optimizer, LayerMajor(model, optimizer, stepping, trial.layout, turns=turns)


def take(order, step, look=lambda loss: None):
    """(loss, norm) of a step of which this process takes its share."""
    mine = order.optimizer.team.deal(range(order.model.many))
    return order.take(step, mine, [(step, n) for n in mine], partial(Chain.loss, order.model), look)


def walked_steps(how, steps, clip, options, many=MICRO_BATCHES, on_host=False):
    """State, norms, losses and refreshes of ``steps`` of a :class:`Chain`, whose ``many`` micro-batches the processes
    share."""
    with job("cpu") as team:
        model, optimizer, order = chain_of(team, how, options, steps, clip, on_host=on_host, many=many)
        looked = []
        taken = [take(order, step, looked.append) for step in range(steps)]
        losses, norms = map(list, zip(*taken, strict=True))
        assert looked == losses
        found = {**model.state_dict(), "norms": torch.tensor(norms), "losses": torch.tensor(losses)}
        for slot, parts in optimizer.state_dict()["slots"].items():
            found |= {f"{slot}|{name}": value for name, value in {**parts["inner"], **parts["extra"]}.items()}
        return whole(team, found), [(e["layer"], e["step"]) for e in optimizer.events]


def assert_same_steps(found, wanted):
    """What two calls of :func:`walked_steps` gave is the same, bit for bit but for sums of losses and of norms."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name in ("losses", "norms"):  # which may be added up in another order
            np.testing.assert_allclose(found[name], value, rtol=1e-6)
        else:
            assert np.array_equal(found[name], value), name


def steps_of_a_loop(steps):
    """As :func:`walked_steps`, taken by ``qgalore.step`` in a loop of one's own; the loss there is a mean."""
    with job("cpu") as team:
        model, optimizer, _ = chain_of(team, "replicate", {})
        mine = team.deal(range(MICRO_BATCHES))
        taken = [qgalore.step(model, optimizer, [(s, n) for n in mine], loss=Chain.loss) for s in range(steps)]
        losses, norms = [one.loss for one in taken], [one.grad_norm for one in taken]
        found = {**model.state_dict(), "norms": torch.tensor(norms), "losses": torch.tensor(losses)}
        return whole(team, found), [one.blocks for one in taken]


def whole(team, tensors):
    """All tensors as one process has them, on every process."""
    kept = {name: value.here for name, value in tensors.items() if isinstance(value, Kept)}
    found = {name: value for name, value in tensors.items() if torch.is_tensor(value)}
    for name, value in found.items():
        if shards.is_shared(value):
            found[name] = value.full_tensor()
    for part in team.gather("what owners keep", {name: value for name, value in kept.items() if value is not None}):
        found |= part
    return {name: value.numpy() for name, value in plain(found).items()}


class Wire(TorchDispatchMode):
    """Bytes handed to collectives: the whole of what is gathered and of what is reduced, the floats that are summed for
    all, and what this process hands out, its own share included."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "c10d" in name and "allgather_base_" in name:
            self.bytes["gathered"] += args[0].nbytes
        if "c10d" in name and "alltoall_base_" in name:
            self.bytes["handed"] += args[1].nbytes
        if "c10d" in name and ".reduce_." in name:
            self.bytes["reduced"] += sum(tensor.nbytes for tensor in args[0])
        if "c10d" in name and "reduce_scatter" in name:
            self.bytes["reduced"] += args[1].nbytes
        if "c10d" in name and "allreduce_" in name:
            self.bytes["summed"] += sum(tensor.nbytes for tensor in args[0] if tensor.is_floating_point())
        return func(*args, **(kwargs or {}))


def _raise(*_):
    raise KeyError("a bug")


def live(folder, arguments, fault=None):
    """(exit code, standard error) of one process; ``fault`` (rank, step, what) breaks something in it."""
    from qgalore.training import loop
    from train import main

    os.chdir(folder)
    if fault is not None and int(os.environ["RANK"]) == fault[0]:
        _, step, what = fault
        forward = loop.Loop._share

        def failing(self, batch, tokens):
            loss = forward(self, batch, tokens)
            if self.position.step == step and what == "bug":
                raise KeyError("a bug")
            if self.position.step == step and what == "bug going back":
                self.model.model.layers[0].mlp.register_full_backward_pre_hook(_raise)
                return loss
            if what == "signal":
                if self.position.step == step and not self.saving.folder.with_suffix(".sent").exists():
                    self.saving.folder.with_suffix(".sent").touch()  # a second one would stop at once
                    os.kill(os.getpid(), signal.SIGTERM)
                return loss
            return loss * torch.nan if self.position.step == step else loss

        loop.Loop._share = failing
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        code = main(["--config", "tiny.yaml", *arguments])
    return code, errors.getvalue()


def state(run, step):
    newest = run / "checkpoints" / f"step-{step:08d}"
    return {**load_file(newest / "model.safetensors"), **load_file(newest / "optimizer.safetensors")}


def codes(found):
    """The exit codes alone; processes that do not lead have no more to say."""
    return {one if isinstance(one, int) else one[0] for one in found}


def rows(run, key):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row]
