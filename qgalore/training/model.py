"""The model of a run, converted and on its device, and its optimizer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import METHODS, RULES, Config
from ..errors import ConfigError, counted
from ..lowrank.factory import optimizer
from ..lowrank.inner.checked import BUILTIN
from ..lowrank.layers import lora
from ..lowrank.layers.linear import LowRankLinear
from ..lowrank.optimizer import LowRankOptimizer
from ..models import classify, loading, streaming
from ..models.causality import check_causal
from ..models.compiling import blocks_of, compile_blocks
from ..models.convert import ConversionReport, convert
from ..models.loss import Loss, balance_weight, check_isolation, choose_loss, chunked_loss, uncalled_layers
from ..models.recompute import checkpoint_blocks
from ..parallel import ALONE, Team
from . import split
from .attending import attend_as
from .fusing import fuse_as
from .say import say
from .vocabulary import Vocabulary, check_added, may_grow, rows_wanted, say_rows


def architecture(config: Config, vocabulary: Vocabulary, report: Callable[[str], None]) -> nn.Module:
    """The unconverted model on the meta device. Raises :class:`ConfigError` if there is none, or one too small."""
    section = config.model
    dtype = getattr(torch, section.dtype)
    if vocabulary.labels is not None:
        model = _classifier(config, vocabulary, report)
    elif section.path is not None:
        folder = loading.local_folder(section.path)
        model = loading.pretrained_skeleton(folder, dtype=dtype, report=report, overrides=section.overrides)
        model = with_rows(config, vocabulary, model, report)
    else:
        shape = loading.model_config(
            section.config,
            tokenizer_size=vocabulary.size,
            overrides=section.overrides,
            report=lambda line: report(line.removeprefix("model: ")),
        )
        ends = vocabulary.eos if config.data.task == "text" else None  # it stands between documents
        loading.check_vocabulary(shape, ends or 0, vocabulary.size)
        vocab = shape.get_text_config().vocab_size
        check_added(vocabulary, vocab)
        special = (None if token is None or token >= vocab else token for token in (vocabulary.bos, vocabulary.eos))
        shape.bos_token_id, shape.eos_token_id = special
        shape.pad_token_id = None  # its row would get no gradient, and packed data has no padding
        model = loading.skeleton(shape, dtype=dtype)
    loading.check_positions(model, config.data.sequence_length, pretrained=section.path is not None)
    if vocabulary.labels is None and (first := loading.first_position(model)):
        raise ConfigError(
            f"{type(model).__name__} counts positions from {first}, and packed text counts them from 0. "
            "Start from another decoder, or use this model with data.task=classify"
        )
    return model


def _classifier(config: Config, vocabulary: Vocabulary, report: Callable[[str], None]) -> nn.Module:
    section = config.model
    if section.path is not None:
        folder = loading.local_folder(section.path)
        shape = loading.pretrained_config(folder, section.overrides, report=report, auto=classify.AUTO)
        before = loading.skeleton(shape, dtype=getattr(torch, section.dtype), auto=classify.AUTO)
        shape = with_rows(config, vocabulary, before, report, auto=classify.AUTO).config
    else:
        given = {"tokenizer_size": vocabulary.size, "overrides": section.overrides}
        shape = loading.model_config(section.config, **given, report=lambda line: None)
    loading.check_vocabulary(shape, vocabulary.padding or 0, vocabulary.size, pretrained=section.path is not None)
    classify.configure(shape, vocabulary.labels.names, vocabulary.padding)
    return loading.skeleton(shape, dtype=getattr(torch, section.dtype), auto=classify.AUTO)


def with_rows(
    config: Config, vocabulary: Vocabulary, model: nn.Module, report: Callable[[str], None], **auto: type
) -> nn.Module:
    """``model``, a pretrained one on the meta device, with rows for all entries that shall have some."""
    if not may_grow(config):
        return model
    rows = loading.rows_of(model.config)
    grown, names = loading.grown(model, rows_wanted(config, vocabulary, rows), **auto)
    say_rows(config, vocabulary, rows, names, report)
    return grown


def source_of(config: Config, model: nn.Module) -> streaming.Source:
    """Where the tensors of :func:`architecture`'s model come from."""
    report = partial(say, "model")
    seed, classifier = config.run.seed, config.data.task == "classify"
    if config.model.path is None:
        auto = {"auto": classify.AUTO} if classifier else {}
        return loading.fresh_source(model, seed=seed, report=report, **auto)
    if classifier:
        return classify.stored_source(loading.local_folder(config.model.path), model, seed=seed, report=report)
    return loading.stored_source(loading.local_folder(config.model.path), model, report=report)


def convert_as(config: Config, model: nn.Module) -> ConversionReport | None:
    """Convert ``model`` in place as the method says; None for a method that trains every tensor in full."""
    if not METHODS[config.method][0]:
        return None
    low = config.lowrank
    stored = low.rank != "full" and RULES[low.rule].uses_basis and config.method != "lora"
    auto = {"max_rank": low.max_rank, "mean_rank": low.mean_rank} if low.rank == "auto" else {}
    return convert(
        model,
        rank=low.rank if stored else None,
        **auto,
        proj_type=low.proj_type,
        weight_format=low.weight_format,
        group_size=low.group_size,
        basis_format=low.basis_format,
        grad_dtype=getattr(torch, low.grad_dtype),
        include=low.include,
        exclude=low.exclude,
        embeddings=low.embeddings,
        compute=config.model.compute,
    )


def adapt_as(config: Config, model: nn.Module) -> None:
    """Give a converted model LoRA's factors, if the method asks for them. Its weights are in place by then, or meta."""
    if config.method == "lora":
        low = config.lowrank
        lora.attach(
            model, rank=low.rank, alpha=low.alpha, dtype=getattr(torch, config.model.dtype), seed=config.run.seed
        )


def checkpoint_as(config: Config, model: nn.Module) -> None:
    """Activation checkpointing as asked."""
    asked = config.train.activation_checkpointing
    if asked is not False:
        but_last = asked if isinstance(asked, int) and asked is not True else 0
        checkpoint_blocks(model, "host" if asked == "offload" else "device", but_last)


def ordinary_leaf(config: Config) -> str | None:
    """The leaf of low-rank layers that wants a gradient in a step without a refresh."""
    if config.method == "lora":
        return None
    return "delta" if rule_of(config) == "galore" else "probe"


def compile_as(config: Config, model: nn.Module) -> None:
    """Compile the blocks of a built model, if that is asked for."""
    if config.model.compile == "blocks":
        count = compile_blocks(model, ordinary_leaf(config))
        say("compile", f"{count} blocks, at the first step without a refresh in them; evaluation is not compiled")


def build_model(
    config: Config,
    vocabulary: Vocabulary,
    highest_id: int,
    device: torch.device,
    team: Team = ALONE,
    place: Callable[[nn.Module, torch.device], None] = streaming.allocate,
) -> tuple[nn.Module, Loss]:
    """The model in its dtype, converted as the method says, on the device, made tensor by tensor, split over ``team``
    if that is asked; and its loss. ``place`` gives it memory, which may be elsewhere for a part."""
    model = architecture(config, vocabulary, partial(say, "model"))
    source = source_of(config, model)
    pretrained, note = config.model.path is not None, partial(say, "note")
    loading.check_vocabulary(model.config, highest_id, vocabulary.size, pretrained=pretrained, report=note)
    if config.data.task != "classify" and (row := loading.untie_padding(model)) is not None:
        say("note", f"the embedding row of the padding token, {row}, trains like any other here")
    report = convert_as(config, model)
    if (line := attend_as(config, model)) is not None:
        say("attention", line)
    if report is None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        tensors = counted(len(parameters), "tensor")
        say("model", f"{sum(p.numel() for p in parameters):,} values in {tensors}, all trained in full")
    else:
        print(report, flush=True)
        if config.method == "lora":
            frozen = counted(len(report.converted), "weight is", "weights are")
            say("model", f"LoRA: {frozen} frozen; factors of rank {config.lowrank.rank} train")
    mesh = split.mesh_for(config, team, device)
    if mesh is not None:
        split.split_blocks(model, mesh, on_host=config.memory.streams)
    place(model, device)
    if anew := streaming.fill(model, source, "model"):
        many = counted(
            len(anew), "int8 weight has other groups here and is", "int8 weights have other groups here and are"
        )
        say("note", f"{many} quantized anew, for example {anew[0]}")
    if (line := fuse_as(config, model, device)) is not None:
        say("kernels", line)
    adapt_as(config, model)
    checkpoint_as(config, model)
    model.eval()
    if uncalled := uncalled_layers(model, LowRankLinear):
        names = ", ".join(uncalled[:5])
        many = counted(len(uncalled), "converted layer was", "converted layers were")
        say("note", f"{many} not called in a trial forward pass: {names}")
    loss = _loss_of(config, model)
    if mesh is not None:
        split.split_outside(model, blocks_of(model), mesh)
    return model, loss


def _loss_of(config: Config, model: nn.Module) -> Loss:
    """The loss of a built model, which is tried on it."""
    if config.data.task == "classify":
        return classify.classification_loss
    check_causal(model)
    if (line := balance_line(model)) is not None:
        say("loss", line)
    if config.data.document_attention == "isolated":
        check_isolation(model, config.data.sequence_length)
    loss = choose_loss(model)
    if loss is not chunked_loss:
        say("note", f"{type(model).__name__} changes its head's output: the loss keeps all logits at once")
    return loss


def balance_line(model: nn.Module) -> str | None:
    """What is done about a mixture's load-balancing loss; None for a model without one."""
    unused = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    if weight := balance_weight(model):
        return f"cross entropy + {weight:g} · the routers' load-balancing loss, in training alone"
    if unused is None:
        return None
    return (
        f"the load-balancing loss (router_aux_loss_coef {unused:g}) is not used, for output_router_logits is false; "
        "model.overrides.output_router_logits=true adds it"
    )


def rule_of(config: Config) -> str:
    """The rule of the low-rank layers; ``galore`` where there are none."""
    return config.lowrank.rule if METHODS[config.method][0] and config.method != "lora" else "galore"


def rule_rank(config: Config) -> int | None:
    """The rank that the rule itself works with, if it does not take that of stored bases."""
    return config.lowrank.rank if rule_of(config) == "apollo" else None


def rule_momentum(config: Config) -> dict[str, Any]:
    """``momentum`` and ``mu`` if the rule has them."""
    read = RULES[rule_of(config)].reads
    return {name: getattr(config.lowrank, name) for name in ("momentum", "mu") if name in read}


def optimizer_options(config: Config) -> dict[str, Any]:
    """Arguments of ``lowrank.factory.optimizer``."""
    train, low = config.train, config.lowrank
    options = {"betas": train.betas, "eps": train.eps} if train.optimizer in BUILTIN else {}
    merge = ("weight_rounding", "weight_scales")
    subspace = ("projector", "policy", "moments", "energy")
    schedule = ("update_proj_gap", "cos_threshold", "gamma_proj", "queue_size", "max_gap", "stagger")
    return {
        "lr": train.lr,
        "weight_decay": train.weight_decay,
        "inner": train.optimizer,
        "inner_options": train.optimizer_options,
        "rule": rule_of(config),
        "rank": rule_rank(config),
        **rule_momentum(config),
        "full_gradients": train.full_gradients,
        "clip_update_rms": train.clip_update_rms,
        "seed": config.run.seed,
        **options,
        **{name: getattr(low, name) for name in (*schedule, *merge, *subspace, "scale")},
    }


def build_optimizer(config: Config, model: nn.Module, stepping: str, team: Team = ALONE) -> LowRankOptimizer:
    """The optimizer over every trainable tensor of ``model``. ``stepping``: ``manual`` where a walk steps them."""
    options = {"stepping": stepping, "team": team, "dense": not METHODS[config.method][0]}
    return optimizer(model, **optimizer_options(config), **options)


def stepping_line(config: Config) -> str:
    train = config.train
    if train.order != "batch_major":
        walked = "layer-major steps: each block's tensors step when their gradients are there, and free them"
        return walked if train.order == "layer_major" else f"{walked} (where the model can be walked)"
    if train.stepping == "fused":
        return "fused stepping: each tensor steps inside backward and its gradient is freed at once"
    asked = [f"grad_accumulation {train.grad_accumulation}"] if train.grad_accumulation > 1 else []
    asked += [f"clip_grad_norm {train.clip_grad_norm:g}"] if train.clip_grad_norm > 0 else []
    return f"deferred stepping ({' and '.join(asked) or 'as asked'}): gradients are kept until the step"
