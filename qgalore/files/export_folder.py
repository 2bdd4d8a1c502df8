"""A folder that other programs read: it appears whole or not at all, and says what transformers 4 looks for."""

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from . import atomic
from .safetensors import file_bytes, write_safetensors

GENERATION = "generation_config.json"
STORED = "qgalore"  # the quantization method that a converted model's own config names
COMPANIONS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?")
_METADATA = {"format": "pt"}


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A hidden sibling to write in; when the block ends well its files are in ``folder``.

    A folder that does not exist or is empty appears by one renaming. In one that holds other files each file of the
    same name is replaced at once, and weights of an earlier save that are not written anew are deleted, as transformers
    does.
    """
    empty = not folder.exists() or not any(folder.iterdir())
    place = folder if empty else atomic.sibling(folder, "tmp")
    try:
        with atomic.replacing_folder(place) as building:
            yield building
        if not empty:
            _take_over(place, folder)
    finally:
        if not empty:
            shutil.rmtree(place, ignore_errors=True)


def _take_over(building: Path, folder: Path) -> None:
    fresh = {path.name for path in building.iterdir()}
    for stale in [p for p in folder.iterdir() if _WEIGHTS.fullmatch(p.name) and p.name not in fresh]:
        stale.unlink()
    for path in sorted(building.iterdir()):
        target = folder / path.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(path, target)


def take_along(source: Path, folder: Path) -> None:
    """Copy the processor files that stand in ``source`` into ``folder``."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)  # contents only: the permissions are those of new files


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    entries: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write ``entries`` (safetensors, streamed), ``config.json``, the generation config and the tokenizer into
    ``folder``, which exists. Raises ``OSError``."""
    atomic.need_room(file_bytes(entries, _METADATA), folder)
    config = plain_config(model)
    config.dtype, config.architectures = dtype, [type(model).__name__]
    if quantization is not None:
        config.quantization_config = quantization
    config.save_pretrained(folder)
    _add_fields(folder / "config.json", _fields_of_4(config))
    if model.can_generate():
        # Not save_pretrained, which refuses settings that from_pretrained takes.
        generation: GenerationConfig = model.generation_config
        generation.to_json_file(folder / GENERATION)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    _write_shards(folder, entries, max_shard_size)


def plain_config(model: PreTrainedModel) -> PretrainedConfig:
    """A copy of the model's config, without the mark of a converted model."""
    config = copy.deepcopy(model.config)
    if marked(config):
        del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue] - set when it was converted
    return config


def marked(config: PretrainedConfig) -> bool:
    """Whether ``config`` is that of a converted model."""
    found = getattr(config, "quantization_config", None)
    return isinstance(found, dict) and found.get("quant_method") == STORED


def mark(config: PretrainedConfig) -> None:
    """Say in ``config`` that the model's own tensors are no ordinary weights: transformers and vLLM refuse a folder
    with a quantization method that they do not know."""
    config.quantization_config = {"quant_method": STORED, "written_by": "use qgalore.save for from_pretrained"}


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """As ``save_pretrained``, with the names that transformers 4 knows too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    changes: dict[str, Any] = {}
    if fields.get("tokenizer_class") == "TokenizersBackend":
        changes["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):  # a mapping there; the list had this name
        changes["additional_special_tokens"] = fields.pop("extra_special_tokens")
    path.write_text(json.dumps({**fields, **changes}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fields_of_4(config: PretrainedConfig) -> dict[str, Any]:
    """What transformers 4 calls the fields that 5 keeps in ``rope_parameters`` and ``dtype``."""
    fields: dict[str, Any] = {"torch_dtype": str(config.dtype).removeprefix("torch.")}
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if "full_attention" in rope:  # one kind of rotary embedding for each kind of layer
        local = rope.get("sliding_attention") or {}
        rope = dict(rope["full_attention"] or {})
        if "rope_theta" in local:
            fields["rope_local_base_freq"] = local["rope_theta"]
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            fields[name] = rope.pop(name)
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = rope
    return fields


def _add_fields(path: Path, fields: dict[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**fields, **content}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_shards(folder: Path, entries: Mapping[str, Any], max_shard_size: int | str | None) -> None:
    """One file, or several of at most ``max_shard_size`` (bytes, or text such as "5GB") with their index."""
    if max_shard_size is None:
        write_safetensors(folder / "model.safetensors", entries, metadata=_METADATA)
        return
    split = split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=lambda value: value.nbytes,
        get_storage_id=lambda value: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, names in split.filename_to_tensors.items():
        write_safetensors(folder / name, {n: entries[n] for n in names}, metadata=_METADATA)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def skeleton_of(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The unconverted model on the meta device."""
    with torch.device("meta"):
        skeleton = type(model)._from_config(plain_config(model), dtype=dtype)
    skeleton.tie_weights()
    return skeleton
