"""From a configuration to objects that run: the only room that knows everyone."""

import json
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import config as configuration
from ..config import Config
from ..data.order import SampleOrder
from ..errors import ConfigError
from ..evaluation.loss import evaluate
from ..lowrank.inner import checked
from ..memory import plan as memory_plan
from ..models.compiling import check_compiler
from ..models.loading import local_folder
from ..models.loss import Loss, target_tokens
from ..models.presets import PRESETS
from ..models.sample import prompt_ids
from ..parallel import ALONE, Team
from ..quant import dispatch, int8_products
from ..quant.counter import derive_key
from . import classification
from .checks import check_data, check_model
from .data import Data as BuiltData
from .data import build_data, build_tokenizer, given_tokenizer
from .export import check_formats, export, export_checkpoint, finish, mark_ends, restore_model
from .fit import prepare_allocator, recheck, settle
from .learning_rate import lr_at
from .loop import Loop
from .model import Vocabulary, build_model, build_optimizer, compile_as, stepping_line
from .paper import has_weights
from .parts import Data, Evaluating, Faults, Samples, Saving, Stepping
from .resume import check_same_bytes, check_same_run, checkpoint_to_resume, describe, ending, enter, restore
from .run_lock import RunLock
from .say import say
from .stepping import BatchMajor, LayerMajor
from .streamed import Placing
from .trial import kept_in_walks, try_layer_major, turns_of

__all__ = ["Run", "build", "ending", "export", "export_checkpoint", "finish", "plan", "restore_model"]


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


def plan(config: Config, processes: int = 1) -> None:
    """Print the memory plan of ``config`` for each of ``processes`` without allocating anything. Raises
    :class:`DoesNotFitError`.

    Without a GPU here, a configuration that states its ``memory.budget`` is planned for one, unless device is cpu.
    """
    here = torch.cuda.is_available()
    if config.device != "cpu" and not here and config.memory.budget is not None:
        device = torch.device("cuda")
        say("note", f"planned for a CUDA device of {config.memory.budget}; there is none here")
    else:
        device = choose_device(config)
    section = config.model
    stated = section.path is not None or Path(section.config).exists()
    stated = stated or "vocab_size" in {**section.overrides, **PRESETS.get(section.config, {})}
    rows = section.overrides.get("vocab_size", 1)  # a folder's config.json has its own
    vocabulary = (
        Vocabulary(rows, None, None) if stated else Vocabulary.of(build_tokenizer(config, given_tokenizer(config)))
    )
    if config.data.task == "classify":
        vocabulary = replace(vocabulary, labels=classification.PLANNED)
    elif section.path is not None and not has_weights(local_folder(section.path)):
        say("note", f"{section.path} holds no weights yet; the plan is made from its config.json alone")
    remarks = configuration.remarks(config)
    config = _resolved(config, device, processes)
    say("optimizer", f"{checked.describe(config.train.optimizer, device)}, {stepping_line(config)}")
    for remark in remarks:
        say("note", remark)
    settle(config, vocabulary, device, processes)


def build(config: Config, resume: str | None, team: Team = ALONE) -> Run:
    """Build everything for ``config``; ``resume`` is None, "auto" or a checkpoint. Called in each process of
    ``team``."""
    device = choose_device(config)
    remarks = configuration.remarks(config)
    config = _resolved(config, device, team.size)
    folder, lock = enter(config, resume, team)
    source, saved = checkpoint_to_resume(folder, resume, team)
    if source is not None:
        check_same_run(source, saved, config)
    say("run", f"{folder} | method {config.method} | {device.type}, {config.model.dtype}")
    if team.size > 1:
        part = f"{config.train.grad_accumulation // team.size} of {config.train.grad_accumulation} micro-batches each"
        holds = {"replicate": "the model", "shard": "its rows of the low-rank layers, and all else,"}[config.parallel]
        say("parallel", f"{team.size} processes, {config.parallel}: each holds {holds} and takes {part} in a step")
    elif config.parallel == "shard":
        say("note", "parallel: shard has no effect in one process")
    say("optimizer", f"{checked.describe(config.train.optimizer, device)}, {stepping_line(config)}")
    for remark in remarks:
        say("note", remark)
    dispatch.use(config.kernels, device)
    if config.model.compute == "int8":
        int8_products.check(device)
    if config.model.compile == "blocks":
        check_compiler(device)
    check_data(config)
    given = given_tokenizer(config)
    check_model(config, given)
    tokenizer = team.after_first("the tokenizer", lambda: build_tokenizer(config, given))
    if config.sample.prompt is not None:
        prompt_ids(tokenizer, config.sample.prompt, config.data.sequence_length, config.data.task)
    vocabulary = Vocabulary.of(tokenizer)
    examples = classification.read(config, tokenizer) if config.data.task == "classify" else None
    if examples is not None:  # the labels shape the model
        vocabulary = examples.vocabulary(vocabulary)
    config, planned = settle(config, vocabulary, device, team.size)
    prepare_allocator(config, device, planned)
    day = _day(saved, team)
    data = team.after_first(
        "the data", lambda: build_data(config, tokenizer, day) if examples is None else examples.data()
    )
    check_same_bytes(source, saved, data.checksum)
    place = Placing(config)
    model, loss = build_model(config, vocabulary, data.highest_id, device, team, place)
    mark_ends(config, model, tokenizer)
    check_formats(model, tokenizer, config.export.formats)
    compile_as(config, model)
    evaluating = ALONE if config.parallel == "shard" else team  # passes that gather weights must be the same in all
    asked = config.train.order
    config, layout = try_layer_major(config, model, loss, data.train, device, team)
    planned = recheck(config, vocabulary, device, loss, planned, team.size, again=config.train.order != asked)
    run_state = {
        "config": config.model_dump(mode="json"),
        "data": data.description,
        "data_checksum": data.checksum,
        "day": day.isoformat(),
        "model_config": json.loads(model.config.to_json_string(use_diff=False)),
        "torch": torch.__version__,
    }
    stepping = _stepping(config)
    optimizer = build_optimizer(config, model, config.train.stepping if layout is None else "manual", team)
    place.adopt(model, optimizer, layout)
    start = restore(
        source,
        saved,
        folder=folder,
        data=data.description,
        max_steps=config.train.max_steps,
        model=model,
        optimizer=optimizer,
        team=team,
    )
    if place.stream is not None:
        place.stream.collect()
    loop = Loop(
        model=model,
        loss=loss,
        optimizer=optimizer,
        device=device,
        data=_data(config, data, examples, loss, evaluating),
        stepping=stepping,
        evaluating=_evaluating(config),
        saving=_saving(config, folder, run_state),
        faults=_faults(config, planned),
        order=(
            BatchMajor(model, optimizer, stepping, team)
            if layout is None
            else LayerMajor(
                model,
                optimizer,
                stepping,
                layout,
                kept_in_walks(config, layout),
                team,
                place.stream or turns_of(config, layout, team),
            )
        ),
        start=start,
        team=team,
    )
    if team.leads:
        describe(folder, config, planned.numbers(), model, tokenizer)
    return Run(config, folder, model, tokenizer, data.valid, planned, loop, lock)


def _day(saved: dict[str, Any] | None, team: Team) -> date:
    """The date that a chat template writes in this run: that of its beginning, the same for all of ``team``."""
    stated = team.of_first("the date", lambda: (saved or {}).get("day") or date.today().isoformat())
    return date.fromisoformat(stated)


def _data(
    config: Config, data: BuiltData, examples: classification.LabelledData | None, loss: Loss, team: Team
) -> Data:
    """What is trained on and held out; ``team`` evaluates together."""
    order_for = cache(partial(_sample_order, len(data.train), config.run.seed))
    if examples is not None:
        return classification.loop_data(config, examples, order_for)
    looking = partial(evaluate, summed_loss=loss, target_tokens=target_tokens, team=team)
    return Data(data.train, data.valid, order_for, target_tokens, looking)


def _sample_order(samples: int, seed: int, rollbacks: int) -> SampleOrder:
    return SampleOrder(samples, derive_key(seed, rollbacks)[0] & 0xFFFFFFFF)


def _stepping(config: Config) -> Stepping:
    train = config.train
    schedule = {"peak": train.lr, "warmup_steps": train.warmup_steps, "max_steps": train.max_steps}
    return Stepping(
        lr_at=partial(lr_at, **schedule, schedule=train.lr_schedule, min_lr_ratio=train.min_lr_ratio),
        seed=config.run.seed,
        max_steps=train.max_steps,
        micro_batch_size=train.micro_batch_size,
        grad_accumulation=train.grad_accumulation,
        clip_grad_norm=train.clip_grad_norm,
    )


def _evaluating(config: Config) -> Evaluating:
    train = config.train
    return Evaluating(train.eval_every, train.eval_batches, train.early_stopping)


def _saving(config: Config, folder: Path, run_state: dict[str, Any]) -> Saving:
    train = config.train
    return Saving(
        folder,
        run_state,
        save_every=train.save_every,
        keep_last=train.keep_last,
        keep_every=train.keep_every,
        keep_best=train.keep_best,
        for_rollback=train.loss_spike == "rollback",
    )


def _faults(config: Config, planned: memory_plan.Plan) -> Faults:
    train = config.train
    return Faults(train.max_skipped_in_a_row, train.loss_spike, train.spike_threshold, plan=str(planned))
