"""Time a training step of Q-GaLore against other methods, on one model and one batch, on this machine.

    python tools/bench.py [--model llama_60m] [--batch 4096] [--sequence 256] [--rounds 5] [--device cpu] [--threads 1]
                          [--clock wall] [--methods adamw adamw8bit galore galore-torch qgalore]

Rounds are interleaved: every method takes one step in each, so that a busy machine slows all alike. Printed are medians
and, after ±, half the range between the quartiles, in milliseconds; ratios are taken within a round. ``--batch`` counts
tokens. ``--clock cpu`` counts the process's CPU time, for a busy machine and one thread. Columns:

    step       a whole ordinary step, with refresh / T added; ×adamw, ×galore-torch: its ratios to theirs
    forward    the loss
    backward   gradients of activations and of what trains in full, found by timing a backward pass that is asked for
               nothing else
    gradient   the rest of the backward pass, which makes the layers' weight gradients (classic GaLore: and projects)
    refresh    a step that finds every layer's basis, less an ordinary one, divided by the gap T
    optimizer  the step of the moments;  merge: writing its result to the weights
    light      the speed of light: the linear layers' and the head's products that the method cannot do without, alone
               and in its number format, as a share of its step. Attention and everything else count as waste

Methods: ``adamw`` is torch's; ``adamw8bit`` the 8-bit one; ``galore`` is classic GaLore written here: a full gradient,
then its projection, with fp32 moments and exact SVD; ``galore-torch`` its authors' package; ``qgalore`` this project
(int8 weights, int4 bases, 8-bit moments), ``delta`` the same without any quantization, ``qgalore+`` with int8 low-rank
embeddings and head too, ``qgalore+int8`` that with products of integers in the layers (``light`` stays in floating
point). In fp32 on a CPU, bf16 on a GPU.
"""

import argparse
import gc
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import qgalore
from qgalore.errors import QGaloreError
from qgalore.lowrank.inner.checked import adamw8bit
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.subspace import search
from qgalore.lowrank.subspace.sides import basis_sides
from qgalore.models import loading
from qgalore.models.loss import chunked_loss
from qgalore.quant import dispatch

GAP, SCALE, LR = 200, 0.25, 1e-4
PHASES = ("forward", "backward", "gradient", "refresh", "optimizer", "merge")


class Clock:
    """Durations by name. On a GPU they are taken from events, which do not make it wait."""

    read_cpu = staticmethod(time.perf_counter)

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple[str, object, object]] = []

    def now(self):
        if not self.on_gpu:
            return self.read_cpu()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self, name: str):
        start = self.now()
        yield
        self.spans.append((name, start, self.now()))

    def read(self) -> Counter[str]:
        """Seconds by name since the last reading."""
        if self.on_gpu:
            torch.cuda.synchronize()
        total: Counter[str] = Counter()
        for name, start, end in self.spans:
            total[name] += start.elapsed_time(end) / 1000 if self.on_gpu else end - start
        self.spans.clear()
        return total


class ClassicGaLore:
    """GaLore as published (arXiv 2403.03507, algorithm 2): AdamW on Lᵀ G or G R̂ of a gradient that exists in full."""

    def __init__(self, layers: list[nn.Linear], rest: list[nn.Parameter], rank: int, clock: Clock) -> None:
        self.weights, self.rank, self.clock = [layer.weight for layer in layers], rank, clock
        self.bases: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        self.leaves = [nn.Parameter(w.new_zeros(self._small(w.shape), dtype=torch.float32)) for w in self.weights]
        self.dense = torch.optim.AdamW(rest, lr=LR, weight_decay=0.0)
        self.inner = torch.optim.AdamW(self.leaves, lr=LR, weight_decay=0.0)
        self.due = True

    def _small(self, shape: torch.Size) -> tuple[int, int]:
        left, right = basis_sides(*shape, "std")
        rank = min(self.rank, *shape)
        return (rank if left else shape[0], rank if right else shape[1])

    @torch.no_grad()
    def step(self) -> None:
        with self.clock.span("gradient"):
            for number, (weight, leaf) in enumerate(zip(self.weights, self.leaves, strict=True)):
                gradient = weight.grad
                if self.due:
                    self.bases[number] = self._basis(gradient)
                left, right = self.bases[number]
                leaf.grad = (gradient @ right if left is None else left.T @ gradient).float()
                leaf.zero_()
        with self.clock.span("optimizer"):
            self.inner.step()
            self.dense.step()
        with self.clock.span("merge"):
            for number, (weight, leaf) in enumerate(zip(self.weights, self.leaves, strict=True)):
                left, right = self.bases[number]
                small = leaf.to(weight.dtype)
                weight.add_(small @ right.T if left is None else left @ small, alpha=SCALE)
        self.due = False

    def _basis(self, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        with_left, _ = basis_sides(*gradient.shape, "std")
        matrix = gradient.float().T if with_left else gradient.float()
        columns = search.exact_basis(matrix, min(self.rank, *gradient.shape)).to(gradient.dtype).contiguous()
        return (columns, None) if with_left else (None, columns)


class Method:
    """A model, its optimizer and what the bench asks of them. ``hidden``: leaves that a backward pass can leave out."""

    def __init__(self, name: str, model: nn.Module, clock: Clock) -> None:
        self.name, self.model, self.clock = name, model, clock
        self.hidden: list[nn.Parameter] = []
        self.whole_span = "optimizer"  # of step(), where it does not take its own spans
        self.step: Callable[[], None]
        self.refresh_next: Callable[[], None] | None = None

    def clear(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


def _plain(method: Method, rank: int) -> None:
    layers = linear_layers(method.model)
    method.hidden = [layer.weight for layer in layers]
    owned = {id(weight) for weight in method.hidden}
    rest = [p for p in method.model.parameters() if id(p) not in owned]
    if method.name == "galore":
        optimizer = ClassicGaLore(layers, rest, rank, method.clock)
        method.step, method.whole_span = optimizer.step, ""
        method.refresh_next = lambda: setattr(optimizer, "due", True)
        return
    if method.name == "galore-torch":
        from galore_torch import GaLoreAdamW

        low = {"rank": rank, "update_proj_gap": GAP, "scale": SCALE, "proj_type": "std"}
        groups = [{"params": rest}, {"params": method.hidden, **low}]
        optimizer = GaLoreAdamW(groups, lr=LR, no_deprecation_warning=True)
        states = optimizer.state
        method.refresh_next = lambda: [states[p].update(step=0) for p in method.hidden if p in states]
    elif method.name == "adamw8bit":
        optimizer = adamw8bit(method.model.parameters(), lr=LR, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(method.model.parameters(), lr=LR, weight_decay=0.0)
    method.step = optimizer.step


def _ours(method: Method, rank: int) -> None:
    quantized = {} if method.name != "delta" else {"weight_format": "none", "basis_format": "fp32"}
    if "+" in method.name:
        quantized["embeddings"] = "int8"
    if method.name == "qgalore+int8":
        quantized |= {"compute": "int8", "group_size": "row"}
    qgalore.convert(method.model, rank=rank, **quantized)
    inner = "adamw" if method.name == "delta" else "adamw8bit"
    optimizer = qgalore.optimizer(method.model, lr=LR, scale=SCALE, inner=inner, update_proj_gap=GAP, stagger=False)
    layers = [m for m in method.model.modules() if isinstance(m, LowRankLinear)]
    method.hidden = [layer.delta for layer in layers]

    def refresh_next() -> None:
        for tensor in optimizer.tensors:
            if tensor.projected:
                tensor.schedule.next_refresh = optimizer.step_count
                tensor.arm(optimizer.step_count)

    for tensor in optimizer.tensors:
        _clocked(tensor, "merge", "merge", method.clock)
        for part in tensor.parts:
            _clocked(part, "step", "optimizer", method.clock)
    method.refresh_next = refresh_next
    method.step, method.whole_span = optimizer.step, "around"


def _clocked(owner: object, name: str, phase: str, clock: Clock) -> None:
    """Time every call of this object's method."""
    original = getattr(owner, name)

    def timed(*args, **kwargs):
        with clock.span(phase):
            return original(*args, **kwargs)

    setattr(owner, name, timed)


MAKERS = dict.fromkeys(("adamw", "adamw8bit", "galore", "galore-torch"), _plain) | dict.fromkeys(
    ("qgalore", "qgalore+", "qgalore+int8", "delta"), _ours
)


def make(name: str, config, rank: int, dtype: torch.dtype, device: torch.device) -> Method | None:
    """The method ready to step, or None, with a printed line, where a package for it cannot be used."""
    method = Method(name, loading.from_scratch(config, dtype=dtype, seed=0).to(device), Clock(device))
    try:
        MAKERS[name](method, rank)
    except (ImportError, QGaloreError, TypeError) as error:
        print(f"{name} is left out: {type(error).__name__}: {error}", flush=True)
        return None
    return method


def take(method: Method, batch: dict[str, Tensor]) -> Counter[str]:
    """One training step; seconds by phase and of the whole (``step``)."""
    clock = method.clock
    tokens = batch["labels"].numel()
    with clock.span("step"):
        with clock.span("forward"):
            loss = chunked_loss(method.model, batch) / tokens
        with clock.span("backward"):
            loss.backward()
        with clock.span(method.whole_span):
            method.step()
    method.clear()
    times = clock.read()
    if "around" in times:  # looking for inf and nan, arming leaves
        times["optimizer"] += max(0.0, times["around"] - times["optimizer"] - times["merge"])
    return times


def without_gradients(method: Method, batch: dict[str, Tensor]) -> float:
    """Seconds of a backward pass that leaves the layers' weight gradients out."""
    wanted = [leaf.requires_grad for leaf in method.hidden]
    for leaf in method.hidden:
        leaf.requires_grad_(False)
    loss = chunked_loss(method.model, batch) / batch["labels"].numel()
    with method.clock.span("backward"):
        loss.backward()
    for leaf, before in zip(method.hidden, wanted, strict=True):
        leaf.requires_grad_(before)
    method.clear()
    return method.clock.read()["backward"]


def products(config, name: str, rank: int, tokens: int) -> Counter[tuple[int, int, int]]:
    """(m, k, n) of the matrix products that ``name`` cannot do without, with their number in a step."""
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_key_value_heads * (width // config.num_attention_heads)
    shapes = Counter({(width, width): 2, (heads, width): 2, (inner, width): 2, (width, inner): 1})
    if heads == width:
        shapes = Counter({(width, width): 4, (inner, width): 2, (width, inner): 1})
    found: Counter[tuple[int, int, int]] = Counter()
    layers = [(shape, count * config.num_hidden_layers, False) for shape, count in shapes.items()]
    for (rows, columns), count, is_head in [*layers, ((config.vocab_size, width), 1, True)]:
        low = name in MAKERS and MAKERS[name] is _ours and (not is_head or "+" in name)
        classic = name.startswith("galore") and not is_head
        r, long = min(rank, rows, columns), max(rows, columns)
        found[(tokens, columns, rows)] += count  # Y = X Wᵀ
        found[(tokens, rows, columns)] += count  # dX = dY W
        if low:
            found[(tokens, min(rows, columns), r)] += count  # X R̂ or dY L
            found[(r, tokens, long)] += count
        else:
            found[(rows, tokens, columns)] += count  # G = dYᵀ X
        if classic:
            found[(long, min(rows, columns), r)] += count  # G R̂
        if low or classic:
            found[(rows, r, columns)] += count  # Δ R̂ᵀ
    return found


class Light:
    """Times of matrix products alone, medians over rounds."""

    def __init__(self, wanted: set[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> None:
        self.clock, self.kind = Clock(device), {"dtype": dtype, "device": device}
        self.seconds: dict[tuple[int, int, int], list[float]] = {shape: [] for shape in wanted}

    def measure(self) -> None:
        for (m, k, n), seconds in self.seconds.items():
            left, right = torch.randn(m, k, **self.kind), torch.randn(n, k, **self.kind).T
            left @ right
            with self.clock.span("product"):
                left @ right
            seconds.append(self.clock.read()["product"])

    def bound(self, found: Counter[tuple[int, int, int]]) -> float:
        return sum(statistics.median(self.seconds[shape]) * count for shape, count in found.items())


def spread(values: list[float]) -> float:
    """Half the distance of the quartiles; of the extremes for fewer than four values."""
    low, *_, high = statistics.quantiles(values, n=4) if len(values) > 3 else (min(values), max(values))
    return (high - low) / 2


def rounds(methods: list[Method], light: Light, batch: dict[str, Tensor], count: int):
    """Seconds by method and phase: lists with one value for each round; and of a step that refreshes."""
    found: dict[str, dict[str, list[float]]] = {m.name: defaultdict(list) for m in methods}
    for method in methods:
        take(method, batch)  # the first bases, moments, compiled kernels
        take(method, batch)
    for number in range(count):
        light.measure()
        for method in methods:
            only = without_gradients(method, batch)
            times = take(method, batch)
            times["gradient"] += max(0.0, times["backward"] - only)
            times["backward"] = min(only, times["backward"])
            for phase in ("step", *PHASES):
                found[method.name][phase].append(times[phase])
        print(f"round {number + 1} of {count}", file=sys.stderr, flush=True)
    for method in methods:
        if method.refresh_next is not None:
            method.refresh_next()
            whole = take(method, batch)["step"]
            cost = max(0.0, whole - statistics.median(found[method.name]["step"])) / GAP
            found[method.name]["refresh"] = [cost] * count
            found[method.name]["step"] = [seconds + cost for seconds in found[method.name]["step"]]
    return found


def table(found, light: Light, config, rank: int, tokens: int) -> str:
    others = [name for name in ("adamw", "galore-torch") if name in found]
    head = ("method", "step ms", "×adamw", "tokens/s", *PHASES, "light", *[f"×{name}" for name in others[1:]])
    rows = [head]
    for name, phases in found.items():
        steps = phases["step"]
        middle = statistics.median(steps)
        ratios = [[a / b for a, b in zip(steps, found[other]["step"], strict=True)] for other in others]
        share = light.bound(products(config, name, rank, tokens)) / middle
        cells = [f"{statistics.median(phases[p]) * 1e3:.1f}" for p in PHASES]
        step = f"{middle * 1e3:.0f} ±{spread(steps) * 1e3:.0f}"
        ratio, *more = [f"{statistics.median(values):.3f} ±{spread(values):.3f}" for values in ratios]
        rows.append((name, step, ratio, f"{tokens / middle:.0f}", *cells, f"{share:.0%}", *more))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_60m", help="preset, config.json or its folder")
    parser.add_argument("--vocabulary", type=int, default=32000, help="for a preset that leaves it open")
    parser.add_argument("--batch", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--kernels", choices=dispatch.CHOICES, default="auto")
    parser.add_argument("--methods", nargs="+", choices=tuple(MAKERS), default=[m for m in MAKERS if "+" not in m])
    options = parser.parse_args(arguments)
    if options.batch % options.sequence:
        parser.error(f"--batch {options.batch} is not a multiple of --sequence {options.sequence}")
    if options.threads:
        torch.set_num_threads(options.threads)
    Clock.read_cpu = staticmethod(time.process_time if options.clock == "cpu" else time.perf_counter)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    names = list(dict.fromkeys(["adamw", *options.methods]))  # adamw is what the others are held against
    try:
        dispatch.use(options.kernels, device)
        config = loading.model_config(options.model, tokenizer_size=options.vocabulary, overrides={})
    except QGaloreError as error:
        parser.error(str(error))
    methods = [m for m in (make(name, config, options.rank, dtype, device) for name in names) if m is not None]
    gc.collect()
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch // options.sequence, options.sequence)
    ids = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    positions = torch.arange(options.sequence, device=device).expand(shape)
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "position_ids": positions}
    wanted = {s for name in names for s in products(config, name, options.rank, options.batch)}
    light = Light(wanted, dtype, device)
    found = rounds(methods, light, batch, options.rounds)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{options.model}, {options.batch} tokens in sequences of {options.sequence}, rank {options.rank}, T {GAP}")
    kind = f"{str(dtype).removeprefix('torch.')}, {where}, {options.clock} time"
    print(f"{kind}, kernels {options.kernels}, torch {torch.__version__}, {options.rounds} rounds")
    print(table(found, light, config, options.rank, options.batch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
