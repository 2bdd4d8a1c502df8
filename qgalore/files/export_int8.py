"""Export of the int8 weights as they are: compressed-tensors ``pack-quantized``, W8A16, for vLLM and transformers.

q and the scales survive bit for bit: four q + 128 to an int32 word, little-endian, along in_features (padded with
zeros), bf16 scales (out, groups). Group sizes map to the strategy ``group``, one group a row to ``channel``. The format
knows linear layers only: an int8 embedding, and a head tied to it, are written dense in bf16.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError
from ..lowrank.layers.embedding import LowRankEmbedding, TiedHead
from ..lowrank.layers.experts import Experts
from ..lowrank.layers.linear import LowRankLinear
from . import export_folder as folders
from .export_tensors import other_tensors
from .safetensors import Deferred

READERS = "vLLM, and transformers with the package compressed-tensors"
Scheme = tuple[str, int | None]  # strategy and group size


def pack(q: Tensor) -> Tensor:
    """int8 (out, in) → int32 (out, ⌈in/4⌉)."""
    unsigned = (q.to(torch.int16) + 128).to(torch.uint8)
    return nn.functional.pad(unsigned, (0, -q.shape[1] % 4)).contiguous().view(torch.int32)


def int8_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The linear layers with int8 weights, by name. Raises :class:`ConfigError` for what the format has no place
    for."""
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear) and not isinstance(m, LowRankEmbedding)
    }
    if any(isinstance(module, Experts) for module in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} is a mixture of experts, and its stacked experts have no place in the "
            "compressed-tensors format that both transformers and vLLM read; export with --format hf"
        )
    if not layers or any(layer.weight_scale is None for layer in layers.values()):
        raise ConfigError("this model's weights are not int8 (method qgalore keeps them so); export with --format hf")
    if transposed := [name for name, layer in layers.items() if layer.transposed]:
        raise ConfigError(
            f"{transposed[0]} is a Conv1D, and compressed-tensors knows linear layers only; export with --format hf"
        )
    return layers


def _heads(model: nn.Module) -> set[str]:
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return {name for name, module in model.named_modules() if head is not None and module is head}


def _embeddings(model: nn.Module) -> dict[str, LowRankEmbedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankEmbedding)}


def _scheme(layer: LowRankLinear) -> Scheme:
    assert layer.weight_scale is not None, "int8_layers has let a floating-point weight pass"
    groups = layer.weight_scale.shape[1]
    return ("channel", None) if groups == 1 else ("group", layer.in_features // groups)


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    strategy, size = scheme
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "group_size": size}
    return {"targets": targets, "weights": {**weights, "dynamic": False}}


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config`` of config.json. Raises as :func:`int8_layers`.

    The most common scheme targets ``Linear`` and comes last. Layers of another one are named, by the last part of their
    name where all layers with that part agree. An int8 head is named too, and linear layers kept in bf16 are ignored by
    name.
    """
    layers = int8_layers(model)
    schemes = {name: _scheme(layer) for name, layer in layers.items()}
    common = Counter(schemes.values()).most_common(1)[0][0]
    heads = _heads(model)
    by_ending: dict[str, set[Scheme]] = {}
    for name, scheme in schemes.items():
        by_ending.setdefault(name.rsplit(".", 1)[-1], set()).add(scheme)
    named: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        ending = name.rsplit(".", 1)[-1]
        target = f"re:.*\\.{ending}$" if len(by_ending[ending]) == 1 and "." in name else name
        if name in heads:  # no "Linear" in vLLM, whatever its scheme
            target = f"re:.*{re.escape(ending)}$"
        if (scheme != common or name in heads) and target not in named.setdefault(scheme, []):
            named[scheme].append(target)
    # transformers takes the first group that matches, and warns where a later one matches too: names come first.
    targets = [(scheme, names) for scheme, names in named.items() if scheme != common]
    targets.append((common, [*named.get(common, []), "Linear"]))
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(s, t) for i, (s, t) in enumerate(targets)},
        "ignore": [name for name, module in model.named_modules() if isinstance(module, nn.Linear | TiedHead)],
    }


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, report: Callable[[str], None] = print
) -> None:
    """Write ``folder``. Ignored layers are reported. Raises :class:`ConfigError` (see :func:`quantization_config`)."""
    quantization = quantization_config(model)
    embeddings = _embeddings(model)
    dense = ", ".join([*embeddings, *quantization["ignore"]])
    report(f"int8 export: not quantized, kept in bf16: {dense or 'nothing'}")
    entries: dict[str, Tensor | Deferred] = {}
    for name, layer in int8_layers(model).items():
        assert layer.weight_scale is not None, "int8_layers has let a floating-point weight pass"
        shape = (layer.out_features, -(-layer.in_features // 4))
        entries[f"{name}.weight_packed"] = Deferred(torch.int32, shape, lambda m=layer: pack(m.weight.detach()))
        entries[f"{name}.weight_scale"] = layer.weight_scale
        entries[f"{name}.weight_shape"] = torch.tensor([layer.out_features, layer.in_features], device="cpu")
    for name, layer in embeddings.items():
        make = partial(layer.dense_weight, torch.bfloat16)
        entries[f"{name}.weight"] = Deferred(torch.bfloat16, tuple(layer.weight.shape), make)
    entries |= other_tensors(model, torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    folders.write(model, tokenizer, folder, entries, dtype=torch.bfloat16, quantization=quantization)
