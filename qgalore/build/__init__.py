"""From a configuration to objects that run: the only room that knows everyone."""

import json
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import config as configuration
from .. import memory
from ..config import Config
from ..data.order import SampleOrder
from ..data.packing import PackedSequences
from ..errors import ConfigError
from ..evaluate import evaluate
from ..lowrank.inner import checked
from ..lr import lr_at
from ..models.compiling import check_compiler
from ..models.loss import Loss, target_tokens
from ..models.presets import PRESETS
from ..models.sample import prompt_ids
from ..parallel import ALONE, Team
from ..quant import dispatch, int8_products
from ..quant.counter import derive_key
from . import labelled
from .data import build_data, build_tokenizer
from .export import check_formats, export, finish, restore_model
from .model import Vocabulary, build_model, build_optimizer, compile_as, stepping_line
from .plan import prepare_allocator, recheck, settle
from .resume import check_same_run, check_shared, checkpoint_to_resume, restore, run_folder
from .say import say

__all__ = ["Run", "build", "export", "finish", "plan", "restore_model"]


@dataclass
class Run:
    """A built run: the trained objects, the folder, and ``loop`` and ``position``, the keyword arguments of
    ``loop.Loop`` and ``loop.Position``."""

    config: Config
    folder: Path
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    valid: PackedSequences
    planned: memory.Plan
    loop: dict[str, Any]
    position: dict[str, Any] = field(default_factory=dict)  # of the checkpoint resumed from


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
    vocabulary = Vocabulary(rows, None, None) if stated else Vocabulary.of(build_tokenizer(config))
    if config.data.task == "classify":
        vocabulary = replace(vocabulary, labels=labelled.PLANNED)
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
    folder = team.of_first("the run's folder", lambda: run_folder(config, resume))
    check_shared(folder, team)
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
    tokenizer = team.after_first("the tokenizer", lambda: build_tokenizer(config))
    if config.sample.prompt is not None:
        prompt_ids(tokenizer, config.sample.prompt, config.data.sequence_length, config.data.task)
    vocabulary = Vocabulary.of(tokenizer)
    examples = labelled.read(config, tokenizer) if config.data.task == "classify" else None
    if examples is not None:  # the labels shape the model
        vocabulary = examples.vocabulary(vocabulary)
    config, planned = settle(config, vocabulary, device, team.size)
    prepare_allocator(config, device, planned)
    data = team.after_first("the data", lambda: build_data(config, tokenizer) if examples is None else examples.data())
    model, loss = build_model(config, vocabulary, data.highest_id, device, team)
    check_formats(model, tokenizer, config.export.formats)
    compile_as(config, model)
    evaluating = ALONE if config.parallel == "shard" else team  # passes that gather weights must be the same in all
    planned = recheck(config, vocabulary, device, loss, planned, team.size)
    run_state = {
        "config": config.model_dump(mode="json"),
        "data": data.description,
        "model_config": json.loads(model.config.to_json_string(use_diff=False)),
        "torch": torch.__version__,
    }
    loop = {
        "model": model,
        "loss": loss,
        "optimizer": build_optimizer(config, model, team),
        "train": data.train,
        "valid": data.valid,
        "device": device,
        "folder": folder,
        "run_state": run_state,
        "plan": str(planned),
        "team": team,
        **_loop_settings(config, len(data.train)),
        **(_token_settings(loss, evaluating) if examples is None else labelled.loop_settings(config, examples.labels)),
    }
    run = Run(config, folder, model, tokenizer, data.valid, planned, loop)
    run.position = restore(
        source,
        saved,
        folder=folder,
        data=run_state["data"],
        max_steps=config.train.max_steps,
        model=model,
        optimizer=loop["optimizer"],
        team=team,
    )
    if team.leads:
        _describe(run)
    return run


def _describe(run: Run) -> None:
    """Write what the run was made of into its folder."""
    folder, config, tokenizer = run.folder, run.config, run.tokenizer
    try:
        (folder / "config.yaml").write_text(configuration.dump(config), encoding="utf-8")
        (folder / "plan.json").write_text(json.dumps(vars(run.planned), indent=1), encoding="utf-8")
        tokenizer.save_pretrained(folder / "tokenizer")
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be written: {error}; set run.dir") from error


def _token_settings(loss: Loss, team: Team) -> dict[str, Any]:
    """What ``loop.Loop`` is told about text: how to count and to evaluate."""
    looking = partial(evaluate, summed_loss=loss, target_tokens=target_tokens, team=team)
    return {"targets": target_tokens, "evaluate": looking}


def _loop_settings(config: Config, samples: int) -> dict[str, Any]:
    """The arguments of ``loop.Loop`` that are settings: rates, orders, limits."""
    train = config.train
    schedule = {"peak": train.lr, "warmup_steps": train.warmup_steps, "max_steps": train.max_steps}
    shared = ("max_steps", "micro_batch_size", "grad_accumulation", "clip_grad_norm", "eval_every", "eval_batches")
    saving = ("save_every", "keep_last", "keep_every", "keep_best", "early_stopping")
    faults = ("max_skipped_in_a_row", "loss_spike", "spike_threshold")
    return {
        "order_for": cache(
            lambda rollbacks: SampleOrder(samples, derive_key(config.run.seed, rollbacks)[0] & 0xFFFFFFFF)
        ),
        "lr_at": partial(lr_at, **schedule, schedule=train.lr_schedule, min_lr_ratio=train.min_lr_ratio),
        "seed": config.run.seed,
        **{name: getattr(train, name) for name in (*shared, *saving, *faults)},
    }
