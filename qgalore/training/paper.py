"""A run on paper: its model and optimizer on the meta device, and the plan of its memory that they give."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from ..config import Config, with_steps
from ..lowrank.factory import part_elements, trained_tensors
from ..lowrank.inner.checked import Factory, make_factory
from ..lowrank.layers.linear import LowRankLinear
from ..lowrank.rules import RuleOptions
from ..lowrank.subspace.policies import layers_at_once
from ..lowrank.subspace.refresh import RefreshOptions
from ..lowrank.tensors.base import TrainedTensor
from ..lowrank.tensors.splitting import deal, matrices_outside, places_in
from ..memory import machine, plan
from ..memory.rehearsal import Order, PaperOptimizer, Step, on_paper_schedules
from ..memory.stand_ins import Adam8bitShapes
from ..models import classify, loading
from ..models.compiling import blocks_of, blocks_to_compile
from ..models.loss import Loss, can_be_chunked, chunked_loss, summed_loss
from ..parallel import ALONE, Team
from ..parallel.paper import PaperTeam
from ..steps.blocks import Layout
from ..steps.turns import AlwaysThere
from . import loop_settings as settings
from .attending import attend_as
from .fusing import fuse_as
from .model import (
    Vocabulary,
    adapt_as,
    architecture,
    checkpoint_as,
    convert_as,
    ordinary_leaf,
    rule_momentum,
    rule_of,
    rule_rank,
    with_rows,
)
from .say import say
from .trial import order_of


def has_weights(folder: Path) -> bool:
    """Whether a pretrained folder holds more than its description."""
    return any(folder.glob("*.safetensors"))


def on_paper(config: Config, vocabulary: Vocabulary, processes: int = 1) -> tuple[torch.nn.Module, PaperOptimizer]:
    """The converted model of a resolved configuration and its optimizer on the meta device, in the process that keeps
    most."""
    team: Team = PaperTeam(0, processes) if processes > 1 else ALONE
    model = shape(config, vocabulary)
    if vocabulary.labels is None:
        loading.untie_padding(model)
    convert_as(config, model)
    attend_as(config, model)
    here = config.device == "cpu" or torch.cuda.is_available()
    fuse_as(config, model, torch.device(config.device) if here else None)
    if config.model.compile == "blocks":
        blocks_to_compile(model)
    adapt_as(config, model)
    checkpoint_as(config, model)
    low, train = config.lowrank, config.train
    lazy = {name: getattr(low, name) for name in ("cos_threshold", "gamma_proj", "queue_size", "max_gap")}
    how = {"rounding": low.weight_rounding, "scales": low.weight_scales}
    # With an energy of 1 a rank that is free to move takes all that it may.
    find = RefreshOptions(low.projector, low.policy, low.moments, energy=1.0, team=team, **how)
    schedule = {"update_proj_gap": low.update_proj_gap, "stagger": low.stagger, "lazy": lazy, "find": find}
    of_rule = RuleOptions(
        rule_rank(config), low.update_proj_gap, largest_rms=train.clip_update_rms, **rule_momentum(config)
    )
    tensors = trained_tensors(model, **schedule, rule=rule_of(config), of_rule=of_rule)
    if (shares := shares_of(config, processes)) > 1:
        team = _split(model, tensors, team, shares, _inner_factory(config))
    on_paper_schedules(tensors)
    optimizer = PaperOptimizer(
        tensors,
        lr=train.lr,
        weight_decay=train.weight_decay,
        scale=low.scale or 1.0,
        factory=_inner_factory(config),
        stepping="manual",
        seed=config.run.seed,
        part_elements=part_elements(train.optimizer),
        team=team,
    )
    return model, optimizer


def shares_of(config: Config, processes: int) -> int:
    """Among how many of ``processes`` the rows of the layers in blocks are split."""
    return config.parallel.over(processes).shards


def shape(config: Config, vocabulary: Vocabulary, report: Callable[[str], None] = lambda line: None) -> torch.nn.Module:
    """The unconverted model. A pretrained folder that holds no weights yet is planned from its ``config.json``."""
    if config.model.path is not None and vocabulary.labels is None:
        folder = loading.local_folder(config.model.path)
        if not has_weights(folder):
            described = loading.pretrained_config(folder, config.model.overrides, report=report)
            model = loading.skeleton(described, dtype=getattr(torch, config.model.dtype))
            return with_rows(config, vocabulary, model, report)
    return architecture(config, vocabulary, report)


def _inner_factory(config: Config) -> Factory:
    """The inner optimizer to plan with: one that cannot step without values is planned as AdamW, and a line says so."""
    train = config.train
    if train.optimizer == "adamw8bit":
        return Adam8bitShapes
    factory = make_factory(train.optimizer, train.lr, train.optimizer_options)
    leaf = torch.nn.Parameter(torch.zeros(16, 16, device="meta"))
    leaf.grad = torch.zeros_like(leaf)
    try:
        factory([leaf]).step()
    except Exception as error:  # whatever a foreign optimizer does with values that are not there
        reason = (str(error).strip().splitlines() or [""])[0]
        _say_once(
            f"{train.optimizer} cannot be tried on tensors without values ({type(error).__name__}: {reason}). The plan "
            "counts the state of AdamW in its place, two fp32 values for each that Δ or a dense tensor has"
        )
        return partial(torch.optim.AdamW, lr=train.lr)
    return factory


@cache
def _say_once(text: str) -> None:
    say("note", text)


def _split(model: torch.nn.Module, tensors: list[TrainedTensor], team: Team, shares: int, factory: Factory) -> Team:
    """Split what ``model``'s blocks store over so many ``shares``, and give each matrix an owner in ``team``: as seen
    by the process that owns most, which is returned."""
    blocks = blocks_of(model)
    inside = {module for block in blocks for module in block.modules()}
    outside = {id(parameter) for parameter in matrices_outside(model, blocks)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    first = {id(p) for p in embedding.parameters()}
    last = {id(p) for p in head.parameters()} if head is not None else set()
    for tensor in tensors:
        key = id(tensor.stored)
        if tensor.module in inside or key in outside:
            tensor.shards = shares
        if key in outside:  # before the blocks both ways, and behind them
            tensor.gathered = 2 * (key in first) + (key in last or key not in first)
    load = deal(tensors, team, factory)
    most = replace(team, rank=load.index(max(load)))
    deal(tensors, most, factory)
    return most


def gathered(model: torch.nn.Module) -> int:
    """Bytes of what is whole at a time: three of the largest block as it is stored, which are the one that works, the
    one that is coming, and the one whose step waits for the sums of its gradients; and what trains outside of them."""
    blocks = blocks_of(model)
    outside = sum(parameter.nbytes for parameter in matrices_outside(model, blocks))
    return 3 * max(sum(place.nbytes for place in places_in(block)) for block in blocks) + outside


def plan_for(
    config: Config, vocabulary: Vocabulary, device: str, loss: Loss | None = None, processes: int = 1
) -> plan.Plan:
    """The plan of a resolved configuration for one of ``processes``, whose own ``train.grad_accumulation`` it states.
    ``loss``: the one it will use, where that is known already."""
    model, optimizer = on_paper(config, vocabulary, processes)
    if vocabulary.labels is not None:
        loss = classify.rehearsal_loss(vocabulary.labels.outputs)
    elif loss is None:
        loss = chunked_loss if can_be_chunked(model) else summed_loss
    low, train = config.lowrank, config.train
    step = Step(
        loss=loss,
        micro_batch_size=train.micro_batch_size,
        sequence_length=config.data.sequence_length,
        masked=vocabulary.labels is not None or config.data.document_attention == "isolated",
        staggered=low.stagger,
        due_together=layers_at_once(
            low.policy, sum(tensor.projected for tensor in optimizer.tensors), low.update_proj_gap
        ),
        micro_batches=train.grad_accumulation,
        device=device,
        layer_major=train.order != "batch_major",
        slots=config.memory.slots if config.memory.streams else 0,
        state_streamed=config.memory.stream == "all",
        clips=train.clip_grad_norm > 0,
    )
    outside = {"CUDA context (assumed)": plan.CUDA_CONTEXT}
    if device == "cpu":
        outside = {"this process so far": machine.resident_set()}
    if shares_of(config, processes) > 1:
        outside["gathered blocks"] = gathered(model)
    if config.model.compile == "blocks":
        outside["gradients of a compiled block"] = compiled_gradients(model, ordinary_leaf(config))
    # How many steps there are changes nothing here, and epochs only come to steps once the data are known.
    how = replace(settings.of_steps(with_steps(config, 1)), grad_accumulation=train.grad_accumulation * processes)

    def order(layout: Layout | None) -> Order:
        # Blocks that are gathered are counted above, outside the rehearsal.
        return order_of(config, model, optimizer, layout, how, AlwaysThere())

    return plan.plan(model, optimizer, step, train.stepping, order, outside)


def compiled_gradients(model: torch.nn.Module, leaf: str | None) -> int:
    """Bytes of all gradients of the largest block: a compiled one hands them out together."""
    sizes = [0]
    for block in blocks_of(model):
        leaves = [value for m in block.modules() if isinstance(m, LowRankLinear) for value in m.leaves().items()]
        other = {id(value) for name, value in leaves if name != leaf}
        wanted = [p for p in block.parameters() if p.is_floating_point() and id(p) not in other]
        sizes.append(sum(p.numel() * p.element_size() for p in wanted))
    return max(sizes)
