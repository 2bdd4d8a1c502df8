"""What stands in for kernels that cannot run on the meta device, when a step is rehearsed there: their footprints."""

from contextlib import contextmanager

import torch
from torch import nn


class _Attention(torch.autograd.Function):
    """The footprint of a fused attention kernel: it keeps its inputs, its output and a row statistic in fp32."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Grouped(torch.autograd.Function):
    """The footprint of a product of rows (n, in) with the matrix (in, out) of each row's expert."""

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(len(rows), weight.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(value) for value in ctx.saved_tensors)


@contextmanager
def kernels(device: str):
    """Stand in for ``scaled_dot_product_attention``, which on the meta device would build the whole score matrix, as a
    CPU does where attention is dropped, and for ``grouped_mm``, which knows only bf16 there. (A function mode would not
    reach the recomputation inside backward.)"""
    functional = nn.functional
    originals = functional.scaled_dot_product_attention, functional.grouped_mm

    def attention(query, key, value, *mask, dropout_p=0.0, **options):
        if dropout_p > 0.0 and device == "cpu":
            return originals[0](query, key, value, *mask, dropout_p=dropout_p, **options)
        return _Attention.apply(query, key, value)

    functional.scaled_dot_product_attention = attention
    functional.grouped_mm = lambda rows, weight, **_: _Grouped.apply(rows, weight)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.grouped_mm = originals
