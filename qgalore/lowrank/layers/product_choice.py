"""Which of a layer's two products with its weight run on integers, decided by trial on the layer's own values.

A token whose largest value is c times its root mean square is rounded to steps of c/127 of that, which leaves a
relative error of c / (127 √12). Gaussian tokens have c ≈ 4 and 0.9 %. At ``MAX_ERROR`` c is 22: the typical value of a
token still spans six steps on either side of zero, about as many as an int4 number has. Beyond it the layer multiplies
in floating point, and says so.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...replacing import replaced

MAX_ERROR = 0.05


@dataclass
class Choice:
    """One product of a layer: in int8, or not; None before its first trial. ``due``: try it at the next chance."""

    name: str
    int8: bool | None = None
    due: bool = True

    @torch.no_grad()
    def settle(self, exact: Callable[[], Tensor], rounded: Callable[[], Tensor]) -> None:
        """Compare both ways, ‖rounded − exact‖ / ‖exact‖, and print a line where the choice is or was for floating
        point. Values that are all zero or not finite give no answer: the trial stays due, and what was chosen holds."""
        wanted, got = exact(), rounded()
        if wanted.is_meta:
            self.int8, self.due = True, False
            return
        norm = torch.linalg.vector_norm
        error = float(norm(got - wanted, dtype=torch.float32) / norm(wanted, dtype=torch.float32))
        if not error < float("inf"):
            return
        before, self.int8, self.due = self.int8, error <= MAX_ERROR, False
        if self.int8 != (before is not False):
            way = "int8 again" if self.int8 else "floating point"
            print(
                f"{'compute:':<11}{self.name} in {way}: the error of int8 is {error:.1%} (limit {MAX_ERROR:.0%})",
                flush=True,
            )


@dataclass
class Products:
    """The choices of the layer ``name``: its output X Wᵀ and its input's gradient dY W."""

    name: str
    output: Choice = field(init=False)
    gradient: Choice = field(init=False)

    def __post_init__(self) -> None:
        self.output, self.gradient = Choice(f"{self.name} (output)"), Choice(f"{self.name} (input gradient)")

    @property
    def taken(self) -> tuple[bool, bool]:
        """Whether the output, and whether the input's gradient, is computed in int8."""
        return bool(self.output.int8), bool(self.gradient.int8)

    @property
    def due(self) -> bool:
        return self.output.due or self.gradient.due

    def retry(self) -> None:
        """Try both again in the next training pass; what was chosen holds until then."""
        self.output.due = self.gradient.due = True

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"output": dict(vars(self.output)), "gradient": dict(vars(self.gradient))}

    def load(self, state: dict[str, Any]) -> None:
        self.output, self.gradient = Choice(**state["output"]), Choice(**state["gradient"])


@contextmanager
def none_tried(model: nn.Module) -> Iterator[None]:
    """Inside, no layer of ``model`` tries its products: on values that are not a step's it might choose otherwise."""
    choices = [
        choice
        for module in model.modules()
        if isinstance(products := getattr(module, "products", None), Products)
        for choice in (products.output, products.gradient)
    ]
    with replaced((choice, "due", False) for choice in choices):
        yield
