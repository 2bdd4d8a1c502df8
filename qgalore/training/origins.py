"""What a run's model and data are called elsewhere, and the licence of its base, for a model card.

They are written down when the run begins: later a folder may be gone, and its name would pass for a hub's id.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..config import Config
from ..data.paths import looks_like_path
from ..data.sources import ENDINGS
from ..errors import ConfigError, without_secrets
from ..models.loading import local_folder

NAME = "origins.json"  # in a run's folder
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")


def of(config: Config) -> dict[str, Any]:
    """``base`` or ``architecture``, the other null; ``base_id``, the base's id if it is one of the hub; ``licence``,
    fields of a card; the names of ``train`` and ``held_out``; and ``datasets``, those of them that are ids of the hub.
    Of a path on this machine the last part is named alone."""
    section = config.model
    train, held_out = ([one.path for one in part.values()] for part in (config.data.sources, config.data.held_out))
    tables = (*ENDINGS, ".tsv", ".csv")
    hub = [source.partition(":")[0] for source in (*train, *held_out) if not looks_like_path(source, tables)]
    return {
        "base": None if section.path is None else _base(section.path),
        "base_id": None if section.path is None else _base_id(section.path),
        "architecture": None if section.config is None else _last(section.config.removesuffix("config.json")),
        "licence": {} if section.path is None else _licence(section.path),
        "train": [_shown(source, tables) for source in train],
        "held_out": [_shown(source, tables) for source in held_out],
        "datasets": list(dict.fromkeys(filter(is_id, hub))),
    }


def read(folder: Path) -> dict[str, Any]:
    """The origins noted in a run's ``folder``; empty if there are none, as in older runs."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_id(name: str) -> bool:
    """Whether the hub could have a repository of that name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _shown(source: str, endings: tuple[str, ...]) -> str:
    return _last(source) if looks_like_path(source, endings) else source


def _last(path: str) -> str:
    return os.path.basename(os.path.abspath(os.path.expanduser(path)))


def _base(path: str) -> str:
    return _base_id(path) or _last(path)


def _base_id(path: str) -> str | None:
    """The hub's id of a model: ``path`` itself, or that of the hub's cache in which ``path`` lies."""
    if not Path(path).expanduser().is_dir():
        return path if is_id(path) else None
    found = _SNAPSHOT.search(Path(path).expanduser().resolve().as_posix() + "/")
    return f"{found[1]}/{found[2]}" if found else None


def _licence(path: str) -> dict[str, str]:
    """What the base model's own card says of its licence, or else its config.json."""
    try:
        folder = local_folder(path)
    except ConfigError:  # the hub cannot be reached any more: that is no reason to stop a run
        return {}
    stated = _stated(metadata_load, folder / "README.md") or _stated(_fields, folder / "config.json")
    base, link = _base_id(path), stated.get("license_link", "")
    if link and "://" not in link:  # a file beside the base model
        stated.pop("license_link")
        if base is not None:
            stated["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    return stated


def _fields(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _stated(read: Callable[[Path], Any], path: Path) -> dict[str, str]:
    """The fields about a licence in a file, which somebody else wrote; none if it is not what it should be."""
    try:
        found = read(path)
        fields = {key: found.get(key) for key in ("license", "license_name", "license_link")}
    except Exception:  # of YAML, JSON, the disk or the encoding
        return {}
    stated = {key: value for key, value in fields.items() if isinstance(value, str) and 0 < len(value) < 300}
    clean = all(without_secrets(value) == value for value in stated.values())
    return stated if "license" in stated and clean else {}
