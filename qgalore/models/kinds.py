"""What kind of thing a model folder is, and a refusal in one sentence for each kind that training cannot start from."""

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_MAX_BYTES = 1 << 26  # of a JSON file beside the weights; the largest index known has 10 MiB
_QUANTIZED = {
    "fp8": "FP8", "fbgemm_fp8": "FP8", "finegrained_fp8": "FP8", "gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4",
    "bitsandbytes": "bitsandbytes", "bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes",
    "compressed-tensors": "compressed-tensors, in another scheme than qgalore's own int8 export",
}  # fmt: skip
# How tensors end that are parts of a quantized weight: compressed-tensors, FP8, GPTQ and AWQ, bitsandbytes
OF_QUANTIZATION = (
    ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_zero_point", ".qweight", ".qzeros", ".g_idx",
    ".SCB", ".absmax", ".quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4", "_proj_blocks", "_proj_scales",
    ".input_scale",
)  # fmt: skip
START = "Start from the folder that it was quantized from, in bf16, fp16 or fp32"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises :class:`ConfigError` for anything else."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes, far more than such a file ever has")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {type(error).__name__}: {error}. Copy it again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__}, and must hold an object {{…}}. Copy it again")
    return found


def check_folder(source: str) -> bool:
    """Whether ``model.path`` is a local folder, not a hub id. Raises :class:`ConfigError` for what is no whole
    model."""
    path = Path(source).expanduser()
    if source.endswith(".gguf") or (path.is_dir() and not (path / "config.json").is_file() and has(path, "*.gguf")):
        raise ConfigError(
            f"model.path {source!r} is a GGUF model, whose weights are packed for llama.cpp and cannot be trained. "
            "Start from the Hugging Face folder that it was made from"
        )
    local = source.startswith((".", "/", "~")) or path.exists()
    if local:
        _refuse_adapter(source, path)
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"model.path {source!r} is not a Hugging Face model folder: it has no config.json. "
                "Give the folder that holds one, with the .safetensors files beside it"
            )
    return local


def has(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None


def _refuse_adapter(source: str, folder: Path) -> None:
    path = folder / "adapter_config.json"
    if path.is_file():
        base = read_json(path).get("base_model_name_or_path")
        raise ConfigError(
            f"model.path {source!r} is an adapter (LoRA or its like: it has adapter_config.json), not a whole model. "
            f"Start from its base model{f' ({base})' if base else ''}, or merge it into that once with peft's "
            "merge_and_unload and save_pretrained"
        )


def refuse_quantized(folder: Path, fields: dict[str, Any]) -> None:
    """Raise :class:`ConfigError` for a folder whose ``config.json``, ``fields``, says that its weights are quantized,
    unless they are those of qgalore's int8 export."""
    quantization = fields.get("quantization_config") or fields.get("compression_config")
    if quantization is None or is_int8_export(fields):
        return
    method = quantization.get("quant_method", "") if isinstance(quantization, dict) else quantization
    name = _QUANTIZED.get(str(method), f"quantized ({method or 'by a method that it does not name'})")
    raise ConfigError(f"model.path {str(folder)!r} holds {name} weights, which cannot be trained. {START}")


def is_int8_export(fields: dict[str, Any]) -> bool:
    """Whether a ``config.json`` says that the weights are as ``export.int8`` writes them: symmetric int8, packed four
    to a word, one scale for each group or row."""
    quantization = fields.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "compressed-tensors":
        return False
    groups = quantization.get("config_groups")
    if quantization.get("format") != "pack-quantized" or not isinstance(groups, dict) or not groups:
        return False
    return all(isinstance(group, dict) and _plain_int8(group) for group in groups.values())


def _plain_int8(group: dict[str, Any]) -> bool:
    weights = group.get("weights")
    if not isinstance(weights, dict) or group.get("input_activations") or group.get("output_activations"):
        return False
    wanted = {"num_bits": 8, "type": "int", "symmetric": True}
    return (
        all(weights.get(key) == value for key, value in wanted.items())
        and weights.get("strategy") in ("group", "channel")
        and not weights.get("actorder")
        and not weights.get("dynamic")
    )


def refuse_code(folder: Path, fields: dict[str, Any], known: bool) -> None:
    """Raise :class:`ConfigError` for a folder whose architecture is not one of transformers' own (``known``) and comes
    as Python code. The code never runs, and no key lets it."""
    if known:
        return
    where = fields.get("auto_map")
    if where:
        files = ", ".join(sorted(path.name for path in folder.glob("*.py"))) or str(where)
        raise ConfigError(
            f"model.path {str(folder)!r} brings its own Python code ({files}), which qgalore never runs; no key lets "
            f"it. transformers itself has no architecture {fields.get('model_type')!r}: start from a model that it has"
        )
