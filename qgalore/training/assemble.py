"""From a configuration to objects that run: the only room that knows everyone."""

import json
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import config as configuration
from ..config import Config
from ..convergence import live
from ..errors import ConfigError, counted
from ..lowrank.inner import checked
from ..memory import plan as memory_plan
from ..models.compiling import check_compiler
from ..models.loading import local_folder
from ..models.presets import PRESETS
from ..models.sample import prompt_ids
from ..parallel import ALONE, Team
from ..parallel.environment import on_this_machine
from ..quant import dispatch, int8_products
from . import classification, tracking
from . import loop_settings as settings
from . import preview as previews
from .checks import check_data, check_model
from .cluster import Machines
from .data import Data as BuiltData
from .data import build_data, build_tokenizer, given_tokenizer
from .export import check_formats, export, export_checkpoint, finish, mark_ends, restore_model
from .fit import prepare_allocator, recheck, settle
from .fusing import check_fusing
from .loop import Loop
from .model import Vocabulary, build_model, build_optimizer, compile_as, stepping_line
from .paper import has_weights, shape
from .parts import Samples
from .resume import describe, ending, enter
from .roofline import line_of
from .run_lock import RunLock
from .say import say
from .starting import decide
from .streamed import Placing
from .trial import order_of, try_layer_major
from .vocabulary import may_grow

__all__ = ["Run", "build", "ending", "export", "export_checkpoint", "finish", "plan", "preview", "restore_model"]


@dataclass
class Run:
    """A built run: its folder, its ``loop``, ready to go on from where a checkpoint left it, and what is exported."""

    config: Config
    folder: Path
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    valid: Samples
    planned: memory_plan.Plan
    loop: Loop
    lock: RunLock | None = None  # of the folder; it lasts as long as this object


def choose_device(config: Config) -> torch.device:
    """The device asked for. Raises :class:`ConfigError` if it is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but PyTorch sees no CUDA device here; set device=cpu or device=auto")
    name = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _resolved(config: Config, device: torch.device, processes: int) -> Config:
    bf16 = device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported())
    return configuration.resolve(config, device.type, bf16, processes)


def plan(config: Config, processes: int = 1, machines: Machines | None = None) -> None:
    """Print the memory plan of ``config`` for each of ``processes`` without allocating anything, and what they send, in
    ``machines`` that are assumed. Raises :class:`DoesNotFitError`. Without a GPU here, a configuration that states its
    ``memory.budget`` is planned for one, unless device is cpu."""
    here = torch.cuda.is_available()
    if config.device != "cpu" and not here and config.memory.budget is not None:
        device = torch.device("cuda")
        say("note", f"planned for a CUDA device of {config.memory.budget}; there is none here")
    else:
        device = choose_device(config)
    section = config.model
    stated = Path(section.config).exists() if section.path is None else not may_grow(config)
    stated = stated or "vocab_size" in {**section.overrides, **PRESETS.get(section.config, {})}
    rows = section.overrides.get("vocab_size", 1)  # a folder's config.json has its own
    vocabulary = Vocabulary(rows, None, None)
    if not stated:
        tokenizer = build_tokenizer(config, given_tokenizer(config))
        vocabulary = Vocabulary.of(tokenizer, config.data.added_tokens)
    if config.data.task == "classify":
        vocabulary = replace(vocabulary, labels=classification.PLANNED)
    elif section.path is not None and not has_weights(local_folder(section.path)):
        say("note", f"{section.path} holds no weights yet; the plan is made from its config.json alone")
    remarks = configuration.remarks(config)
    config = _resolved(config, device, processes)
    say("optimizer", f"{checked.describe(config.train.optimizer, device)}, {stepping_line(config)}")
    for remark in remarks:
        say("note", remark)
    if section.path is not None and (section.overrides or may_grow(config)):
        shape(config, vocabulary, partial(say, "model"))
    chosen, found = settle(config, vocabulary, device, processes, machines or Machines())
    if device.type == "cuda" and processes == 1:
        say("speed", line_of(chosen, vocabulary, found.total))


def preview(config: Config, count: int) -> None:
    """Print the first ``count`` rows that a run of ``config`` trains on. The data are prepared as the run's are."""
    device = choose_device(config)
    for remark in configuration.remarks(config):
        say("note", remark)
    config = _resolved(config, device, 1)
    if config.train.restart_schedule and config.data.tokenizer is None and config.model.path is None:
        say("note", "the run takes the tokenizer of the run before it; name that one as data.tokenizer to see its rows")
    tokenizer = _checked_tokenizer(config, device, ALONE)
    examples, _ = _words(config, tokenizer)
    data = _data(config, tokenizer, examples, date.today(), ALONE).train
    order = settings.sample_order(data, config.run.seed)
    shown = previews.of_text(tokenizer) if examples is None else previews.of_examples(tokenizer, examples.labels)
    colours = previews.on_terminal()
    for line in previews.rows(data, order, count, shown):
        print(previews.coloured(line) if colours else line)


def _announce(config: Config, folder: Path, device: torch.device, team: Team, remarks: list[str]) -> None:
    say("run", f"{folder} | method {config.method} | {device.type}, {config.model.dtype}")
    if team.size > 1:
        part = f"{config.train.grad_accumulation // team.size} of {config.train.grad_accumulation} micro-batches each"
        mesh = config.parallel.over(team.size)
        holds = "its rows of all matrices, and the state of those that it owns," if mesh.splits else "the model"
        say("parallel", f"{team.size} processes, {config.parallel}: each holds {holds} and takes {part} in a step")
        on_each = on_this_machine(team.size)
        if on_each is not None and mesh.replicas > 1 and mesh.crosses(on_each):
            say(
                "note",
                f"parallel: {mesh} splits a copy over machines, which have {counted(on_each, 'process', 'processes')} "
                "each. Its weights travel between them; a shard that divides this number keeps them inside",
            )
    elif config.parallel != configuration.Mesh():
        say("note", f"parallel: {config.parallel} has no effect in one process")
    say("optimizer", f"{checked.describe(config.train.optimizer, device)}, {stepping_line(config)}")
    for remark in remarks:
        say("note", remark)


def _check_device(config: Config, device: torch.device) -> None:
    """Choose the kernels. Raises :class:`ConfigError` if the device cannot do what ``config`` asks of it."""
    dispatch.use(config.kernels, device)
    if config.model.compute == "int8":
        int8_products.check(device)
    if config.model.compile == "blocks":
        check_compiler(device)
    check_fusing(config, device)


def _checked_tokenizer(
    config: Config, device: torch.device, team: Team, kept: Path | None = None
) -> PreTrainedTokenizerBase:
    """The run's tokenizer, ``kept`` by the run before if there is one, after a look at the device, the data and the
    model."""
    _check_device(config, device)
    check_data(config)
    given = given_tokenizer(config, kept)
    check_model(config, given)
    tokenizer = team.after_first("the tokenizer", lambda: build_tokenizer(config, given))
    if config.sample.prompt is not None:
        prompt_ids(tokenizer, config.sample.prompt, config.data.sequence_length, config.data.task)
    return tokenizer


def _words(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[classification.LabelledData | None, Vocabulary]:
    """The examples of a classifier, and what shapes the model beside its configuration."""
    examples = classification.read(config, tokenizer) if config.data.task == "classify" else None
    tokens = Vocabulary.of(tokenizer, config.data.added_tokens)
    return examples, tokens if examples is None else examples.vocabulary(tokens)


def _make_ready(config: Config, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Bring a built ``model`` to where it can be trained and exported as ``config`` says."""
    mark_ends(config, model, tokenizer)
    check_formats(model, tokenizer, config.export.formats)
    compile_as(config, model)


def _enter(config: Config, resume: str | None, team: Team) -> tuple[Path, RunLock | None, tracking.Wanted]:
    """The run's folder, its lock, and the trackers asked for, whose packages are imported first."""
    trackers = live.make(config.tracking if team.leads else [])
    folder, lock = enter(config, resume, team)
    return folder, lock, tracking.Wanted(trackers, folder)


def build(config: Config, resume: str | None, team: Team = ALONE) -> Run:
    """Build everything for ``config``, in each process of ``team``; ``resume`` is None, "auto" or a checkpoint."""
    device = choose_device(config)
    remarks = configuration.remarks(config)
    config = _resolved(config, device, team.size)
    folder, lock, tracked = _enter(config, resume, team)
    config, begin = decide(config, folder, resume, team)
    _announce(config, folder, device, team, remarks)

    # What can be known to be wrong is said before anything is tokenized or built.
    tokenizer = _checked_tokenizer(config, device, team, begin.tokenizer)
    begin.check_tokens(tokenizer)
    examples, vocabulary = _words(config, tokenizer)
    config, planned = settle(config, vocabulary, device, team.size)
    prepare_allocator(config, device, planned)

    day = _day(begin.past, team)
    data = _data(config, tokenizer, examples, day, team)
    begin.check_bytes(data.checksum)
    place = Placing(config)
    model, loss = build_model(config, vocabulary, data.highest_id, device, team, place)
    _make_ready(config, model, tokenizer)

    # A trial decides in which order steps are taken. The plan is made again if that is not the order asked for.
    asked = config.train.order
    config, layout = try_layer_major(config, model, loss, data.train, device, team)
    planned = recheck(config, vocabulary, device, loss, planned, team.size, again=config.train.order != asked)
    config = _with_steps(config, len(data.train))
    optimizer = build_optimizer(config, model, config.train.stepping if layout is None else "manual", team)
    place.adopt(model, optimizer, layout)
    where = {"folder": folder, "data": data.description, "max_steps": config.train.steps}
    start = begin.position(model=model, optimizer=optimizer, team=team, **where)
    place.collect()
    order = order_of(config, model, optimizer, layout, settings.of_steps(config), place.stream)
    loop = Loop(
        model=model,
        loss=loss,
        optimizer=optimizer,
        device=device,
        data=settings.of_data(config, data, examples, loss, team, place.losses(order)),
        stepping=settings.of_steps(config),
        evaluating=settings.of_evaluations(config),
        saving=settings.of_checkpoints(config, folder, _run_state(config, model, data, day), planned, device),
        faults=settings.of_faults(config, planned),
        order=order,
        start=start,
        team=team,
    )
    numbers = {**planned.numbers(), "max_steps": config.train.steps}
    describe(folder, config, numbers, model, tokenizer, team)
    loop.course.tracking = tracked.of(config.run.name, start.step, {**config.model_dump(mode="json"), "plan": numbers})
    return Run(config, folder, model, tokenizer, next(iter(data.valid.values())), planned, loop, lock)


def _with_steps(config: Config, samples: int) -> Config:
    """``config`` with its length in steps, now that the number of training ``samples`` is known."""
    config = configuration.with_steps(config, samples)
    train = config.train
    if train.epochs is not None:
        drawn = counted(train.micro_batch_size * train.grad_accumulation, "sample")
        epochs = f"{train.epochs:g} {'epoch is' if train.epochs == 1 else 'epochs are'}"
        say("steps", f"{epochs} {counted(train.steps, 'step')} of {drawn}")
    if train.warmup_ratio is not None:
        say("steps", f"the warm-up takes {counted(train.warmup_steps, 'step')} of {train.steps:,}")
    if configuration.asked(config) != config:  # lengths that the configuration's own remarks could not know
        for remark in configuration.never_warm(config):
            say("note", remark)
    return config


def _data(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    examples: classification.LabelledData | None,
    day: date,
    team: Team,
) -> BuiltData:
    """What the run trains on and is evaluated with. The first process of ``team`` prepares it for all."""
    make = examples.data if examples is not None else lambda: build_data(config, tokenizer, day)
    return team.after_first("the data", make)


def _run_state(config: Config, model: nn.Module, data: BuiltData, day: date) -> dict[str, Any]:
    """What every checkpoint says of its run, beside the position."""
    return {
        "config": configuration.asked(config).model_dump(mode="json"),
        "data": data.description,
        "data_checksum": data.checksum,
        "day": day.isoformat(),
        "model_config": json.loads(model.config.to_json_string(use_diff=False)),
        "torch": torch.__version__,
    }


def _day(saved: dict[str, Any] | None, team: Team) -> date:
    """The date that a chat template writes in this run: that of its beginning, the same for all of ``team``."""
    stated = team.of_first("the date", lambda: (saved or {}).get("day") or date.today().isoformat())
    return date.fromisoformat(stated)
