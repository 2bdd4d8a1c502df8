"""A causal language model from a preset, a Hugging Face config, or a pretrained folder."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from ..errors import ConfigError
from . import streaming
from .folder import stored
from .presets import PRESETS

_CONFIG_ERRORS = (ValueError, OSError, KeyError, ZeroDivisionError, StrictDataclassError)
VOCAB_MULTIPLE = 64  # matrix units like an embedding whose rows are a multiple of it


def _stated_fields(source: str) -> dict[str, Any]:
    """What a ``config.json`` states, without the defaults that transformers derives from it."""
    path = Path(source)
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        close = difflib.get_close_matches(source, PRESETS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(
            f"model.config {source!r} is neither a preset{hint} nor a config.json or a folder with one; "
            f"presets: {', '.join(PRESETS)}"
        )
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (*_CONFIG_ERRORS, TypeError) as error:
        raise ConfigError(f"{folder / 'config.json'} is not a Hugging Face model config: {error}") from error


def model_config(
    source: str, *, tokenizer_size: int, overrides: dict[str, Any], report: Callable[[str], None] = print
) -> PretrainedConfig:
    """The architecture named by ``source``: a preset, a ``config.json`` or its folder, with ``overrides`` applied
    before transformers derives anything (such as head_dim) from its fields.

    A preset without one gets a vocabulary of ``tokenizer_size`` rounded up to a multiple of 64 (reported). Raises
    :class:`ConfigError` for an unknown source and for an override that the config does not have or that contradicts it.
    """
    if source in PRESETS:
        vocab = -(-tokenizer_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        fields = {"model_type": "llama", "vocab_size": vocab, **PRESETS[source]}
        if "vocab_size" not in {**overrides, **PRESETS[source]}:
            report(f"model: {source}, vocabulary {vocab} (tokenizer: {tokenizer_size})")
    else:
        fields = _stated_fields(source)
    plain = AutoConfig.for_model(**fields)
    if fixed := {"model_type", "dtype", "torch_dtype"} & set(overrides):
        raise ConfigError(f"model.overrides.{min(fixed)}: choose another model.config, or set model.dtype, instead")
    for name in overrides:
        if name not in plain.to_dict():
            close = difflib.get_close_matches(name, plain.to_dict(), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"model.overrides.{name}: {type(plain).__name__} has no such field{hint}")
    try:
        return AutoConfig.for_model(**{**fields, **overrides})
    except (*_CONFIG_ERRORS, TypeError) as error:
        raise ConfigError(f"model.overrides {overrides} give no valid {type(plain).__name__}: {error}") from error


def check_vocabulary(config: PretrainedConfig, highest_id: int, tokenizer_size: int) -> None:
    """Raise :class:`ConfigError` if ids in the data, or the tokenizer's, have no row in the model's embedding."""
    needed = max(highest_id + 1, tokenizer_size)
    vocab = config.get_text_config().vocab_size
    if vocab < needed:
        raise ConfigError(
            f"the model's vocab_size is {vocab}, but the tokenizer has {tokenizer_size} entries and the data uses ids "
            f"up to {highest_id}; use the model's own tokenizer, or model.overrides.vocab_size={needed} or more"
        )


def check_positions(config: PretrainedConfig, sequence_length: int) -> None:
    """Raise :class:`ConfigError` if ``sequence_length`` exceeds what the architecture says it has positions for."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and sequence_length > limit:
        raise ConfigError(
            f"data.sequence_length is {sequence_length}, above the model's max_position_embeddings ({limit}); shorten "
            "it or raise model.overrides.max_position_embeddings"
        )


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
        return auto.from_config(config, dtype=dtype)
    except (*_CONFIG_ERRORS, TypeError, RuntimeError) as error:
        kind = auto.__name__.removeprefix("AutoModelFor")
        raise ConfigError(f"a {kind} model cannot be built from {type(config).__name__}: {error}") from error


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
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bin.index.json"]
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # the hub's errors are kinds of these
        raise ConfigError(f"model.path {source!r} cannot be loaded: {type(error).__name__}: {error}") from error


def stored_config(folder: Path) -> PretrainedConfig:
    """``folder``'s ``config.json``. Raises :class:`ConfigError` if it describes no model."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (*_CONFIG_ERRORS, TypeError) as error:
        raise ConfigError(f"model.path {str(folder)!r} cannot be loaded: {type(error).__name__}: {error}") from error


def pretrained_skeleton(folder: Path, *, dtype: torch.dtype) -> nn.Module:
    """The causal LM that ``folder`` holds, on the meta device. Raises :class:`ConfigError` if it describes none."""
    model = skeleton(stored_config(folder), dtype=dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def stored_source(folder: Path, model: nn.Module, *, report: Callable[[str], None]) -> streaming.Source:
    """The tensors in ``folder`` for :func:`pretrained_skeleton`'s ``model``. A folder that only transformers' own
    loader understands (renamed or quantized tensors) is loaded whole first, and that is reported."""
    try:
        if getattr(model.config, "quantization_config", None):
            raise streaming.CannotStreamError(f"{folder} is quantized")
        source = stored(folder, model, report)
        streaming.compute_buffers(model)
        return source
    except streaming.CannotStreamError as reason:
        report(_whole(model, reason))
        return streaming.copied(pretrained(str(folder), dtype=next(model.parameters()).dtype), model)


def check_folder(source: str) -> bool:
    """Whether ``model.path`` is a local folder, not a hub id. Raises :class:`ConfigError` for one without a model."""
    local = source.startswith((".", "/", "~")) or Path(source).exists()
    if local and not (Path(source).expanduser() / "config.json").is_file():
        raise ConfigError(f"model.path {source!r} is not a Hugging Face model folder: it has no config.json")
    return local


def pretrained(source: str, *, dtype: torch.dtype) -> nn.Module:
    """The causal LM in a folder (or of a hub id), in ``dtype``.

    Raises :class:`ConfigError` if it cannot be read, or if the files lack weights that the architecture has.
    """
    local = check_folder(source)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            Path(source).expanduser() if local else source, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # transformers, safetensors, pickle and the hub each raise their own kinds here
        raise ConfigError(f"model.path {source!r} cannot be loaded: {type(error).__name__}: {error}") from error
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            names = sorted(str(key) for key in info[kind])
            raise ConfigError(
                f"model.path {source!r}: {len(names)} weights have {kind.replace('_', ' ')}, for example {names[0]}; "
                "they would start from random values. The folder is incomplete or belongs to another architecture"
            )
    return model
