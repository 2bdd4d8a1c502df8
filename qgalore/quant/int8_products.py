"""Products with a stored int8 weight as integers: int8 × int8 → int32, scaled afterwards; no float copy of W is made.

The other operand is rounded to the nearest of 127 symmetric steps for each token, as large as its largest value asks.
A scale can be taken out of the sum only where it is one for the whole sum, so W must have one scale a row. Then

    Y = X Wᵀ:    X ≈ σ ∘ Q, σ one a token      Y[t, o]  = σ[t] · s[o] · Σ_k Q[t, k] q[o, k]
    dX = dY W:   s ∘ dY ≈ σ ∘ Q                 dX[t, k] = σ[t] · Σ_o Q[t, o] q[o, k]

The second sum runs over the rows of W, whose scales go into dY before that is rounded. With scales for groups of a row
the first would be one product for each group, its int32 result read and added in fp32. The measurement is
in docs/lab/first_edition.md.
"""

import weakref
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ConfigError
from .dispatch import kernels_for
from .int8 import QMAX

MULTIPLE = 8  # cuBLAS wants both sides of W in multiples of this
MIN_TOKENS = 32  # and more than 16 tokens
MAX_LENGTH = (2**31 - 1) // QMAX**2  # of a sum that cannot leave int32
_SMALLEST = torch.finfo(torch.float32).tiny


def obstacle(rows: int, width: int) -> str | None:
    """Why a weight (rows, width) cannot be multiplied as integers, or None."""
    if rows % MULTIPLE or width % MULTIPLE:
        return f"int8 products need sides that are multiples of {MULTIPLE}"
    if max(rows, width) > MAX_LENGTH:
        return f"sums of more than {MAX_LENGTH:,} int8 products may leave int32"
    return None


def _kernels(device: torch.device) -> ModuleType | None:
    """The kernels that multiply integers on ``device``; None where PyTorch does."""
    module = kernels_for(device)
    return module if module is not None and module.multiplies_integers(device) else None


def round_tokens(values: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``values`` (T, K), times ``scale`` (K,) if given, as int8 in [−127, 127] and the step of each token, fp32 (T, 1):
    the largest magnitude / 127. By a kernel where there is one.

    Where a token holds inf or nan its step is not finite, so that what is computed from it is not finite either.
    """
    module = _kernels(values.device)
    if module is not None:
        return module.round_tokens(values.contiguous(), scale)
    values = values.to(torch.float32)
    if scale is not None:
        values = values * scale.to(torch.float32)
    # CUDA divides by a Python number through its reciprocal, which rounds otherwise than a CPU. So it is a tensor.
    step = (values.abs().amax(dim=1, keepdim=True) / values.new_full((), QMAX)).clamp_(min=_SMALLEST)
    return (values / step).round_().to(torch.int8), step


class _Rounded(NamedTuple):
    """The tensor whose tokens were rounded last, its version, and what came of it. It lives no longer than that tensor.
    Threads read and replace it whole, so that none gets what another has rounded."""

    of: weakref.ref
    version: int
    result: tuple[Tensor, Tensor]


_last: dict[str, _Rounded] = {}


def round_once(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`round_tokens` of ``x`` (…, K). Products that follow each other and multiply the very same tensor share it,
    as those of queries, keys and values do. A backward pass forgets it, so as to have the memory."""
    rows = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling() or x.is_inference():  # which know no versions
        return round_tokens(rows)
    if x.is_cuda and _is_captured():  # a graph that is replayed has to round each time
        return round_tokens(rows)
    known = _last.get("one")
    if known is None or known.of() is not x or known.version != x._version:
        _last.clear()
        known = _last["one"] = _Rounded(weakref.ref(x, _forget), x._version, round_tokens(rows))
    return known.result


def _is_captured() -> bool:
    return torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()


def _forget(dead: weakref.ref | None = None) -> None:
    known = _last.get("one")
    if dead is None or (known is not None and known.of is dead):
        _last.clear()


def _integer_product(a: Tensor, b: Tensor) -> Tensor:
    """(T, K) · (K, N), int8 → int32 and exact, with rows of zeros where a GPU wants more tokens."""
    tokens = a.shape[0]
    multiply = torch._int_mm  # pyright: ignore[reportPrivateImportUsage] - torch has no public name for it yet
    if tokens >= MIN_TOKENS:
        return multiply(a, b)
    return multiply(pad(a, (0, 0, 0, MIN_TOKENS - tokens)), b)[:tokens]


def output(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Y = X Wᵀ + b (…, out) in x's dtype, for x (…, in) and a weight of int8 ``q`` (out, in), bf16 ``scale`` (out, 1).

    Scaled and summed up with the bias in fp32, rounded once: the first formula above.
    """
    rounded, step = round_once(x)
    module = _kernels(x.device)
    if module is not None:
        flat = scale.reshape(-1)
        y = module.int8_product(rounded, step, q, x.dtype, transposed=True, scale=flat, bias=bias)
        return y.view(*x.shape[:-1], q.shape[0])
    # The product of int32 and fp32 is fp32.
    y = _integer_product(rounded, q.T) * step
    scale = scale.view(-1).to(torch.float32)
    y = y.mul_(scale)
    if bias is not None:
        y = y.add_(bias.to(torch.float32))
    return y.to(x.dtype).view(*x.shape[:-1], q.shape[0])


def input_gradient(grad_output: Tensor, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """dX = dY W (…, in) in ``dtype``, for dY (…, out), a weight as in :func:`output`: the second formula above."""
    if not torch.compiler.is_compiling():  # which rounds each time, and may change nothing out here
        _forget()
    rows = grad_output.reshape(-1, grad_output.shape[-1])
    rounded, step = round_tokens(rows, scale.reshape(-1))
    module = _kernels(rows.device)
    if module is not None:
        found = module.int8_product(rounded, step, q, dtype, transposed=False)
        return found.view(*grad_output.shape[:-1], q.shape[1])
    return (_integer_product(rounded, q) * step).to(dtype).view(*grad_output.shape[:-1], q.shape[1])


def check(device: torch.device) -> None:
    """Compare PyTorch's integer products on ``device``, in both layouts, with exact ones. Raises :class:`ConfigError`.

    Where kernels multiply, ``dispatch`` has compared these already, and nothing is asked of PyTorch.
    """
    if _kernels(device) is not None:
        return
    generator = torch.Generator().manual_seed(8)
    problem = None
    for tokens, length, width in ((5, 24, 40), (33, 136, 8), (64, 256, 128)):
        shapes = ((tokens, length), (length, width))
        a, b = (torch.randint(-QMAX, QMAX + 1, shape, generator=generator, device="cpu") for shape in shapes)
        here, there = (value.to(device, torch.int8) for value in (a, b))
        try:
            found = [_integer_product(here, layout).cpu() for layout in (there, there.T.contiguous().T)]
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
            break
        if any(not torch.equal(product.long(), a @ b) for product in found):
            problem = f"a product of {tokens} × {length} × {width} is wrong"
    if problem:
        raise ConfigError(
            f"model.compute is 'int8', but torch._int_mm fails on {device}: {problem}; set it to bf16, "
            "or install Triton, whose kernels need no torch._int_mm"
        )
