"""What a run changes of a pretrained model: fields of its ``config.json`` that leave every tensor as it is.

There is no list of such fields. The stored and the changed config are both built on the meta device, and the change is
allowed if all parameters and all buffers that files hold keep their names and shapes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import ConfigError, counted
from .shapes import check_names, first_line, stored_config, stored_fields
from .sizes import check_fields, check_ids

Build = Callable[[PretrainedConfig], nn.Module]  # on the meta device
_ROPE = "rope_parameters"
_OLD_ROPE = "rope_scaling"  # what transformers 4 calls it
_INSIDE_ROPE = ("rope_theta", "partial_rotary_factor")  # fields of their own in transformers 4
_NEEDS_LENGTH = ("yarn", "llama3", "longrope")  # scalings that start from the length that the model was trained with


def overridden_config(
    folder: Path, overrides: dict[str, Any], build: Build, report: Callable[[str], None]
) -> PretrainedConfig:
    """``folder``'s ``config.json`` as :func:`stored_config` reads it, with ``overrides`` laid over it, each with a
    line. Raises :class:`ConfigError` for what the architecture does not take, and a change after which ``build`` makes
    other tensors."""
    stored = stored_config(folder, report)
    if not overrides:
        return stored
    fields = stored_fields(folder)
    for name in ("auto_map", "quantization_config", "compression_config"):  # as stored_config takes them out
        fields.pop(name, None)
    check_fields(overrides, "model.overrides")
    laid = _laid_over(stored, fields, overrides, "model.path")
    check_ids(laid, "model.overrides")
    try:
        changed = type(stored).from_dict(laid)
    except Exception as error:  # each architecture's class raises its own kinds
        raise ConfigError(
            f"model.overrides {overrides} give no valid {type(stored).__name__}: {first_line(error)}. Give values that "
            "it takes"
        ) from error
    if different := differing_tensors(build(stored), build(changed)):
        raise ConfigError(
            f"model.overrides {overrides} would change {counted(len(different), 'tensor')} of the pretrained model, "
            f"{'; '.join(different[:3])}. Training continues from these tensors, so only fields that leave all of them "
            f"as they are may change, such as dropouts or rope_parameters. {_remedy(overrides)}"
        )
    changed.name_or_path = stored.name_or_path
    for line in _lines(stored, changed, overrides):
        report(line)
    return changed


def _remedy(overrides: dict[str, Any]) -> str:
    if "vocab_size" in overrides:
        return "Leave vocab_size out; data.added_tokens and model.grow_vocabulary give the model more rows"
    return "Leave the field out, or train a model of that shape from scratch with model.config"


def _laid_over(
    stored: PretrainedConfig, fields: dict[str, Any], overrides: dict[str, Any], instead: str
) -> dict[str, Any]:
    """``fields``, of which transformers makes ``stored``, with ``overrides`` in them."""
    check_names(stored, overrides, instead, also=(_OLD_ROPE, *_INSIDE_ROPE) if hasattr(stored, _ROPE) else ())
    found = dict(fields)
    if "head_dim" in stored.to_dict():  # derived from the number of heads, it would split the same weights otherwise
        found.setdefault("head_dim", stored.head_dim)
    if "layer_types" in found and "layer_types" not in overrides and _is_derived(stored, found, "layer_types"):
        del found["layer_types"]  # which layers have a window follows from the fields that say so
    for name, value in overrides.items():
        part = getattr(stored, name, None)
        if isinstance(part, PretrainedConfig) and isinstance(value, dict):
            found[name] = _laid_over(part, dict(fields.get(name) or {}), value, instead)
        else:
            found[name] = value
    if hasattr(stored, _ROPE) and {_ROPE, _OLD_ROPE, *_INSIDE_ROPE} & set(overrides):
        for name in (_OLD_ROPE, *_INSIDE_ROPE):
            found.pop(name, None)
        found[_ROPE] = _rotary(stored, overrides)
    return found


def _is_derived(stored: PretrainedConfig, fields: dict[str, Any], name: str) -> bool:
    """Whether transformers finds the same value for ``name`` where it is not given."""
    try:
        derived = type(stored).from_dict({key: value for key, value in fields.items() if key != name})
    except Exception:  # an architecture that needs the field
        return False
    return getattr(derived, name, None) == getattr(stored, name, None)


def _rotary(stored: PretrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters with ``overrides`` laid over those of ``stored``. A scaling of another type replaces the
    stored one and keeps the base; it starts from the length that the model has now."""
    if {_ROPE, _OLD_ROPE} <= set(overrides):
        raise ConfigError(f"model.overrides: {_ROPE} and {_OLD_ROPE} are two names of one field; give one of them")
    given = overrides.get(_ROPE, overrides.get(_OLD_ROPE)) or {}
    if not isinstance(given, dict):
        raise ConfigError(
            f"model.overrides.{_ROPE} is {given!r}; it must be a mapping such as {{rope_type: yarn, factor: 4}}"
        )
    inside = {name: overrides[name] for name in _INSIDE_ROPE if name in overrides}
    now = getattr(stored, _ROPE) or {}
    kinds = [name for name, value in now.items() if isinstance(value, dict)]
    if not kinds:
        anew = (overrides.keys() & {_ROPE, _OLD_ROPE}) and not given  # null: no scaling
        return _one_rotary(stored, now, {**({"rope_type": "default"} if anew else {}), **given, **inside})
    if inside or set(given) - set(kinds):
        raise ConfigError(
            f"model.overrides.{_ROPE}: this model rotates {' and '.join(kinds)} layers in ways of their own; give a "
            f"mapping for each kind that changes, such as {{{kinds[0]}: {{rope_type: yarn, factor: 4}}}}"
        )
    return {kind: _one_rotary(stored, now[kind], given.get(kind) or {}) for kind in now}


def _one_rotary(stored: PretrainedConfig, now: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    given = dict(given)
    kind = given.pop("type", None) or now.get("rope_type", "default")
    kind = given.setdefault("rope_type", kind)
    if kind != now.get("rope_type", "default"):
        known = ["default", *ROPE_INIT_FUNCTIONS]
        if kind not in known:
            raise ConfigError(f"model.overrides.{_ROPE}: rope_type is {kind!r}, and there are {', '.join(known)}")
        now = {name: now[name] for name in _INSIDE_ROPE if name in now}
    found = {**now, **given}
    if kind in _NEEDS_LENGTH and (length := getattr(stored, "max_position_embeddings", None)) is not None:
        found.setdefault("original_max_position_embeddings", length)
    return found


def differing_tensors(before: nn.Module, after: nn.Module) -> list[str]:
    """What is different between the tensors that files hold of two models, in words. Tied ones count once."""
    old, new = _shapes(before), _shapes(after)
    found = []
    for name in dict.fromkeys([*old, *new]):
        if name not in new:
            found.append(f"{name} {old[name]} would be gone")
        elif name not in old:
            found.append(f"{name} {new[name]} would be new")
        elif old[name] != new[name]:
            found.append(f"{name} {old[name]} → {new[name]}")
    return found


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    own = dict(model.named_parameters())
    buffers = {name: value for name, value in model.state_dict().items() if name not in everywhere}
    return {name: tuple(value.shape) for name, value in {**own, **buffers}.items()}


def _lines(stored: PretrainedConfig, changed: PretrainedConfig, overrides: dict[str, Any]) -> list[str]:
    """A line for every field that has another value now, and for an override that changes nothing."""
    old, new = stored.to_dict(), changed.to_dict()
    given = {_ROPE if name in (_OLD_ROPE, *_INSIDE_ROPE) and _ROPE in new else name for name in overrides}
    found = []
    for name in dict.fromkeys([*sorted(given), *new]):
        before, after = old.get(name), new.get(name)
        if before != after:
            found.append(f"{name}: {before!r} → {after!r} (model.overrides)")
        elif name in given:
            found.append(f"{name} is {after!r} already, so model.overrides changes nothing there")
    return found
