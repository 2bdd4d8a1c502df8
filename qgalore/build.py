"""From a configuration to objects that run: the only module that knows everyone."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from . import checkpoint
from . import config as configuration
from .config import METHODS, Config
from .data.order import SampleOrder
from .data.packing import PackedSequences
from .data.paths import looks_like_path
from .data.sources import ENDINGS, documents, fingerprint
from .data.tokenizer import load_tokenizer, train_tokenizer
from .data.tokens import TokenFile, tokenize_to_disk
from .errors import ConfigError
from .export import gguf, huggingface, int8
from .lowrank import inner
from .lowrank.linear import LowRankLinear
from .lowrank.optimizer import LowRankOptimizer, optimizer
from .lr import lr_at
from .models import loading
from .models.convert import convert
from .models.loss import check_isolation, uncalled_layers
from .models.sample import continue_text, prompt_ids
from .quant.counter import derive_key
from .stats import Records

HUB_VALIDATION_TOKENS = 10_000_000  # as the papers evaluate on C4


@dataclass
class Run:
    """A built run: the trained objects, the folder, and ``loop`` and ``position``, the keyword arguments of
    ``loop.Loop`` and ``loop.Position``."""

    config: Config
    folder: Path
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    valid: PackedSequences
    loop: dict[str, Any]
    position: dict[str, Any] = field(default_factory=dict)  # of the checkpoint resumed from


def choose_device(config: Config) -> torch.device:
    """The device asked for. Raises :class:`ConfigError` if it is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but PyTorch sees no CUDA device here; set device=cpu or device=auto")
    name = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _say(key: str, text: str) -> None:
    print(f"{key + ':':<11}{text}", flush=True)


def build_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer named in the configuration, or a byte-level BPE trained on the corpus and cached."""
    data = config.data
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    if config.model.path is not None:
        loading.check_folder(config.model.path)
        _say("tokenizer", f"the model's own, {config.model.path}")
        return load_tokenizer(config.model.path)
    if not looks_like_path(data.train, ENDINGS):
        raise ConfigError(
            f"data.train {data.train!r} is a hub dataset and data.tokenizer is not set; training one would read all of "
            "it. Name a tokenizer (data.tokenizer)"
        )
    digest = hashlib.sha256(f"{fingerprint(data.train)}|{data.text_key}|{data.vocab_size}".encode()).hexdigest()[:16]
    folder = Path(data.cache_dir) / f"tokenizer-{digest}"
    if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
        _say("tokenizer", f"cached, {folder}")
        return load_tokenizer(str(folder))
    _say("tokenizer", f"training byte-level BPE with {data.vocab_size} entries on {data.train}")
    tokenizer = train_tokenizer(documents(data.train, text_key=data.text_key), vocab_size=data.vocab_size)
    building = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        tokenizer.save_pretrained(building)
        if not folder.exists():
            building.rename(folder)
    except OSError as error:
        raise ConfigError(f"the tokenizer cannot be cached in {folder}: {error}; set data.cache_dir") from error
    return tokenizer


def build_data(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenFile, PackedSequences, PackedSequences]:
    """The training tokens, and the packed training and held-out samples."""
    data, train = config.data, config.train
    read = partial(tokenize_to_disk, tokenizer=tokenizer, cache_dir=data.cache_dir, text_key=data.text_key)
    needed = train.max_steps * train.micro_batch_size * train.grad_accumulation * data.sequence_length + 1
    limit = data.max_tokens or (None if Path(data.train).exists() else needed)
    tokens = read(data.train, max_tokens=limit)
    if data.valid is not None:
        limit = None if Path(data.valid).exists() else HUB_VALIDATION_TOKENS
        held_out = read(data.valid, split=data.valid_split, max_tokens=limit)
    else:
        tokens, held_out = tokens.split_tail(data.valid_fraction)
        _say("held out", f"the last {data.valid_fraction:.1%} of {data.train} (set data.valid to choose)")
    pack = partial(PackedSequences, sequence_length=data.sequence_length, document_attention=data.document_attention)
    packed, valid = (_labelled(pack, part, key) for part, key in ((tokens, "train"), (held_out, "valid")))
    epochs = train.max_steps * train.micro_batch_size * train.grad_accumulation / len(packed)
    _say(
        "data",
        f"{len(tokens.tokens):,} tokens in {tokens.n_documents:,} documents, {len(packed):,} samples of "
        f"{data.sequence_length} ({epochs:.2f} epochs); held out: {len(valid):,} samples",
    )
    return tokens, packed, valid


def _labelled(pack, tokens: TokenFile, key: str) -> PackedSequences:
    """``pack(tokens)``, saying of which data a complaint is."""
    try:
        return pack(tokens)
    except ConfigError as error:
        raise ConfigError(f"data.{key}: {error}") from error


def build_model(config: Config, tokenizer: PreTrainedTokenizerBase, highest_id: int, device: torch.device) -> nn.Module:
    """The model in its dtype, converted as the method says, on the device."""
    section = config.model
    dtype = getattr(torch, section.dtype)
    if section.path is not None:
        model = loading.pretrained(section.path, dtype=dtype)
    else:
        shape = loading.model_config(
            section.config,
            tokenizer_size=len(tokenizer),
            overrides=section.overrides,
            report=lambda line: _say("model", line.removeprefix("model: ")),
        )
        loading.check_vocabulary(shape, highest_id, len(tokenizer))
        shape.bos_token_id, shape.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        shape.pad_token_id = None  # its row would get no gradient, and packed data has no padding
        model = loading.from_scratch(shape, dtype=dtype, seed=config.run.seed)
    loading.check_vocabulary(model.config, highest_id, len(tokenizer))
    loading.check_positions(model.config, config.data.sequence_length)
    if (row := loading.untie_padding(model)) is not None:
        _say("note", f"the embedding row of the padding token, {row}, trains like any other here")
    if METHODS[config.method][0]:
        print(_convert(config, model), flush=True)
    else:
        parameters = [p for p in model.parameters() if p.requires_grad]
        _say(
            "model", f"{sum(p.numel() for p in parameters):,} values in {len(parameters)} tensors, all trained in full"
        )
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.to(device)
    model.eval()
    if uncalled := uncalled_layers(model, LowRankLinear):
        _say(
            "note",
            f"{len(uncalled)} converted layers were not called in a trial forward pass: {', '.join(uncalled[:5])}",
        )
    if config.data.document_attention == "isolated":
        check_isolation(model, config.data.sequence_length)
    return model


def _convert(config: Config, model: nn.Module):
    low = config.lowrank
    return convert(
        model,
        rank=None if low.rank == "full" else low.rank,
        proj_type=low.proj_type,
        weight_format=low.weight_format,
        group_size=low.group_size,
        basis_format=low.basis_format,
        grad_dtype=getattr(torch, low.grad_dtype),
        include=low.include,
        exclude=low.exclude,
    )


def build_optimizer(config: Config, model: nn.Module) -> LowRankOptimizer:
    """The optimizer over every trainable tensor of ``model``."""
    train, low = config.train, config.lowrank
    options = {"betas": train.betas, "eps": train.eps} if train.optimizer in ("adamw", "adamw8bit") else {}
    schedule = ("update_proj_gap", "cos_threshold", "gamma_proj", "queue_size", "max_gap", "stagger")
    return optimizer(
        model,
        lr=train.lr,
        weight_decay=train.weight_decay,
        inner=train.optimizer,
        inner_options=train.optimizer_options,
        stepping=train.stepping,
        seed=config.run.seed,
        **options,
        **{name: getattr(low, name) for name in (*schedule, "scale", "projector", "similarity", "moments")},
    )


def _run_folder(config: Config, resume: str | None) -> Path:
    """The run's folder. Raises :class:`ConfigError` rather than mix a new run into an old one's files."""
    folder = Path(config.run.dir) / config.run.name
    inside = resume == "auto" or (resume and Path(resume).resolve().parent == (folder / "checkpoints").resolve())
    if not inside and ((folder / "metrics.jsonl").exists() or checkpoint.steps_in(folder / "checkpoints")):
        raise ConfigError(
            f"{folder} already holds a run; continue it with --resume auto or one of its own checkpoints, choose "
            "another run.name, or delete it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be made: {error}; set run.dir") from error
    return folder


def _checkpoint_to_resume(folder: Path, resume: str | None) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint meant by ``--resume`` and its state; "auto" names a damaged one and takes the one before it."""
    if resume is None:
        return None, None
    if resume != "auto":
        return Path(resume), checkpoint.read_state(Path(resume))
    found, saved, complaints = checkpoint.newest_of(checkpoint.steps_in(folder / "checkpoints"))
    for complaint in complaints:
        _say("resume", f"skipping a damaged checkpoint: {complaint}")
    if found is None:
        _say("resume", f"no usable checkpoint in {folder / 'checkpoints'}; starting from the beginning")
    return found, saved


def _check_same_run(source: Path, saved: dict[str, Any], config: Config) -> None:
    different = configuration.differences(saved["config"], config)
    if different:
        listing = "\n".join(f"  {line}" for line in different)
        raise ConfigError(
            f"{source} was made with another configuration:\n{listing}\n"
            f"Only these may change on resume: {', '.join(configuration.RESUMABLE)}"
        )


def _restore(run: Run, source: Path | None, saved: dict[str, Any] | None) -> None:
    """Bring a built run to the state of a checkpoint, its records too; None is the beginning."""
    step = 0
    if source is not None:
        if saved["data"] != run.loop["run_state"]["data"]:
            raise ConfigError(
                f"{source} was made with other tokens: the text of data.train, its tokenizer or how much was read "
                "has changed (for a hub dataset set data.max_tokens, which otherwise follows train.max_steps)"
            )
        step = saved["position"]["step"]
        if step > run.config.train.max_steps:
            raise ConfigError(f"{source} is after step {step}, beyond train.max_steps ({run.config.train.max_steps})")
        checkpoint.load_into(source, saved, run.model, run.loop["optimizer"])
        for path in checkpoint.set_aside(run.folder / "checkpoints", step):
            _say("resume", f"a later checkpoint of the course left is kept as {path}")
        run.position = {**saved["position"], "sample": tuple(saved["position"]["sample"])}
        _say("resume", f"{source}, after step {step}")
    for name in ("metrics.jsonl", "subspace.jsonl"):
        Records(run.folder / name).cut_back(step)


def build(config: Config, resume: str | None) -> Run:
    """Build everything for ``config``; ``resume`` is None, "auto" or a checkpoint."""
    device = choose_device(config)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    remarks = configuration.remarks(config)
    config = configuration.resolve(config, device.type, bf16)
    folder = _run_folder(config, resume)
    source, saved = _checkpoint_to_resume(folder, resume)
    if source is not None:
        _check_same_run(source, saved, config)
    _say("run", f"{folder} | method {config.method} | {device.type}, {config.model.dtype}")
    _say("optimizer", f"{inner.describe(config.train.optimizer, device)}, {_stepping(config)}")
    for remark in remarks:
        _say("note", remark)
    tokenizer = build_tokenizer(config)
    if config.sample.prompt is not None:
        prompt_ids(tokenizer, config.sample.prompt, config.data.sequence_length)
    tokens, packed, valid = build_data(config, tokenizer)
    model = build_model(config, tokenizer, tokens.vocab_high, device)
    train = config.train
    schedule = {"peak": train.lr, "warmup_steps": train.warmup_steps, "max_steps": train.max_steps}
    shared = ("max_steps", "micro_batch_size", "grad_accumulation", "clip_grad_norm", "eval_every", "eval_batches")
    saving, faults = (
        ("save_every", "keep_last", "keep_every"),
        ("max_skipped_in_a_row", "loss_spike", "spike_threshold"),
    )
    loop = {
        "model": model,
        "optimizer": build_optimizer(config, model),
        "train": packed,
        "valid": valid,
        "order_for": cache(
            lambda rollbacks: SampleOrder(len(packed), derive_key(config.run.seed, rollbacks)[0] & 0xFFFFFFFF)
        ),
        "device": device,
        "folder": folder,
        "lr_at": partial(lr_at, **schedule, schedule=train.lr_schedule, min_lr_ratio=train.min_lr_ratio),
        "run_state": {
            "config": config.model_dump(mode="json"),
            "data": f"{len(packed)} samples of {tokens.digest()}",
            "model_config": json.loads(model.config.to_json_string(use_diff=False)),
            "torch": torch.__version__,
        },
        "seed": config.run.seed,
        **{name: getattr(train, name) for name in (*shared, *saving, *faults)},
    }
    run = Run(config, folder, model, tokenizer, valid, loop)
    _restore(run, source, saved)
    try:
        (folder / "config.yaml").write_text(configuration.dump(config), encoding="utf-8")
        tokenizer.save_pretrained(folder / "tokenizer")
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be written: {error}; set run.dir") from error
    return run


def _stepping(config: Config) -> str:
    train = config.train
    if train.stepping == "fused":
        return "fused stepping: each tensor steps inside backward and its gradient is freed at once"
    asked = [f"grad_accumulation {train.grad_accumulation}"] if train.grad_accumulation > 1 else []
    asked += [f"clip_grad_norm {train.clip_grad_norm:g}"] if train.clip_grad_norm > 0 else []
    return f"deferred stepping ({' and '.join(asked) or 'as asked'}): gradients are kept until the step"


EXPORTS = {"hf": huggingface.save, "int8": int8.save, "gguf": gguf.save}


def export(model: nn.Module, tokenizer: PreTrainedTokenizerBase, fmt: str, target: Path) -> None:
    """Write ``model`` to ``target`` in one of ``EXPORTS``. Raises :class:`ConfigError` if it cannot be."""
    try:
        EXPORTS[fmt](model, tokenizer, target)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the export {target} could not be written: {error}; the checkpoints are intact") from error
    _say("export", str(target))


def finish(run: Run) -> None:
    """What happens after the last step: the exports and a sample."""
    for fmt in run.config.export.formats:
        export(run.model, run.tokenizer, fmt, run.folder / "export" / fmt)
    section = run.config.sample
    if section.max_new_tokens:
        ids = run.valid.batch([0])["input_ids"][0, :16].tolist()
        if section.prompt is not None:
            ids = prompt_ids(run.tokenizer, section.prompt, run.config.data.sequence_length)
        _say("sample", continue_text(run.model, run.tokenizer, ids, section.max_new_tokens, run.config.run.seed))


def restore_model(source: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model and tokenizer of a checkpoint (RUN/checkpoints/step-…), on the CPU, without its data or optimizer.

    Raises :class:`ConfigError` if the checkpoint is damaged or its run's tokenizer is gone.
    """
    state = checkpoint.read_state(source)
    config = configuration.parse(state["config"], str(source))
    shape = AutoConfig.for_model(**state["model_config"])
    model = loading.from_scratch(shape, dtype=getattr(torch, config.model.dtype), seed=0)
    if METHODS[config.method][0]:
        _convert(config, model)
    checkpoint.load_model(source, model)
    return model.eval(), load_tokenizer(str(source.parent.parent / "tokenizer"))
