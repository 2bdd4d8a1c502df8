"""The architecture of a model: from a preset, a Hugging Face ``config.json``, or a pretrained folder's."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from ..errors import ConfigError
from . import kinds
from .presets import PRESETS
from .sizes import check_fields, check_ids

VOCAB_MULTIPLE = 64  # matrix units like an embedding whose rows are a multiple of it


def first_line(error: Exception) -> str:
    """The kind of an exception and the first line of what it says; more of them while they end in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    count = next((i for i, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    return f"{type(error).__name__}: {' '.join(lines[:count])}"


def stored_fields(folder: Path) -> dict[str, Any]:
    """What ``folder``'s ``config.json`` states, without the defaults that transformers derives from it. Raises
    :class:`ConfigError` for what transformers does not have, comes as code, or no model has."""
    path = folder / "config.json"
    fields = PretrainedConfig._decode_special_floats(kinds.read_json(path))  # Infinity, as transformers writes it
    kind = fields.get("model_type")
    kinds.refuse_code(folder, fields, isinstance(kind, str) and kind in CONFIG_MAPPING)
    check_fields(fields, str(path))
    return fields


def stored_config(folder: Path, report: Callable[[str], None] = lambda line: None) -> PretrainedConfig:
    """``folder``'s ``config.json``, for a model to be loaded; odd ids in it and code beside it, which does not run, are
    reported. Raises :class:`ConfigError` if it describes no model, or weights that training cannot start from."""
    fields = stored_fields(folder)
    kinds.refuse_quantized(folder, fields)
    for note in check_ids(fields, str(folder / "config.json")):
        report(note)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each architecture's class raises its own kinds
        raise ConfigError(
            f"model.path {str(folder)!r} cannot be loaded: transformers refuses its config.json ({first_line(error)}). "
            "Give the values that the model was made with, or copy the file again"
        ) from error
    if fields.get("auto_map"):
        report(f"the code beside the model does not run: transformers has the architecture {config.model_type} itself")
    for name in ("auto_map", "quantization_config", "compression_config"):  # no longer true of what is trained
        if name in config.__dict__:
            delattr(config, name)
    return config


def noted_config(fields: dict[str, Any], where: str) -> PretrainedConfig:
    """The architecture of ``fields``, a config as transformers writes it into JSON, which ``where`` holds. Raises
    :class:`ConfigError`."""
    fields = PretrainedConfig._decode_special_floats(fields)
    check_fields(fields, where)
    try:
        return AutoConfig.for_model(**fields)
    except Exception as error:  # each architecture's class raises its own kinds
        raise ConfigError(f"{where} describes no model of transformers: {first_line(error)}") from error


def _named_fields(source: str) -> dict[str, Any]:
    """What the ``config.json`` that ``model.config`` names states."""
    path = Path(source).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        close = difflib.get_close_matches(source, PRESETS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(
            f"model.config {source!r} is neither a preset{hint} nor a config.json or a folder with one; "
            f"presets: {', '.join(PRESETS)}"
        )
    try:
        fields = stored_fields(folder)
        AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each architecture's class raises its own kinds
        text = str(error) if isinstance(error, ConfigError) else first_line(error)
        raise ConfigError(f"{folder / 'config.json'} is not a Hugging Face model config: {text}") from error
    for name in ("auto_map", "quantization_config", "compression_config", "transformers_weights"):
        fields.pop(name, None)  # of weights that are not taken
    return fields


def check_names(plain: PretrainedConfig, overrides: dict[str, Any], instead: str, also: tuple[str, ...] = ()) -> None:
    """Raise :class:`ConfigError` for ``overrides`` of fields that ``plain`` does not have, nor ``also``, and of those
    that another key decides; ``instead`` is the key that names the model."""
    if fixed := {"model_type", "dtype", "torch_dtype"} & set(overrides):
        raise ConfigError(f"model.overrides.{min(fixed)}: choose another {instead}, or set model.dtype, instead")
    known = [*plain.to_dict(), *also]
    for name in overrides:
        if name not in known:
            close = [plain.attribute_map[name]] if name in plain.attribute_map else []
            close = close or difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"model.overrides.{name}: {type(plain).__name__} has no such field{hint}")


def model_config(
    source: str, *, tokenizer_size: int, overrides: dict[str, Any], report: Callable[[str], None] = print
) -> PretrainedConfig:
    """The architecture named by ``source``: a preset, a ``config.json`` or its folder, with ``overrides`` applied
    before transformers derives anything from its fields. A preset without one gets a vocabulary of ``tokenizer_size``
    rounded up to a multiple of 64 (reported). Raises :class:`ConfigError`."""
    if source in PRESETS:
        vocab = -(-tokenizer_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        fields = {"model_type": "llama", "vocab_size": vocab, **PRESETS[source]}
        if "vocab_size" not in {**overrides, **PRESETS[source]}:
            report(f"model: {source}, vocabulary {vocab} (tokenizer: {tokenizer_size})")
    else:
        fields = _named_fields(source)
    plain = AutoConfig.for_model(**fields)
    check_names(plain, overrides, "model.config")
    check_fields(overrides, "model.overrides")
    try:
        return AutoConfig.for_model(**{**fields, **overrides})
    except Exception as error:  # each architecture's class raises its own kinds
        raise ConfigError(
            f"model.overrides {overrides} give no valid {type(plain).__name__}: {first_line(error)}"
        ) from error


def check_vocabulary(
    config: PretrainedConfig,
    highest_id: int,
    tokenizer_size: int,
    *,
    pretrained: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Raise :class:`ConfigError` if an id in the data has no row in the model's embedding. Entries of the tokenizer
    without one that the data does not use are reported."""
    vocab = config.get_text_config().vocab_size
    if highest_id >= vocab:
        remedy = (
            "Set data.tokenizer to the tokenizer that the model was trained with, or take the texts that use it out. "
            "If it is that one with more entries, model.grow_vocabulary=true gives them rows"
            if pretrained
            else f"Set model.overrides.vocab_size to {max(highest_id + 1, tokenizer_size)} or more"
        )
        raise ConfigError(
            f"the model's vocab_size is {vocab}, but the tokenizer has {tokenizer_size} entries and the data uses ids "
            f"up to {highest_id}. {remedy}"
        )
    if tokenizer_size > vocab:
        report(
            f"the tokenizer has {tokenizer_size} entries and the model {vocab} rows: ids from {vocab} on must not occur"
        )


def first_position(model: nn.Module) -> int:
    """The row of the table of positions that a row's first token takes: RoBERTa and its relatives count from the one
    after padding's, everyone else from 0."""
    for name, module in model.named_modules():
        offset = getattr(module, "padding_idx", None)
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding) and offset is not None:
            return offset + 1
    return 0


def usable_positions(model: nn.Module) -> int | None:
    """How many tokens a row may have; None for an architecture without a limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None or limit < 1 else limit - first_position(model)  # XLNet says −1


def check_positions(model: nn.Module, sequence_length: int, *, pretrained: bool = False) -> None:
    """Raise :class:`ConfigError` if ``sequence_length`` exceeds what ``model`` has positions for."""
    limit = usable_positions(model)
    if limit is not None and sequence_length > limit:
        stated = model.config.get_text_config().max_position_embeddings
        why = f"max_position_embeddings ({stated})"
        why = why if limit == stated else f"{limit} usable positions (max_position_embeddings is {stated})"
        name = model.config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        other = f", or raise model.overrides.{name} to {sequence_length} or more"
        other = other if not pretrained else ', or stretch its positions (docs/tasks.md, "Continue a model")'
        raise ConfigError(
            f"data.sequence_length is {sequence_length}, above the model's {why}. "
            f"Set data.sequence_length to {limit} or less{other if limit == stated else ''}"
        )
