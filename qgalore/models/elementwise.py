"""Liger's kernels in the places of a model's own RMSNorm, SwiGLU and rotary embedding.

Each place is an instance of a module whose ``forward`` is another one from then on. No class is changed, and neither
are names and values of tensors. A rotary embedding is a function among the globals of a model's code. It is another one
only while the ``forward`` of one of this model's attentions runs.

First a kernel is tried on random values beside the model's own code, forward and back. Both are compared with that code
in fp32. A kernel may be off by twice as much as the own code in the run's dtype, or as one rounding of each value.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..replacing import replaced
from .liger import FusedSwiGLU, RMSNorm, Rotary, SwiGLU

ROTATION = "apply_rotary_pos_emb"  # what transformers calls it
SILU = ("SiLU", "SiLUActivation")
# Where Liger rounds, and what it adds to a weight: Llama's way, Gemma's, and that of models between the two.
CASTINGS = (("llama", 0.0), ("gemma", 1.0), ("gemma", 0.0))
LARGEST = 1 << 22  # values that a trial looks at, enough for every form of a kernel
FAR = 32.0  # how large values are tried too: a limit of some models' gates is 10 or 16, and fp16 has room for no more
Run = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Sizes:
    """What a kernel is tried on: ``rows`` of ``length`` tokens in ``dtype``, with so many ``heads`` at most."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    length: int
    heads: int


@dataclass(frozen=True)
class Place:
    """A module whose ``forward`` may be another one; those of equal ``key`` are tried once.

    ``ways``: what a kernel can do in the place of ``own``, each with the ``forward`` that does so. ``inputs`` of its
    trials, each a list; gradients are asked of those that require them.
    """

    module: nn.Module
    key: tuple
    own: Run
    ways: list[tuple[Run, Callable]]
    inputs: Callable[[Sizes], list[list[Tensor]]]


def _random(sizes: Sizes, *shape: int, seed: int = 1, scale: float = 1.0) -> Tensor:
    return (_drawn(shape, seed) * scale).to(sizes.device, sizes.dtype).requires_grad_()


def _drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def _with_gradients(run: Run, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What ``run`` gives for ``inputs`` in ``dtype``, and their gradients, in fp32."""
    leaves = [value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad) for value in inputs]
    with torch.enable_grad():
        outputs = run(*leaves)
    # Rounded to the inputs' format first, so that a run in fp32 is given the same.
    drawn = [_drawn(output.shape, seed=100 + n).to(inputs[0]) for n, output in enumerate(outputs)]
    given = [gradient.to(dtype) for gradient in drawn]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [value.detach().float() for value in (*outputs, *torch.autograd.grad(outputs, wanted, given))]


def excess(own: Run, fused: Run, inputs: list[Tensor]) -> float:
    """How far ``fused`` is from ``own`` in fp32, as a share of what it may be. Above 1, or nan, it is wrong.

    Looked at are the typical and the largest error of each output and gradient. Allowed is twice the error of ``own``
    in the dtype of ``inputs``, or of rounding once in it after sums in fp32 as long as an input's longest side. Raises
    ``ValueError`` for an ``own`` that gives another result each time.
    """
    dtype, longest = inputs[0].dtype, max(max(value.shape) for value in inputs)
    unit = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps / 2 * longest**0.5
    runs = ((own, torch.float32), (own, dtype), (own, dtype), (fused, dtype))
    shares = []
    for exact, mine, again, theirs in zip(*(_with_gradients(run, inputs, d) for run, d in runs), strict=True):
        if not torch.equal(mine, again):
            raise ValueError("its own code draws random numbers")
        for order in (2.0, float("inf")):
            size = torch.linalg.vector_norm(exact, order)
            errors = [torch.linalg.vector_norm(value - exact, order) / size for value in (mine, theirs)]
            shares.append(errors[1] / errors[0].clamp(min=unit) / 2)
    return float(torch.stack(shares).max())


def _numbers(module: nn.Module) -> tuple:
    """Whatever a module's code may read of itself beside tensors, as a limit that only some layers have."""
    return tuple(item for item in vars(module).items() if isinstance(item[1], int | float | str))


# The places of a norm.


def _norm(module: nn.Module, eps: float, casting: str, offset: float, x: Tensor) -> Tensor:
    if x.dtype != module.weight.dtype:  # which decides otherwise of what dtype the result is
        return type(module).forward(module, x)
    return RMSNorm.apply(x, module.weight, eps, offset, casting)


def _norm_place(module: nn.Module) -> Place | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names = [name for name, _ in module.named_parameters()]
    if not type(module).__name__.endswith("RMSNorm") or eps is None or names != ["weight"] or not _takes_one(module):
        return None
    width = module.weight.shape[-1]

    def own(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (functional_call(module, {"weight": weight}, (x,)),)

    def fused(casting: str, offset: float) -> Run:
        return lambda x, weight: (RMSNorm.apply(x, weight, eps, offset, casting),)

    def inputs(sizes: Sizes) -> list[list[Tensor]]:
        # A norm of heads has more rows than there are tokens, and Liger another kernel for very many.
        tokens = sizes.rows * sizes.length
        counts = {min(count, LARGEST // width) for count in (tokens, tokens * sizes.heads)}
        return [[_random(sizes, 1, count, width), _random(sizes, width, seed=2)] for count in sorted(counts)]

    ways = [(fused(*how), partial(_norm, module, eps, *how)) for how in CASTINGS]
    return Place(module, (type(module), width, _numbers(module)), own, ways, inputs)


# The places of a gated feed-forward layer.


class _Given(nn.Module):
    def __init__(self, value: Tensor | None) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x if self.value is None else self.value


def _gated(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))


def _gated_together(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(FusedSwiGLU.apply(module.gate_up_proj(x)))


def _gated_place(module: Any) -> Place | None:
    children = dict(module.named_children())
    activation = [name for name, child in children.items() if type(child).__name__ in SILU]
    products = tuple(name for name in children if name not in activation)
    if len(activation) != 1 or not _takes_one(module):
        return None
    if set(products) == {"gate_proj", "up_proj", "down_proj"}:
        given, function, forward = ("gate_proj", "up_proj"), SwiGLU, _gated
    elif set(products) == {"gate_up_proj", "down_proj"}:
        given, function, forward = ("gate_up_proj",), FusedSwiGLU, _gated_together
    else:
        return None
    width = getattr(children[given[0]], "out_features", None)
    if width is None:
        return None

    def own(*values: Tensor) -> tuple[Tensor, ...]:
        # The module's own code, as it trains, in a copy whose products are given.
        twin = copy.copy(module)
        twin.training = True
        stand_ins = {name: _Given(value) for name, value in zip(given, values, strict=True)}
        twin.__dict__["_modules"] = {**module._modules, **stand_ins, "down_proj": _Given(None)}
        return (type(module).forward(twin, values[0]),)

    def inputs(sizes: Sizes) -> list[list[Tensor]]:
        count = min(sizes.rows * sizes.length, LARGEST // width)
        numbers = range(len(given))
        return [[_random(sizes, 1, count, width, seed=n, scale=scale) for n in numbers] for scale in (1.0, FAR)]

    ways = [(lambda *values: (function.apply(*values),), partial(forward, module))]
    return Place(module, (type(module), given, width, _numbers(module)), own, ways, inputs)


# The places of a rotary embedding.


def heads_of(shape: Any) -> int:
    """The attention heads of a model's configuration; 1 where it states none for all of its layers."""
    heads = getattr(shape, "num_attention_heads", None)
    return heads if isinstance(heads, int) else 1


def _namespace(module: nn.Module) -> Any:
    """The globals of the code of ``module``'s ``forward``."""
    return sys.modules[inspect.unwrap(type(module).forward).__module__]


def _turning(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    namespace = _namespace(module)
    with replaced([(namespace, ROTATION, partial(_turn, getattr(namespace, ROTATION)))]):
        return type(module).forward(module, *args, **kwargs)


def _turn(own: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple:
    if args or kwargs or q.ndim != 4 or cos.ndim != 3 or cos.shape[-1] != q.shape[-1]:
        return own(q, k, cos, sin, *args, **kwargs)
    return Rotary.apply(q, k, cos, sin)


def _rotary_place(module: Any, tables: nn.Module | None) -> Place | None:
    own, shape = getattr(_namespace(module), ROTATION, None), getattr(tables, "config", None)
    if own is None or shape is None or ROTATION not in inspect.unwrap(type(module).forward).__code__.co_names:
        return None
    heads = heads_of(shape)
    groups = getattr(shape, "num_key_value_heads", None) or heads
    size = getattr(module, "head_dim", None) or shape.hidden_size // heads

    def inputs(sizes: Sizes) -> list[list[Tensor]]:
        rows = min(sizes.rows, 2)
        length = min(sizes.length, LARGEST // (rows * heads * size))
        q, k = (_random(sizes, rows, length, n, size, seed=n).transpose(1, 2) for n in (heads, groups))
        # Made anew, for those of a model may have no values yet.
        with torch.device("cpu"):
            made = type(tables)(shape)
        # Rows of several documents have positions of their own.
        places = torch.arange(rows * length).view(rows, length) % (length - length // 3)
        kind = {"layer_type": tables.layer_types[0]} if hasattr(tables, "layer_types") else {}
        cos, sin = made(torch.empty(0, dtype=sizes.dtype), places, **kind)
        return [[q, k, cos.to(sizes.device), sin.to(sizes.device)]]

    ways = [(partial(_turn, own), partial(_turning, module))]
    return Place(module, (own, heads, groups, size), own, ways, inputs)


def _takes_one(module: nn.Module) -> bool:
    """Whether its ``forward`` takes a tensor and nothing else."""
    return len(inspect.signature(type(module).forward).parameters) == 2


# All of them.


def places(model: nn.Module) -> dict[str, list[Place]]:
    """Where Liger's kernels may do what ``model`` does, by kind."""
    tables = next((m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    finders = {"RMSNorm": _norm_place, "SwiGLU": _gated_place, "RoPE": partial(_rotary_place, tables=tables)}
    return {kind: [p for m in model.modules() if (p := find(m)) is not None] for kind, find in finders.items()}


@cache
def _results() -> dict[tuple, int | str]:
    """What trials found in this process: which way is right, or why none is."""
    return {}


def _tried(place: Place, sizes: Sizes) -> int | str:
    known, key = _results(), (place.key, sizes)
    if key not in known:
        known[key] = _try(place, sizes)
    return known[key]


def _try(place: Place, sizes: Sizes) -> int | str:
    shares: list[float] = []
    try:
        inputs, devices = place.inputs(sizes), [sizes.device] if sizes.device.type == "cuda" else []
        for number, (way, _) in enumerate(place.ways):
            with torch.random.fork_rng(devices):  # a dropout draws from it
                found = [excess(place.own, way, given) for given in inputs]
            if all(share <= 1.0 for share in found):  # which nan is not
                return number
            shares += found
    except Exception as error:  # whatever a compiler, a driver or another version of Liger raises
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return f"its error is {min(shares):.3g} times what it may be"


def use(model: nn.Module, sizes: Sizes | None) -> tuple[list[str], list[str]]:
    """Put Liger's kernels in all their places in ``model`` where they are right. Returns the kinds that are used, and a
    clause for whatever is not. Without ``sizes`` nothing is tried, and every place is taken: for plans."""
    used, kept = [], []
    for kind, found in places(model).items():
        answers = {place.key: 0 if sizes is None else _tried(place, sizes) for place in found}
        for place in found:
            if isinstance(way := answers[place.key], int):
                place.module.forward = place.ways[way][1]
        if any(isinstance(answer, int) for answer in answers.values()):
            used.append(kind)
        wrong = sorted({answer for answer in answers.values() if isinstance(answer, str)})
        kept += [f"{kind} ({reason})" for reason in wrong or ([] if found else ["the model has none that Liger knows"])]
    return used, kept
