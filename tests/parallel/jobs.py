"""What several tests of jobs share: a run as one process lives it, a small model whose bases are choices of axes, and
what went over the wire."""

import contextlib
import io
import json
import os
import signal
from collections import Counter

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.parallel import shards

MICRO_BATCHES, WIDTH, LONG, RANK = 4, 64, 2048, 8  # a quarter of Δ has 4,096 values, from where on moments have 8 bits
SMALL = 256  # whose Δ has 2,048: fp32 moments


def plain(state):
    """Tensors that numpy, and so a queue between processes, can carry."""
    return {n: v.float() if torch.is_tensor(v) and v.dtype == torch.bfloat16 else v for n, v in state.items()}


class Layers(nn.Module):
    """Two blocks of one layer with its basis on the right, and a dense vector outside."""

    def __init__(self):
        super().__init__()
        make = torch.Generator().manual_seed(3)
        options = {"rank": RANK, "group_size": 32, "proj_type": "right"}
        shapes = ((LONG, WIDTH), (SMALL, WIDTH))
        weights = [torch.randn(*shape, generator=make) for shape in shapes]
        self.blocks = nn.ModuleList(nn.Sequential(LowRankLinear(weight, None, **options)) for weight in weights)
        self.free = nn.Parameter(torch.zeros(LONG))

    def loss(self, step, number):
        """A loss whose gradients are integers: micro-batch ``number`` adds to the diagonals of both weights' gradients,
        whose entries are all different, so that every basis is a choice of axes, different in each step."""
        make = torch.Generator().manual_seed(step)
        order = torch.randperm(WIDTH, generator=make)
        wobble = torch.randint(0, 2, (MICRO_BATCHES, WIDTH), generator=make)[number]
        x = torch.diag((2 * (order + 1) + wobble).float()).requires_grad_()
        # rows of the output that other processes hold have gradients too: ones at every WIDTH-th place
        outputs = [block(x) * torch.eye(WIDTH).repeat(1, block[0].out_features // WIDTH) for block in self.blocks]
        return (outputs[0] + self.free).sum() + outputs[1].sum()


def whole(team, tensors):
    """All tensors as one process has them; the order is the same everywhere."""
    tensors = {name: value for name, value in tensors.items() if torch.is_tensor(value)}
    for name, value in tensors.items():
        if shards.is_shared(value):
            tensors[name] = value.full_tensor()
    return {name: value.numpy() for name, value in plain(tensors).items()}


class Wire(TorchDispatchMode):
    """Bytes handed to collectives: the whole of what is gathered, and of what is reduced and scattered."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "c10d" in name and "base_" in name:
            whole = args[0] if "allgather" in name else args[1]
            self.bytes["gathered" if "allgather" in name else "reduced"] += whole.nbytes
        return func(*args, **(kwargs or {}))


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
