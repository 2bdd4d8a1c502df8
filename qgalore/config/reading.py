"""From a YAML file and ``key.sub=value`` overrides to a validated configuration, and back."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import ConfigError
from .sections import Config, Section

PACKAGED = Path(__file__).resolve().parent.parent.parent / "configs"


def find(name: str) -> Path:
    """The file meant by ``--config NAME``: as given, or in the project's ``configs/`` (with or without ``.yaml``)."""
    for candidate in (Path(name), PACKAGED / name, PACKAGED / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(path.name for path in PACKAGED.glob("*.yaml"))
    close = difflib.get_close_matches(name, known + [k.removesuffix(".yaml") for k in known], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"--config {name}: no such file here or in configs/. {hint}There are: {', '.join(known)}")


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the last of two equal keys win silently."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {min(twice)!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} holds {'nothing' if data is None else type(data).__name__}, not a mapping of sections"
        )
    return data


def _override(data: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {assignment!r} is not of the form key.sub=value, for example train.lr=0.001")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {assignment!r}: the value is not YAML: {error}") from error
    for part in parts[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {assignment!r}: {part} is a value, not a section")
    data[parts[-1]] = value


def _section_at(location: tuple) -> type[Section] | None:
    section: Any = Config
    for part in location:
        field = section.model_fields.get(part) if isinstance(section, type) and issubclass(section, Section) else None
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, Section)):
            return None
    return section


def _all_keys(section: type[Section] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _describe(error: dict[str, Any]) -> str:
    location = tuple(error["loc"])
    # past a section and its key, pydantic names the members of a union, which mean nothing to a user
    named = location[:2] if _section_at(location[:1]) else location[:1]
    key = ".".join(str(part) for part in (location if error["type"] == "extra_forbidden" else named))
    if error["type"] == "extra_forbidden":
        section = _section_at(location[:-1])
        names = list(section.model_fields) if section else []
        near = difflib.get_close_matches(str(location[-1]), names, n=1)
        close = [".".join([*map(str, location[:-1]), near[0]])] if near else []
        close = close or [k for k in _all_keys() if k.rsplit(".", 1)[-1] == location[-1]][:1]
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(names)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing" and len(location) <= 2:
        return f"{key}: missing, and it has no default"
    return f"{key}: {error['msg']} (got {error['input']!r})"


def parse(data: dict[str, Any], origin: str) -> Config:
    """Validate ``data``; raises one :class:`ConfigError` that lists every problem, prefixed with ``origin``."""
    try:
        config = Config.model_validate(data)
        problems = config.problems()
    except ValidationError as error:
        # a union reports one problem for each of its members; one line for each key is enough
        problems = list({e["loc"][:2]: _describe(e) for e in reversed(error.errors())}.values())[::-1]
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{origin}: {count}\n" + "\n".join(f"  {line}" for line in problems))
    return config


def _anchor(path: str | None, folder: Path) -> str | None:
    """A data path that does not exist as given but does beside the configuration file means the latter."""
    if path is None:
        return None
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    try:
        beside = not Path(path).exists() and (folder / path).exists()
    except OSError as error:
        raise ConfigError(f"{path[:60]!r} cannot be a path: {error.strerror}") from error
    return str(folder / path) if beside else path


def load(name: str, overrides: list[str] | None = None) -> Config:
    """Read the file for ``name``, apply ``key.sub=value`` overrides, validate. Paths are relative to the working
    directory, or else to the file's folder."""
    path = find(name)
    data = _read(path)
    for assignment in overrides or []:
        _override(data, assignment)
    config = parse(data, str(path))
    anchored = {k: _anchor(getattr(config.data, k), path.parent) for k in ("train", "valid", "tokenizer")}
    model = {k: _anchor(getattr(config.model, k), path.parent) for k in ("config", "path")}
    anchored["cache_dir"] = str(Path(config.data.cache_dir).expanduser())
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(Path(config.run.dir).expanduser())}),
            "data": config.data.model_copy(update=anchored),
            "model": config.model.model_copy(update=model),
        }
    )


def dump(config: Config) -> str:
    """The configuration as YAML that :func:`load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
