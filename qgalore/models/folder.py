"""The parameters of a model out of a Hugging Face folder's tensors, a few rows at a time."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ConfigError, counted
from ..files.headers import Entry, is_finite, same
from .packed import Packed
from .streaming import CannotStreamError, Rows

# Where a mixture's experts lie in files that keep them apart: Mixtral's kind, and Qwen's, which most others follow
_EXPERTS = {
    ".block_sparse_moe.": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    ".mlp.": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
}
Stored = Entry | Packed


@dataclass(frozen=True)
class _Stack:
    """Matrices of one width, one below the other, that make up a tensor of ``shape``."""

    parts: list[Stored]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """That of all, if they agree."""
        kinds = {part.dtype for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else None

    def rows(self, a: int, b: int) -> Tensor:
        found, first = [], 0
        for part in self.parts:
            low, high = max(a - first, 0), min(b - first, part.shape[0])
            if low < high:
                found.append(part.rows(low, high))
            first += part.shape[0]
        return torch.cat(found)


def _experts(tensors: dict[str, Stored], name: str, shape: tuple[int, ...]) -> _Stack | None:
    """The stacked tensor ``name`` (E, out, in) from one file tensor for each expert, as most folders have them, and
    transformers writes them; None if they are not there, or do not add up to ``shape``."""
    module, _, key = name.rpartition(".")
    for place, of_key in _EXPERTS.items():
        parts = [
            tensors.get(f"{module.replace('.mlp.', place)}.{expert}.{part}.weight")
            for expert in range(shape[0])
            for part in of_key.get(key, ())
        ]
        heights = sum(part.shape[0] for part in parts if part is not None)
        if parts and None not in parts and all(part.shape[1:] == shape[2:] for part in parts):
            return _Stack(parts, (shape[0], heights // shape[0], shape[2]))
    return None


def _spellings(name: str, prefix: str) -> list[str]:
    """The names that a file may give to the parameter ``name``: with and without the base model's prefix, and a
    mixture's router as the hub has it."""
    plain = [name, name.removeprefix(prefix), prefix + name]
    return list(dict.fromkeys(plain + [t.replace(".mlp.gate.", ".block_sparse_moe.gate.") for t in plain]))


def _agree(one: Stored, other: Stored) -> bool:
    return one == other or (isinstance(one, Entry) and isinstance(other, Entry) and same(one, other))


def _one_of(folder: Path, tensors: dict[str, Stored], names: list[str]) -> Stored | None:
    """The first tensor under any of ``names``. Raises :class:`ConfigError` if there are several that differ."""
    present = [name for name in names if name in tensors]
    for name in present[1:]:
        if not _agree(tensors[present[0]], tensors[name]):
            raise ConfigError(
                f"model.path {str(folder)!r}: {present[0]} and {name} would both do, and hold different values. "
                "Remove the one that is not meant from the files"
            )
    return tensors[present[0]] if present else None


def is_tied(model: nn.Module) -> bool:
    """Whether the output head's weight is the input embedding's."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head is not None and getattr(head, "weight", None) is getattr(model.get_input_embeddings(), "weight", None)


def untie_as_stored(model: nn.Module, tensors: dict[str, Stored]) -> str | None:
    """Give a head that ``model``, on the meta device, ties to its embedding a weight of its own if the files hold
    another one for it, as transformers does; a line that says so, or None where nothing changed."""
    if not is_tied(model):
        return None
    modules = {module: name for name, module in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    head = model.get_output_embeddings()
    place, of_embedding = (f"{modules[module]}.weight" for module in (head, model.get_input_embeddings()))
    found = [
        next((tensors[t] for t in _spellings(name, prefix) if t in tensors), None) for name in (place, of_embedding)
    ]
    if None in found or _agree(*found):
        return None
    head.weight = nn.Parameter(torch.empty_like(head.weight))
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys.pop(place, None)
    return (
        f"config.json ties the head to the embedding, but the files hold other values in {place}: the head is kept as "
        "it is, untied"
    )


def stored(
    folder: Path,
    model: nn.Module,
    report: Callable[[str], None],
    optional: Collection[str] = (),
    *,
    tensors: dict[str, Stored],
) -> Iterator[tuple[str, Rows]]:
    """A source of ``model``'s parameters (see :mod:`.streaming`) from ``tensors``, those of ``folder``'s files.

    Names may differ by the base model's prefix; tensors without use are reported. Parameters in ``optional`` are left
    out where the files have none that fits. Raises :class:`ConfigError` for files of another model, and
    :class:`CannotStreamError` if a parameter has no tensor under its own name: transformers may know another.
    """
    prefix = f"{model.base_model_prefix}."
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    known: set[str] = set()
    chosen: list[tuple[str, Stored | _Stack]] = []
    absent: list[str] = []
    for name, parameter in model.named_parameters():
        tries = [t for n in aliases[id(parameter)] for t in _spellings(n, prefix)]
        known |= set(tries)
        entry, shape = _one_of(folder, tensors, tries), tuple(parameter.shape)
        if entry is None and parameter.ndim == 3:
            stacks = (_experts(tensors, t, shape) for t in tries)
            entry = next((stack for stack in stacks if stack is not None), None)
        if name in optional and (entry is None or entry.shape != shape):
            continue
        if entry is None:
            absent.append(name)
            continue
        if entry.shape != shape:
            raise ConfigError(
                f"model.path {str(folder)!r}: {name} is {entry.shape} in the files and {shape} in "
                "config.json: mismatched keys. The folder belongs to another architecture"
            )
        if entry.dtype is None or not entry.dtype.is_floating_point:
            raise CannotStreamError(f"{name} is not stored in (one kind of) floating point")
        chosen.append((name, entry))
    used = {id(part) for _, entry in chosen for part in (entry.parts if isinstance(entry, _Stack) else [entry])}
    known |= set(_kept_buffers(model))
    unused = [n for n, e in tensors.items() if id(e) not in used and n not in known and not n.endswith("inv_freq")]
    if absent and not unused:  # nothing is left that transformers could know under another name
        raise ConfigError(lacking(folder, "missing keys", absent))
    if absent:
        raise CannotStreamError(f"{folder} has no tensor named {absent[0]}")
    if unused:
        many = counted(len(unused), f"tensor in {folder} has", f"tensors in {folder} have")
        report(f"{many} no place in the model and will not be read, for example {unused[0]}")

    return ((name, entry if isinstance(entry, Packed) else entry.rows) for name, entry in chosen)


def lacking(folder: Path, what: str, names: Collection[str]) -> str:
    """The message about weights that a folder does not hold, or not as the model needs them."""
    listed = ", ".join(sorted(names)[:3])
    many = counted(len(names), "weight has", "weights have")
    return (
        f"model.path {str(folder)!r}: {many} {what}, for example {listed}; they would start from "
        "random values. The folder is incomplete or belongs to another architecture: copy it again, whole"
    )


def _kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a model's files hold, such as the biases of a mixture's routers."""
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in own}


def load_buffers(model: nn.Module, tensors: dict[str, Stored]) -> None:
    """Set the buffers that the files hold. Raises :class:`CannotStreamError` for one that they do not hold under its
    own name, and :class:`ConfigError` for values that are not finite."""
    prefix = f"{model.base_model_prefix}."
    for name, buffer in _kept_buffers(model).items():
        entry = next((tensors[t] for t in _spellings(name, prefix) if t in tensors), None)
        if entry is None or entry.dtype is None or entry.shape != tuple(buffer.shape):
            raise CannotStreamError(f"its buffer {name} is not in the files under its own name and shape")
        values = torch.cat([entry.rows(a, b).reshape(-1) for a, b in entry.tiles()]).view(buffer.shape)
        if not is_finite(values):
            raise ConfigError(f"{name} cannot be used: it holds NaN or infinity")
        buffer.copy_(values)
