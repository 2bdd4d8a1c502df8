"""The blocks of a run that live in host memory, if ``memory.stream`` asks for that."""

import torch
from torch import nn

from ..config import Config
from ..evaluation.loss import Losses, one_by_one
from ..lowrank.optimizer import LowRankOptimizer
from ..lowrank.tensors.splitting import places_in
from ..memory.plan import human
from ..memory.streamed import blocks_to_stream, check_blocks
from ..models import streaming
from ..models.compiling import blocks_of
from ..parallel import shards
from ..steps.blocks import Layout
from ..steps.streaming.evaluating import losses
from ..steps.streaming.records import fields_of_block, used_elsewhere
from ..steps.streaming.stream import Stream
from .say import say
from .stepping import LayerMajor, Order


class Placing:
    """Gives a model on the meta device memory: on the device, or in the records of ``stream``, which it makes. What
    processes split waits in host memory by rows, which FSDP2 brings to the device when it gathers a block."""

    stream: Stream | None = None
    rows_bytes = 0  # of this process's rows in host memory

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, model: nn.Module, device: torch.device) -> None:
        """Unset memory for all tensors; those of a block go straight into its record."""
        if not self.config.memory.streams:
            streaming.allocate(model, device)
            return
        blocks = blocks_to_stream(model)
        if rows := [place.rows for block in blocks for place in places_in(block) if place.rows is not None]:
            streaming.allocate(model, device, in_host_memory={id(some) for some in rows})
            self.rows_bytes = sum(shards.local(some).nbytes for some in rows)
            return
        elsewhere = used_elsewhere(model, blocks)
        waiting = {id(entry.find()) for block in blocks for entry in fields_of_block(block, elsewhere)}
        streaming.allocate(model, device, in_host_memory=waiting)
        waits = self.config.train.clip_grad_norm > 0
        self.stream = Stream(model, blocks, device, slots=self.config.memory.slots, filled=False, waits=waits)

    def collect(self) -> None:
        """Bring what a checkpoint has replaced into the records."""
        if self.stream is not None:
            self.stream.collect()

    def adopt(self, model: nn.Module, optimizer: LowRankOptimizer, layout: Layout | None) -> None:
        """Let the optimizer's state travel with the blocks, if that is asked for, and lock the records' pages for a
        GPU. Raises :class:`ConfigError` if the walk is through other blocks."""
        stream = self.stream
        if self.rows_bytes:
            say("stream", f"rows of {len(blocks_of(model))} blocks in {human(self.rows_bytes)} of host memory")
        if stream is None:
            return
        check_blocks(model, layout, stream.blocks)
        stream.adopt(optimizer, state=self.config.memory.stream == "all")
        say(
            "stream",
            f"{len(stream.blocks)} blocks in {human(stream.host_bytes)} of host memory, {stream.count} slots of "
            f"{human(stream.slot_bytes)} on {stream.device.type}",
        )
        if stream.device.type == "cuda":
            say("stream", stream.lock())

    def losses(self, order: Order) -> Losses:
        """How held-out batches go through the model: several for each fetch of a block, if it is streamed."""
        stream = self.stream
        if stream is None or not isinstance(order, LayerMajor):
            return one_by_one
        micro_batches = self.config.train.grad_accumulation // order.optimizer.team.size
        return lambda runs: losses(order.layout, runs, order.kept, stream, micro_batches)
