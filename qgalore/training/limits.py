"""What a run may use of its device's memory and of its host's, and what a plan lacks."""

from dataclasses import dataclass

import torch

from ..config import Config
from ..config import bytes_of as budget_bytes
from ..memory import machine, plan

SLACK = 1.05  # peaks are planned within 5 % where they were measured


@dataclass(frozen=True)
class Limit:
    """What a run may use of the device, in bytes or None if unknown, and who says so; and of the host, if that is
    limited."""

    budget: int | None
    whose: str
    host: int | None = None

    @classmethod
    def of(cls, config: Config, device: torch.device) -> "Limit":
        """The limits that ``config`` sets, or what ``device`` has."""
        asked, host = config.memory.budget, config.memory.host_budget
        of_host = None if host is None else budget_bytes(host)
        if asked is not None:
            return cls(budget_bytes(asked), "memory.budget", of_host)
        return cls(machine.available(device), f"free on {device.type}", of_host)

    def __str__(self) -> str:
        return f"{'?' if self.budget is None else plan.human(self.budget)} ({self.whose})"

    def over(self, found: plan.Plan) -> bool:
        """Whether ``found`` needs more of the device."""
        return self.budget is not None and found.total > self.budget

    def short_of_host(self, found: plan.Plan, device: torch.device) -> str | None:
        """What ``found`` lacks of host memory, in words; None if it lacks nothing. Of streamed blocks, which are there
        for the whole run, this machine's memory is asked too, unless the plan is for another machine."""
        if self.host is not None and found.host_total > self.host:
            return (
                f"the plan needs {plan.human(found.host_total)} of host memory, and there are {plan.human(self.host)} "
                "(memory.host_budget)"
            )
        if found.streamed is None or (device.type == "cuda" and not torch.cuda.is_available()):
            return None
        here = machine.available(torch.device("cpu"))
        needed = found.host_total + (found.total if device.type == "cpu" else machine.resident_set())
        if here is None or needed <= here:
            return None
        both = " and the device they are streamed to" if device.type == "cpu" else ""
        return (
            f"the plan needs {plan.human(needed)} of this machine's memory for streamed blocks{both}, and "
            f"{plan.human(here)} are free"
        )

    def allows(self, found: plan.Plan, device: torch.device) -> bool:
        """Whether there is room for ``found``, on both sides, and in this machine's memory if both lie there."""
        here = machine.available(device) if device.type == "cpu" else None
        if here is not None and found.total + found.host_total > here:
            return False
        return not self.over(found) and self.short_of_host(found, device) is None

    def room_for_copy(self, found: plan.Plan, device: torch.device, built: bool = True) -> int | None:
        """Bytes of host memory that a run of ``found`` leaves for a copy of its state; None if that is not known.
        ``built``: whether blocks that live on the host are there already. On a CPU the copy is part of the process that
        is planned."""
        here = machine.available(torch.device("cpu"))
        if here is None:
            return None
        if device.type == "cpu":
            most = here if self.budget is None else min(here, self.budget)
            room = most - int(SLACK * found.total) - found.host_total
        else:
            there = found.streamed.host_bytes if built and found.streamed is not None else 0
            room = here - machine.resident_set() - (found.host_total - there)
        return room if self.host is None else min(room, self.host - found.host_total)
