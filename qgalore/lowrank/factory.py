"""Making the optimizer of a converted model: its options checked, its tensors found."""

import sys
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError, counted
from ..parallel import ALONE, Team, shards
from .inner import checked as inner_optimizers
from .layers.experts import Experts
from .layers.linear import LowRankLinear
from .layers.lora import LoraLinear
from .optimizer import LowRankOptimizer
from .options import InnerSteps, check_choices, check_limit, check_numbers, require, schedule_options
from .rules import GALORE, RULES, RuleOptions, check_momentum, default_scale, fused
from .rules import check as check_rule
from .rules.common import MOMENTUM, MU
from .subspace.policies import make_schedules
from .subspace.refresh import RefreshOptions
from .subspace.schedule import Schedule
from .tensors.adaptive import AdaptiveTensor
from .tensors.base import TrainedTensor
from .tensors.dense import DenseTensor
from .tensors.projected import ProjectedTensor
from .tensors.splitting import deal, set_down
from .tensors.whole import WholeTensor

PART_ELEMENTS = 1 << 24  # 64 MiB of fp32 scratch; larger tensors step in parts, which elementwise rules do not notice


def _refuse_several_processes(team: Team) -> None:
    """Raise :class:`ConfigError` in a job that is not ``team``: DistributedDataParallel notes which parameters train
    when it is built and would leave out each Δ whose probe is on at that time, so the copies would part silently."""
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_world_size() != team.size:
        raise ConfigError(
            f"torch.distributed has {group.get_world_size()} processes, and the low-rank optimizer was made for "
            f"{team.size}: start the program without torchrun or accelerate launch, or pass team=qgalore.parallel.Team("
            "rank, size) and let every process take its share of the micro-batches (train.py does)"
        )


def part_elements(inner: str | type[Optimizer]) -> int:
    """The size above which a tensor steps in parts: an optimizer that looks at a matrix as one (Adafactor) must see it
    whole."""
    return PART_ELEMENTS if inner in inner_optimizers.BUILTIN else sys.maxsize


def is_frozen(layer: LowRankLinear) -> bool:
    """Whether the layer was frozen after ``convert``, which leaves Δ listening: an int8 weight has no such mark."""
    return not any(leaf.requires_grad for leaf in layer.leaves().values())


def stepped_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The layers whose weights are stepped: neither those of LoRA, whose factors are ordinary parameters, nor frozen
    ones."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, LowRankLinear))
    return {name: m for name, m in found if not isinstance(m, LoraLinear) and not is_frozen(m)}


def _tell_of_layers(model: nn.Module, dense: bool) -> None:
    """Print which layers are frozen. Raises :class:`ConfigError` for a model without any low-rank layer."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if not layers and not dense:
        raise ConfigError(
            f"{type(model).__name__} has no low-rank layer, so that every weight would be trained in full. Call "
            "qgalore.convert(model, rank=…) first, or pass dense=True if that is what you want"
        )
    frozen = [name for name, module in layers.items() if not isinstance(module, LoraLinear) and is_frozen(module)]
    if frozen:
        many = counted(len(frozen), "frozen layer keeps its weights", "frozen layers keep their weights")
        print(f"note: {many}, for example {frozen[0]}", flush=True)


def trained_tensors(
    model: nn.Module,
    *,
    update_proj_gap: int,
    stagger: bool,
    lazy: dict[str, Any],
    find: RefreshOptions,
    rule: str,
    of_rule: RuleOptions,
) -> list[TrainedTensor]:
    """All trained tensors of a converted model, the weights of its low-rank layers first."""
    modules = stepped_layers(model)
    schedules = make_schedules(find.policy, len(modules), update_proj_gap, stagger, lazy)
    found: list[TrainedTensor] = [
        _of_layer(name, index, module, schedules[index], find, rule, of_rule, getattr(model, "config", None))
        for index, (name, module) in enumerate(modules.items())
    ]
    _tell_of_clamped_ranks(found, of_rule)
    owned = {id(leaf) for module in modules.values() for leaf in module.leaves().values()}
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in owned]
    for name, parameter in trainable:
        allowed = (torch.float32, torch.bfloat16)
        require(parameter.dtype in allowed, f"the dtype of {name}", parameter.dtype, "float32 or bfloat16")
    return found + [DenseTensor(name, len(found) + i, p) for i, (name, p) in enumerate(trainable)]


def _of_layer(
    name: str,
    index: int,
    module: LowRankLinear,
    schedule: Schedule,
    find: RefreshOptions,
    rule: str,
    of_rule: RuleOptions,
    config: Any,
) -> ProjectedTensor:
    if rule != GALORE:
        module.row_parts = fused.rows_of_parts(name, len(module.weight), config)
        tensor = WholeTensor(name, index, module, schedule, find, RULES[rule](module, index, of_rule))
        if shards.is_shared(module.weight):
            set_down(tensor)  # before the next one is made, so that the state of all never exists together
        return tensor
    kind = ProjectedTensor if module.max_rank is None else AdaptiveTensor
    return kind(name, index, module, schedule, find)


def _tell_of_clamped_ranks(tensors: list[TrainedTensor], of_rule: RuleOptions) -> None:
    clamped = [(t.name, rank) for t in tensors if (rank := t.clamped_rank()) is not None]
    if clamped:
        name, rank = clamped[0]
        print(
            f"note: rank {of_rule.rank} is above the smaller side of {counted(len(clamped), 'layer')}, for example "
            f"{name}; {rank} is used there",
            flush=True,
        )


def _are_split(modules: dict[str, LowRankLinear], stepping: str) -> bool:
    """Whether processes hold rows of the layers' weights. Raises :class:`ConfigError` if these cannot be stepped so."""
    if not any(shards.is_shared(module.weight) for module in modules.values()):
        return False
    require(stepping == "manual", "stepping", stepping, "'manual' where processes hold rows of the weights")
    return True


def _tell_of_rounding(find: RefreshOptions, int8_layers: list[LowRankLinear]) -> None:
    if (find.rounding, find.scales) != ("stochastic", "sticky") and not int8_layers:
        print("note: weight_rounding and weight_scales have no effect: no int8 weight is stepped", flush=True)
    elif find.rounding == "nearest":
        print("note: weight_rounding 'nearest' discards every change below half an int8 step", flush=True)


def _tell_of_moments(moments: str, modules: dict[str, LowRankLinear]) -> None:
    if moments == "keep" and any(module.max_rank is not None for module in modules.values()):
        print("note: moments 'keep' cannot be kept where a rank changes: that layer's begin again there", flush=True)


def _bind(made: LowRankOptimizer, model: nn.Module, modules: dict[str, LowRankLinear]) -> None:
    """Tell the layers that ``made`` steps them, and let it hear of experts without tokens."""
    for guard in (module.guard for module in modules.values()):
        if guard is not None:
            guard.held_by(made)
    if made.team.size > 1:
        made.watch(module for module in model.modules() if isinstance(module, Experts))


def optimizer(
    model: nn.Module,
    *,
    lr: float,
    rule: str = "galore",
    rank: int | None = None,
    momentum: str | None = None,
    mu: float | None = None,
    weight_decay: float = 0.0,
    scale: float | None = None,
    inner: str | type[Optimizer] = "adamw8bit",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    inner_options: dict[str, Any] | None = None,
    stepping: str = "deferred",
    full_gradients: str = "free",
    clip_update_rms: float = 0.0,
    update_proj_gap: int = 200,
    cos_threshold: float | None = None,
    gamma_proj: float = 2.0,
    queue_size: int = 5,
    max_gap: int | None = None,
    stagger: bool = True,
    projector: str = "randomized",
    policy: str = "overlap",
    moments: str = "rotate",
    weight_rounding: str = "stochastic",
    weight_scales: str = "sticky",
    energy: float = 0.9,
    seed: int = 0,
    team: Team = ALONE,
    dense: bool = False,
) -> LowRankOptimizer:
    """The Q-GaLore optimizer for a model prepared by ``qgalore.convert`` (unconverted tensors train dense).

    A layer whose parameters are given ``requires_grad_(False)``, before this call or after it, keeps its weights.

    Steps of low-rank layers are ``W ← W(1 − lr·weight_decay) + scale · L Δ R̂ᵀ`` with Δ the inner optimizer's step.

    rule: ``galore``, or one that needs the full gradient in every step: ``apollo`` (with ``rank``, of its random
      projection), ``apollo_mini``, ``scale``, ``fira``, ``muon``, ``sinkgd`` (see ``rules``). ``scale`` None: the
      rule's own. ``momentum`` and ``mu`` are of ``muon``: ``4bit`` (None) | ``8bit`` | ``bf16`` | ``fp32``, and the
      share of the old momentum in the new, 0.8 if it is None.
    full_gradients: ``keep`` lets such a rule step deferred, which keeps all full gradients at once.
    clip_update_rms: under such a rule, the largest root mean square of a matrix's update before ``lr``; 0 for no limit.
    inner: ``adamw8bit`` (bitsandbytes; our own on a CPU), ``adamw4bit``, ``adamw``, or any ``torch.optim.Optimizer``
      class or dotted path whose step does not depend on the parameter's value (checked); ``betas`` and ``eps`` go to
      the three named ones, others take ``inner_options``.
    stepping: ``deferred``, ``fused`` or ``manual`` (see ``optimizer``). Fused refuses accumulation and cannot clip the
      global norm. Manual has no hooks: the caller steps each tensor when its gradient is complete.
    update_proj_gap, cos_threshold, gamma_proj, queue_size, max_gap: the lazy schedule, in optimizer steps. Where None,
      ``max_gap`` and ``cos_threshold`` follow from the gap and the policy (``schedule_defaults``); a threshold above 1
      never stretches a gap.
    stagger: spread the refreshes after the first over the gap; projector: ``randomized`` | ``exact``;
    team: the processes that train this model together: gradients are sums over them, bases and steps the same in all;
      the loss of each must be its share of the whole batch's.
    policy: when to refresh, ``overlap`` | ``first_vector`` | ``signed_cosine`` | ``energy`` | ``fixed`` (see
      ``subspace.policies``); moments: ``rotate`` | ``keep`` | ``reset``;
    weight_rounding: of int8 weights at a merge, ``stochastic`` | ``nearest``, a negative control;
    weight_scales: ``sticky`` | ``rederived`` at every merge, as published (see ``quant.int8``).
    energy: the share of a gradient's energy that a layer's rank keeps, where the model was converted with rank="auto".
    dense: accept a model that was never converted, and train all of it in full.

    Raises :class:`ConfigError` for bad values, for an optimizer that cannot work on Δ, and if nothing is trainable.
    """
    _refuse_several_processes(team)
    check_choices(
        stepping=stepping,
        projector=projector,
        policy=policy,
        moments=moments,
        weight_rounding=weight_rounding,
        weight_scales=weight_scales,
    )
    check_numbers(lr=lr, update_proj_gap=update_proj_gap, queue_size=queue_size, energy=energy, gamma_proj=gamma_proj)
    lazy = schedule_options(policy, update_proj_gap, cos_threshold, gamma_proj, queue_size, max_gap)
    steps = InnerSteps.of(inner, lr, betas, eps, inner_options or {})
    find = RefreshOptions(
        projector,
        policy,
        moments,
        seed=seed,
        team=team,
        rounding=weight_rounding,
        scales=weight_scales,
        energy=energy,
    )
    _tell_of_layers(model, dense)
    modules = stepped_layers(model)
    _tell_of_rounding(find, [m for m in modules.values() if m.weight_scale is not None])
    check_rule(rule, rank, stepping, full_gradients, modules)
    check_momentum(rule, momentum, mu, modules)
    check_limit(rule, clip_update_rms)
    _tell_of_moments(moments, modules)
    of_rule = RuleOptions(rank, update_proj_gap, seed, momentum or MOMENTUM, MU if mu is None else mu, clip_update_rms)
    tensors = trained_tensors(
        model, update_proj_gap=update_proj_gap, stagger=stagger, lazy=lazy, find=find, rule=rule, of_rule=of_rule
    )
    require(bool(tensors), "the model's trainable tensor count", 0, "at least 1: nothing would be trained")
    steps.check(tensors, rotates=moments == "rotate")
    if _are_split(modules, stepping):
        deal(tensors, team, steps.factory)
    made = LowRankOptimizer(
        tensors,
        lr=lr,
        weight_decay=weight_decay,
        scale=default_scale(rule) if scale is None else scale,
        factory=steps.factory,
        stepping=stepping,
        seed=seed,
        part_elements=part_elements(inner),
        team=team,
    )
    _bind(made, model, modules)
    return made
