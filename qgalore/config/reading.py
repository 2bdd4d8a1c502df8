"""From a YAML file and ``key.sub=value`` overrides to a validated configuration, and back."""

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import plain_yaml
from ..errors import ConfigError, counted
from . import incompatible, secrets
from .data_section import Source
from .duration import asked
from .messages import field_at, is_section, problems_of, short, shown
from .schema import is_textual
from .sections import Config

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # inside an installed package, beside it in the sources
PACKAGED = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
MAX_BYTES = 1 << 20
DEEPEST = 16  # names in an override


def find(name: str) -> Path:
    """The file meant by ``--config NAME``: as given, or one that comes with qgalore (with or without ``.yaml``)."""
    given = Path(name).expanduser()
    for candidate in (given, PACKAGED / name, PACKAGED / f"{name}.yaml"):
        if _is(candidate, Path.is_file):
            return candidate
    if _is(given, Path.is_dir):
        inside = sorted(path for path in given.glob("*.yaml") if path.is_file())
        hint = f"for example {inside[0]}" if inside else "a run's folder has its own as config.yaml"
        raise ConfigError(f"--config {name}: this is a folder, not a file. Name a YAML file, {hint}.")
    if _is(given, Path.exists):
        raise ConfigError(f"--config {name}: this is a device or a pipe, not a file. Name a YAML file.")
    known = sorted(path.name for path in PACKAGED.glob("*.yaml"))
    close = difflib.get_close_matches(name[:100], known + [k.removesuffix(".yaml") for k in known], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(
        f"--config {short(name, 200)}: no such file here, and none that comes with qgalore. {hint}"
        f"There are: {', '.join(known)}"
    )


def _is(path: Path, what: Any) -> bool:
    try:
        return what(path)
    except (OSError, ValueError):  # a name that is too long, say
        return False


def _is_text(path: tuple[str, ...]) -> bool:
    field = field_at(path) or field_at(path[:-1])  # a key, or a name in a mapping that is the value of one
    return field is not None and not is_section(field.annotation) and is_textual(field.annotation)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Name a file that can.") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES >> 20} MiB, so it is no configuration. Name a YAML file.")
    try:
        data = plain_yaml.read(content.decode("utf-8"), _is_text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start + 1}). Save it as UTF-8.") from error
    except plain_yaml.NotReadable as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(data, dict):
        what = "nothing" if data is None else shown(data)
        raise ConfigError(f"{path} holds {what}, not a mapping of sections such as train: {{lr: 0.001}}")
    return data


def _override(data: dict[str, Any], assignment: str) -> None:
    name, equals, text = assignment.partition("=")
    parts = name.split(".")
    if not equals or not all(parts) or len(parts) > DEEPEST:
        raise ConfigError(
            f"override {short(assignment)!r} is not of the form key.sub=value, for example train.lr=0.001"
        )
    path = tuple(parts)
    try:
        value = _value(text, path)
    except plain_yaml.NotReadable as error:
        raise ConfigError(f"override {short(assignment)!r}: the value is not YAML: {error}") from error
    for depth, part in enumerate(parts[:-1], 1):
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            what = "a list" if isinstance(data, list) else "a value"
            raise ConfigError(
                f"override {short(assignment)!r}: {part} is {what}, not a section. Give all of it at once, as "
                f"{'.'.join(parts[:depth])}=…"
            )
    data[parts[-1]] = value


def _value(text: str, path: tuple[str, ...]) -> Any:
    """The value of an override, None where nothing stands behind the equals sign."""
    value = plain_yaml.read(text, lambda below: _is_text((*path, *below)))
    sentence = isinstance(value, dict) and not text.lstrip().startswith("{")  # "Question: what?" is no mapping here
    return text if sentence and _is_text(path) else value


def parse(data: Any, origin: str) -> Config:
    """Validate ``data``; raises one :class:`ConfigError` that lists every problem, prefixed with ``origin``."""
    try:
        config = Config.model_validate(data)
        problems = incompatible.problems(config)
    except ValidationError as error:
        problems = problems_of(error, data)
    if problems:
        count = counted(len(problems), "problem")
        raise ConfigError(f"{origin}: {count}\n" + "\n".join(f"  {line}" for line in problems))
    return config


def _expanded(path: str) -> str:
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:  # the home of a user that is not there
        raise ConfigError(f"{short(path)!r} cannot be a path: {error} Write the folder out.") from error


def _anchor(path: Any, folder: Path) -> Any:
    """A data path that does not exist as given but does beside the configuration file means the latter."""
    if path is None:
        return None
    if isinstance(path, Source):
        return path.model_copy(update={"path": _anchor(path.path, folder)})
    if isinstance(path, list):
        return [_anchor(one, folder) for one in path]
    if isinstance(path, dict):
        return {name: _anchor(one, folder) for name, one in path.items()}
    path = _expanded(path)
    try:
        beside = not Path(path).exists() and (folder / path).exists()
    except OSError as error:
        raise ConfigError(f"{short(path)!r} cannot be a path: {error.strerror}. Give a shorter one.") from error
    return str(folder / path) if beside else path


def load(name: str, overrides: list[str] | None = None) -> Config:
    """Read the file for ``name``, apply ``key.sub=value`` overrides, validate. Paths are relative to the working
    directory, or else to the file's folder."""
    path = find(name)
    data = _read(path)
    for assignment in overrides or []:
        _override(data, assignment)
    config = parse(data, str(path))
    secrets.refuse(config, str(path))
    anchored = {k: _anchor(getattr(config.data, k), path.parent) for k in ("train", "valid", "tokenizer")}
    model = {k: _anchor(getattr(config.model, k), path.parent) for k in ("config", "path")}
    anchored["cache_dir"] = _expanded(config.data.cache_dir)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": _expanded(config.run.dir)}),
            "data": config.data.model_copy(update=anchored),
            "model": config.model.model_copy(update=model),
        }
    )


def dump(config: Config) -> str:
    """The configuration as it was asked for, as YAML that :func:`load` reads back."""
    return plain_yaml.write(asked(config).model_dump(mode="json"))
