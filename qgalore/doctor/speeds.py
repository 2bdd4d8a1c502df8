"""What the device reaches: bytes and products a second, and the times of one real layer."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn

from ..lowrank.factory import optimizer
from ..models import elementwise
from ..models.convert import convert
from ..quant import dispatch, int8, int8_products

ROUNDS = 5  # of a measurement; 2 on a CPU, which only shows that the code runs


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``work``: the median of some rounds after one that does not count."""
    rounds = 2 if device.type == "cpu" else ROUNDS
    return statistics.median([once(work, device) for _ in range(rounds + 1)][1:])


def once(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``work``, until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


class _Columns:
    """A stored basis with random columns."""

    fmt = "int4"

    def __init__(self, dim: int, rank: int, device: torch.device) -> None:
        self.dim = dim
        self.codes, self.scale = dispatch.encode(torch.randn(rank, dim, device=device) * 0.02, "int4")

    def columns(self) -> torch.Tensor:
        return dispatch.decode(self.codes, self.scale, self.dim, "int4").T


def rates(device: torch.device) -> dict[str, float]:
    """10⁹ bytes a second that are copied (``memory``), 10¹² operations a second of products in bf16 (fp32 on a CPU),
    of integers, and of the merge."""
    small = device.type == "cpu"
    side, rank, tokens = (256, 32, 64) if small else (4096, 1024, 4096)
    dtype = torch.float32 if small else torch.bfloat16
    found = {}
    source = torch.empty((1 << 22) if small else (1 << 28), dtype=torch.int8, device=device)
    copy = torch.empty_like(source)
    found["memory"] = 2 * source.nbytes / timed(partial(copy.copy_, source), device) / 1e9
    del source, copy
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    found["products"] = 2 * side**3 / timed(lambda: left @ right, device) / 1e12
    q, scale = int8.quantize(torch.randn(side, side, device=device) * 0.02, side)
    x = torch.randn(tokens, side, device=device).to(dtype)
    found["integers"] = 2 * tokens * side**2 / timed(lambda: int8_products.output(x, q, scale), device) / 1e12
    q, scale = int8.quantize(torch.randn(side, side, device=device) * 0.02, 128)
    columns, delta = _Columns(side, rank, device), torch.randn(side, rank, device=device) * 1e-4
    how = {"s": 0.25, "shrink": 0.0, "key": (1, 2)}
    work = 2 * side**2 * rank
    found["merge"] = work / timed(lambda: dispatch.merge(q, scale, delta, None, columns, **how), device) / 1e12
    return found


def fuse(model: nn.Module, device: torch.device, tokens: int) -> list[str]:
    """Let Liger's kernels do in ``model``, whose row has so many ``tokens``, what they would do in a run here. A line
    for each kind of them says whether they do."""
    if device.type != "cuda" or dispatch.kernels_for(device) is None:
        return []
    if find_spec("liger_kernel") is None:
        return ["not installed; pip install liger-kernel, and plain PyTorch is used until then"]
    sizes = elementwise.Sizes(device, torch.bfloat16, 1, tokens, elementwise.heads_of(model.config))
    used, kept = elementwise.use(model, sizes)
    return [*(f"{kind:<28}right" for kind in used), *(f"not used: {clause}" for clause in kept)]


def layer_times(device: torch.device) -> tuple[dict[str, float], list[str]]:
    """Seconds of one layer: that of a 7B Llama with 2,048 tokens, or a small one on a CPU. ``first step`` finds all
    bases; ``step`` moves and merges. And what :func:`fuse` says of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = device.type == "cpu"
    hidden, inner, tokens, rank = (128, 352, 64, 32) if small else (4096, 11008, 2048, 1024)
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": hidden // 32 if small else 32}
    config = LlamaConfig(**shape, num_hidden_layers=1, vocab_size=512, tie_word_embeddings=True)
    dtype = torch.float32 if small else torch.bfloat16
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    convert(model, rank=rank)
    told = fuse(model, device, tokens)
    moving = optimizer(model, lr=1e-4, stepping="deferred", stagger=False)
    ids = torch.randint(0, 512, (1, tokens), device=device)

    def forward() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def whole() -> None:
        forward().backward()

    found = {}
    whole()
    found["first step"] = once(moving.step, device)
    with torch.no_grad():
        found["forward"] = timed(forward, device)
    found["forward and backward"] = timed(whole, device)
    once(moving.step, device)  # the first without a refresh compiles what it needs
    whole()
    found["step"] = once(moving.step, device)
    return found, told
