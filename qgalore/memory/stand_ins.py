"""What stands in, when a step is rehearsed on the meta device, for code that needs values: kernels which do not run
there (attention, 8-bit moments), random generators, and decisions on data."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.integrations import flex_attention

from ..lowrank.subspace import moments
from ..lowrank.subspace.schedule import Schedule
from ..replacing import replaced


class _Attention(torch.autograd.Function):
    """The footprint of a fused attention kernel: it keeps its inputs, its output and a row statistic in fp32. A mask it
    keeps in the dtype of the queries, in every layer anew."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        kept = () if mask is None else (mask.to(query.dtype),)
        statistic = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, statistic, *kept)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _Grouped(torch.autograd.Function):
    """The footprint of a product of rows (n, in) with the matrix (in, out) of each row's expert."""

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(len(rows), weight.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(value) for value in ctx.saved_tensors)


@cache
def _code(name: str, device: torch.device) -> Tensor:
    """The values that 8-bit codes stand for, one tensor for all parameters."""
    return torch.empty(256, device=device)


class Adam8bitShapes(Optimizer):
    """The states of an 8-bit Adam without their values: bytes and block scales as ``adamw8bit`` keeps them."""

    BLOCK, SMALL = 256, 4096

    def __init__(self, params, lr: float = 0.0) -> None:
        super().__init__(params, {"lr": lr})

    def _states(self, leaf: Tensor) -> dict[str, Tensor]:
        if leaf.numel() < self.SMALL:
            return {name: torch.empty_like(leaf) for name in ("state1", "state2")}
        blocks = -(-leaf.numel() // self.BLOCK)
        states = {name: torch.empty_like(leaf, dtype=torch.uint8) for name in ("state1", "state2")}
        states |= {name: torch.empty(blocks, device=leaf.device) for name in ("absmax1", "absmax2")}
        return states | {name: _code(name, leaf.device) for name in ("qmap1", "qmap2")}

    def step(self, closure=None) -> None:
        """Nothing moves: the kernels work in place, in tiles that do not count."""
        for leaf in (leaf for group in self.param_groups for leaf in group["params"] if leaf not in self.state):
            self.state[leaf] = self._states(leaf)


class ScheduleOnPaper(Schedule):
    """Refreshes when it is told to, whatever the data."""

    now = True

    def due(self, step: int) -> bool:
        return self.now

    def record(self, step: int, similarity: float | None) -> None:
        self.refreshes += 1


def _read_moment(state: dict, name: str) -> Tensor:
    """As ``moments.read`` for 8-bit moments: fp32 values, by a kernel that needs nothing else."""
    if state[name].dtype != torch.uint8 or name.startswith("packed"):
        return _real_read(state, name)
    return torch.empty_like(state[name], dtype=torch.float32)


def _write_moment(state: dict, name: str, moment: Tensor) -> None:
    """As ``moments.write``: codes and their blocks' scales are made anew, then copied."""
    if state[name].dtype != torch.uint8 or name.startswith("packed"):
        _real_write(state, name, moment)
        return
    scales = state[f"absmax{name[-1]}"]
    codes, peaks = torch.empty_like(moment.contiguous(), dtype=torch.uint8), torch.empty_like(scales)
    state[name].copy_(codes)
    scales.copy_(peaks)


_real_read, _real_write = moments.read, moments.write


def answer(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What code is told that asks the meta device for values: 1 and True. None for any other ``func``. A loss of 1 is
    finite, a gradient is not zero, and a search that may go on or stop goes on."""
    if not args or not isinstance(args[0], Tensor) or not args[0].is_meta:
        return None
    if func is torch.ops.aten._local_scalar_dense.default:
        dtype = args[0].dtype
        return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
    if func is torch.ops.aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    return None


def _generator(device: Any = "cpu") -> torch.Generator:
    """A generator for any device; the meta device has none of its own."""
    return _real_generator("cpu" if torch.device(device).type == "meta" else device)


_real_generator = torch.Generator


def mask_of(mask: Tensor | None) -> Tensor | None:
    """``mask`` if it is one. A single value that is expanded says only that no values are to be looked at."""
    return None if mask is None or not any(mask.stride()) else mask


def _flex(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, Any]:
    """As transformers calls flex attention: the output, and the row statistic. Its mask of blocks is small."""
    statistic = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return nn.functional.scaled_dot_product_attention(query, key, value), SimpleNamespace(lse=statistic)


@contextmanager
def kernels(device: str) -> Iterator[None]:
    """Inside, code on the meta device runs as if on this kind of ``device``.

    ``scaled_dot_product_attention`` would build the whole score matrix there, as a CPU does where attention is dropped.
    ``grouped_mm`` knows only bf16 there. (A function mode would not reach the recomputation inside backward.)
    """
    functional = nn.functional
    attention_of_torch = functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, **options):
        if dropout_p > 0.0 and device == "cpu":
            return attention_of_torch(query, key, value, attn_mask, dropout_p=dropout_p, **options)
        return _Attention.apply(query, key, value, mask_of(attn_mask))

    def grouped(rows, weight, **_):
        return _Grouped.apply(rows, weight)

    instead = (
        (functional, "scaled_dot_product_attention", attention),
        (flex_attention, "compile_friendly_flex_attention", _flex),
        (functional, "grouped_mm", grouped),
        (moments, "read", _read_moment),
        (moments, "write", _write_moment),
        (torch, "Generator", _generator),
    )
    with replaced(instead):
        yield
