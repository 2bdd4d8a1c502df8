"""A causal language model from a preset, a Hugging Face config, or a pretrained folder."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from ..errors import ConfigError
from . import folder as folders
from . import streaming
from .growing import extended, grown_names, resized, rows_of
from .kinds import check_folder
from .overriding import overridden_config
from .shapes import (
    check_positions,
    check_vocabulary,
    first_line,
    first_position,
    model_config,
    noted_config,
    stored_config,
    stored_fields,
)  # fmt: skip
from .weights import stored_tensors

__all__ = [
    "check_folder", "check_positions", "check_vocabulary", "first_position", "fresh_source", "from_scratch", "grown",
    "local_folder", "model_config", "noted_config", "pretrained", "pretrained_config", "pretrained_skeleton",
    "rows_of", "skeleton", "skeleton_with_buffers", "stored_config", "stored_source", "untie_padding",
]  # fmt: skip


def _silent(line: str) -> None:
    """Report nothing: who reports it looked at the same folder before."""


def untie_padding(model: nn.Module) -> int | None:
    """Let every row of the embedding train: transformers gives the row of ``pad_token_id`` no gradient, but packed
    data has no padding, so that token is an ordinary one here. Returns the row that was frozen, or None."""
    embedding = model.get_input_embeddings()
    frozen = getattr(embedding, "padding_idx", None)
    if frozen is not None:
        embedding.padding_idx = None
    return frozen


def from_scratch(
    config: PretrainedConfig, *, dtype: torch.dtype, seed: int, auto: type = AutoModelForCausalLM
) -> nn.Module:
    """A freshly initialised model in ``dtype``, a function of ``seed`` alone, of one of transformers' ``AutoModelFor…``
    classes. Raises :class:`ConfigError` if the architecture has no such model or its fields contradict each other."""
    torch.manual_seed(seed)
    try:
        return auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # each architecture's class raises its own kinds
        kind = auto.__name__.removeprefix("AutoModelFor")
        raise ConfigError(
            f"a {kind} model cannot be built from {type(config).__name__}: {first_line(error)}. Mend that field of its "
            "config.json or of model.overrides, or choose another architecture"
        ) from error


def skeleton(config: PretrainedConfig, *, dtype: torch.dtype, auto: type = AutoModelForCausalLM) -> nn.Module:
    """The model of ``config`` on the meta device: shapes without memory. Raises as :func:`from_scratch`."""
    with torch.device("meta"):
        return from_scratch(config, dtype=dtype, seed=0, auto=auto)


def skeleton_with_buffers(
    config: PretrainedConfig, *, dtype: torch.dtype, auto: type = AutoModelForCausalLM
) -> nn.Module:
    """:func:`skeleton` whose buffers have their values, for parameters that come from elsewhere; an architecture that
    does not make them in its initialisation is built whole."""
    model = skeleton(config, dtype=dtype, auto=auto)
    try:
        streaming.compute_buffers(model)
    except streaming.CannotStreamError:
        return from_scratch(config, dtype=dtype, seed=0, auto=auto)
    return model


def fresh_source(
    model: nn.Module, *, seed: int, report: Callable[[str], None], auto: type = AutoModelForCausalLM
) -> streaming.Source:
    """The tensors that :func:`skeleton`'s ``model`` starts from. An architecture whose initialisation cannot be
    streamed is built whole first, and that is reported."""
    try:
        return streaming.initialisation(model, seed)
    except streaming.CannotStreamError as reason:
        dtype = next(model.parameters()).dtype
        report(_whole(model, reason))
        return streaming.copied(from_scratch(model.config, dtype=dtype, seed=seed, auto=auto), model)


def _whole(model: nn.Module, reason: Exception) -> str:
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    return f"{type(model).__name__} is built whole in host memory first ({size:.1f} GiB): {reason}"


def local_folder(source: str) -> Path:
    """The folder of a pretrained model; a hub id is downloaded (safetensors and what belongs to them) or found in the
    cache. Raises :class:`ConfigError` if there is none."""
    if check_folder(source):
        return Path(source).expanduser()
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bin.index.json", "README.md"]
        found = snapshot_download(source, allow_patterns=patterns)
    except (OSError, ValueError) as error:  # the hub's errors are kinds of these
        raise ConfigError(f"model.path {source!r} cannot be loaded: {first_line(error)}") from error
    check_folder(found)
    return Path(found)


def pretrained_config(
    folder: Path,
    overrides: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    report: Callable[[str], None] = _silent,
    auto: type = AutoModelForCausalLM,
) -> PretrainedConfig:
    """The config of the model that ``folder`` holds, with ``overrides`` that leave its tensors as they are."""
    return overridden_config(folder, overrides, partial(skeleton, dtype=dtype, auto=auto), report)


def pretrained_skeleton(
    folder: Path,
    *,
    dtype: torch.dtype,
    report: Callable[[str], None] = _silent,
    overrides: dict[str, Any] | None = None,
) -> nn.Module:
    """The causal LM that ``folder`` holds, on the meta device, with its head tied to the embedding or not as its files
    have it. Whether the files have all that the model needs is looked at here. Raises :class:`ConfigError`."""
    model = skeleton(pretrained_config(folder, overrides or {}, dtype=dtype, report=report), dtype=dtype)
    tensors = stored_tensors(folder, stored_fields(folder), report)
    if (line := folders.untie_as_stored(model, tensors)) is not None:
        report(line)
    with contextlib.suppress(streaming.CannotStreamError):  # transformers may know how; stored_source says so
        folders.stored(folder, model, _silent, tensors=tensors)
    path = folder / "generation_config.json"
    if path.is_file() and model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # whatever transformers makes of a file that someone wrote
            raise ConfigError(f"{path} cannot be used: {first_line(error)}. Mend or remove it") from error
    return model


def grown(model: nn.Module, rows: int, auto: type = AutoModelForCausalLM) -> tuple[nn.Module, list[str]]:
    """``model``, on the meta device, with ``rows`` in its vocabulary, and the parameters that have more of them now.
    Raises :class:`ConfigError` for an architecture in which anything else would change."""
    if rows == rows_of(model.config):
        return model, []
    after = skeleton(resized(model.config, rows), dtype=next(model.parameters()).dtype, auto=auto)
    if hasattr(model, "generation_config"):
        after.generation_config = model.generation_config
    return after, grown_names(model, after)


def as_stored(folder: Path, model: nn.Module, auto: type = AutoModelForCausalLM) -> nn.Module:
    """``model``, on the meta device, with as many rows in its vocabulary as ``folder`` has."""
    rows = rows_of(stored_config(folder))
    if rows == rows_of(model.config):
        return model
    return skeleton(resized(model.config, rows), dtype=next(model.parameters()).dtype, auto=auto)


def stored_source(folder: Path, model: nn.Module, *, report: Callable[[str], None]) -> streaming.Source:
    """The tensors in ``folder`` for :func:`pretrained_skeleton`'s ``model``, or for what :func:`grown` makes of it. A
    folder that only transformers' own loader understands is loaded whole first, and that is reported."""
    tensors, before = stored_tensors(folder, stored_fields(folder)), as_stored(folder, model)
    try:
        source = folders.stored(folder, before, report, tensors=tensors)
        streaming.compute_buffers(model)
        folders.load_buffers(model, tensors)
    except streaming.CannotStreamError as reason:
        report(_whole(model, reason))
        source = streaming.copied(_loaded_whole(folder, before), model)
    return source if before is model else extended(source, before, model)


def _loaded_whole(folder: Path, model: nn.Module) -> nn.Module:
    """``model``, of the same class and dtype, as transformers' own loader makes it from ``folder``. Raises
    :class:`ConfigError`."""
    try:
        whole, info = type(model).from_pretrained(
            folder, config=model.config, dtype=next(model.parameters()).dtype, output_loading_info=True,
            trust_remote_code=False, use_safetensors=True, local_files_only=True,
        )  # fmt: skip
    except Exception as error:  # transformers, safetensors and torch each raise their own kinds here
        raise ConfigError(f"model.path {str(folder)!r} cannot be loaded: {first_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise ConfigError(folders.lacking(folder, kind.replace("_", " "), [str(key) for key in info[kind]]))
    if folders.is_tied(whole) != folders.is_tied(model):
        raise ConfigError(
            f"model.path {str(folder)!r}: the files hold a head that config.json ties to the embedding; set "
            '"tie_word_embeddings": false in config.json'
        )
    return whole


def pretrained(source: str, *, dtype: torch.dtype | None = None, report: Callable[[str], None] = print) -> nn.Module:
    """The causal LM in a folder (or of a hub id), on the CPU, in ``dtype`` (None: that of its ``config.json``, else
    fp32). It is read as training reads it, and whatever is left unread is reported. Raises :class:`ConfigError`."""
    folder = local_folder(source)
    if dtype is None:
        stated = getattr(stored_config(folder), "dtype", None)
        dtype = stated if isinstance(stated, torch.dtype) and stated.is_floating_point else torch.float32
    model = pretrained_skeleton(folder, dtype=dtype, report=report)
    tensors = stored_source(folder, model, report=report)
    streaming.allocate(model, torch.device("cpu"))
    streaming.fill(model, tensors, "model")
    return model.eval()
