"""AdamW with blockwise 8-bit moments on the state layout of bitsandbytes' AdamW8bit: our own for the CPU, and
bitsandbytes' function for other devices."""

import math
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...errors import ConfigError
from ...quant.blockwise import (
    BLOCK,
    block_counts,
    block_parts,
    cell_table,
    dequantize_tile,
    dynamic_map,
    quantize_tile,
    tiles,
)

MIN_8BIT_SIZE = 4096  # smaller tensors keep fp32 moments, as in bitsandbytes


class CodedAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) whose subclasses keep the moments of ``coded`` parameters in few bits; others keep fp32
    ``state1`` and ``state2``. ``names``: the uint8 tensors among the state."""

    names: tuple[str, ...] = ()

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        if not (lr >= 0.0 and eps >= 0.0 and weight_decay >= 0.0):
            raise ConfigError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative")
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"betas {betas} must be two numbers in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def coded(self, parameter: Tensor) -> bool:
        return parameter.numel() >= MIN_8BIT_SIZE

    def new_state(self, parameter: Tensor) -> dict:
        """The state of a ``coded`` parameter before its first step, ``step`` included."""
        raise NotImplementedError

    def step_coded(self, parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
        """AdamW in place on a parameter and its state, whose ``step`` counts this one already."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict) -> None:
        """As in any torch optimizer, which would otherwise turn codes into the parameters' dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "absmax1" in state:
                state |= {name: state[name].to(torch.uint8) for name in self.names}

    @torch.no_grad()
    def step(self, closure=None):
        """One step; a closure is evaluated first, with gradients on, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    fresh = {"step": 0, "state1": torch.zeros_like(parameter), "state2": torch.zeros_like(parameter)}
                    state.update(self.new_state(parameter) if self.coded(parameter) else fresh)
                state["step"] += 1
                gradient = parameter.grad.contiguous()
                if "absmax1" in state:
                    self.step_coded(parameter, gradient, state, group)
                    continue
                first, second = state["state1"], state["state2"]
                adamw(parameter, gradient, first, second, torch.empty_like(first), state["step"], group)
        return loss


class _AdamW8bit(CodedAdamW):
    """State of a parameter, names and dtypes as in bitsandbytes: ``step`` int, ``state1`` and ``state2`` uint8 of its
    shape, ``absmax1`` and ``absmax2`` fp32 (⌈n/256⌉,), ``qmap1`` and ``qmap2`` fp32 (256,); below 4,096 elements fp32
    ``state1`` and ``state2`` only."""

    names = ("state1", "state2")
    kind = ""  # of the devices it takes
    other = ""  # what to use on another

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype != torch.float32 or not self.takes(parameter.device) or not parameter.is_contiguous():
                raise ConfigError(
                    f"{type(self).__name__} was given a {parameter.dtype} parameter of shape {tuple(parameter.shape)} "
                    f"on {parameter.device}; it takes contiguous float32 ones on {self.kind}. Use {self.other}."
                )

    def takes(self, device: torch.device) -> bool:
        raise NotImplementedError

    def new_state(self, parameter: Tensor) -> dict:
        blocks = -(-parameter.numel() // BLOCK)
        state: dict = {"step": 0}
        for number, signed in (("1", True), ("2", False)):
            state[f"state{number}"] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[f"qmap{number}"] = _map_on(signed, parameter.device)
            state[f"absmax{number}"] = torch.zeros(blocks, device=parameter.device)
        return state


@cache
def _map_on(signed: bool, device: torch.device) -> Tensor:
    """One for all parameters: a copy for each would cost memory, and a GPU's time."""
    return dynamic_map(signed).to(device)


class AdamW8bitFunctional(_AdamW8bit):
    """AdamW through bitsandbytes' function for a tensor, which its classes call too. They make a GPU wait after every
    parameter, and there is one of these classes for each trained tensor.

    Raises :class:`ConfigError` for parameters that are not contiguous fp32.
    """

    kind = "a device that bitsandbytes knows"
    other = "train.optimizer=adamw"

    def takes(self, device: torch.device) -> bool:
        return True

    def step_coded(self, parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        first, second = group["betas"]
        optimizer_update_8bit_blockwise(
            "adam",
            gradient,
            parameter,
            state["state1"],
            state["state2"],
            first,
            second,
            0.0,  # the third beta and alpha, which AdamW has not
            0.0,
            group["eps"],
            state["step"],
            group["lr"],
            *(state[name] for name in ("qmap1", "qmap2", "absmax1", "absmax2")),
            weight_decay=group["weight_decay"],
        )


class AdamW8bitCPU(_AdamW8bit):
    """AdamW with 8-bit moments (arXiv 2110.02861), for fp32 parameters on the CPU.

    The update is bitsandbytes', in the same order of fp32 operations. Codes are the
    nearest ones (see ``blockwise.nearest_code``); bitsandbytes 0.50 on a CPU first cuts values to steps of 2⁻¹⁵ of the
    block's largest, so that second moments below that, zeros included, all become 1.6 · 10⁻⁵ of it.

    Raises :class:`ConfigError` for parameters that are not contiguous fp32 on the CPU and for values out of range.
    """

    kind = "the CPU"
    other = "bitsandbytes.optim.AdamW8bit"

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def step_coded(self, parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
        """Tile by tile: decode, step, encode while everything is in the cache."""
        flat = (parameter, gradient, state["state1"], state["state2"])
        blocked = [block_parts(tensor.view(-1)) for tensor in flat]
        blocked += [state[name].split(block_counts(parameter.numel())) for name in ("absmax1", "absmax2")]
        map1, map2 = state["qmap1"], state["qmap2"]
        table1, table2 = cell_table(map1), cell_table(map2)
        for part in zip(*blocked, strict=True):
            buffers: list[Tensor] = []
            for value, slope, code1, code2, absmax1, absmax2 in tiles(*part):
                # Buffers are used again, but for the last tile, which may be smaller.
                if not buffers or buffers[0].shape != value.shape:
                    buffers = [torch.empty_like(value) for _ in range(2)]
                    buffers += [torch.empty_like(value, dtype=torch.int32) for _ in range(2)]
                first, second, *scratch = buffers
                dequantize_tile(code1, absmax1, map1, scratch[0], first)
                dequantize_tile(code2, absmax2, map2, scratch[0], second)
                adamw(value, slope, first, second, scratch[0].view(torch.float32), state["step"], group)
                quantize_tile(first, table1, code1, absmax1, scratch)
                quantize_tile(second, table2, code2, absmax2, scratch)


def adamw(value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, root: Tensor, step: int, group: dict) -> None:
    """AdamW in place on ``value`` and both moments, all fp32 of one shape; ``root`` is scratch."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    # In the order of bitsandbytes, in whose bits the result is to agree.
    first.mul_(beta1).add_(gradient, alpha=1.0 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    # The bias of a second moment that began at zero is taken out of its root, before ``eps`` is added.
    torch.sqrt(second, out=root).div_(math.sqrt(1.0 - beta2**step)).add_(group["eps"])
    # The decay is decoupled: it shrinks the value, and no moment hears of it.
    if group["weight_decay"]:
        value.mul_(1.0 - lr * group["weight_decay"])
    value.addcdiv_(first, root, value=-lr / (1.0 - beta1**step))
