"""The whole examination, printed as it goes."""

import torch

from .. import speed
from ..quant import dispatch
from . import fitting, kernels, software, speeds

ELSEWHERE = "RTX 5060 Ti"  # whose figures are shown where there is no card of the table


def _print(head: str, lines: list[str]) -> None:
    print(f"\n{head}", *(f"  {line}" for line in lines), sep="\n", flush=True)


def _card(device: torch.device) -> tuple[speed.Card, bool]:
    """The card of the table that is here, and True; or another, whose figures are shown in its place."""
    if device.type == "cuda":
        named = speed.match(torch.cuda.get_device_name(device))
        if named is not None:
            return named, True
    return speed.find(ELSEWHERE), False


def examine(device: torch.device, configurations: tuple[str, ...] | None = None) -> bool:
    """Print what ``device`` has, is right in, and reaches. False if a kernel is wrong."""
    _print("software", software.lines())
    if remarks := software.remarks():
        _print("to mend", remarks)
    told, right = kernels.examine(device)
    _print("kernels, against the reference", told)
    if not right:
        dispatch.use("reference", device)
    reached = speeds.rates(device)
    units = {"memory": "GB/s"}
    _print("rates", [f"{name:<28}{rate:,.4g} {units.get(name, 'TFLOP/s')}" for name, rate in reached.items()])
    kind = "a layer of a 7B Llama, 2,048 tokens" if device.type == "cuda" else "a small layer"
    times, fused = speeds.layer_times(device)
    if fused:
        _print("Liger's kernels, against the model's own", fused)
    _print(f"{kind}, milliseconds", [f"{name:<28}{seconds * 1e3:,.1f}" for name, seconds in times.items()])
    card, here = _card(device)
    efficiency = {}
    if here:
        peaks = {"memory": card.memory, "products": card.bf16, "integers": card.int8, "merge": card.bf16}
        efficiency = {name: min(1.0, reached[name] / peak) for name, peak in peaks.items()}
    whose = "with the rates above" if here else "with assumed rates, as no card of the table is here"
    names = fitting.SHIPPED if configurations is None else configurations
    _print(f"shipped configurations on a {card.name}, {whose}", fitting.lines(card, efficiency, names))
    return right
