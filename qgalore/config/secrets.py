"""No configuration holds a secret: it is written into the run's folder, checkpoints, exports and trackers."""

from collections.abc import Iterator
from typing import Any

from ..errors import HIDDEN, ConfigError, without_secrets
from .sections import Config


def refuse(config: Config, origin: str) -> None:
    """Raise :class:`ConfigError` if a value holds an address with a password, or a token. The message does not."""
    found = [f"  {name} is {shown}" for name, shown in _hidden("", config.model_dump(mode="json"))]
    if found:
        raise ConfigError(
            f"{origin}: a secret in a configuration would be written into the run's folder, its checkpoints and its "
            "exports\n" + "\n".join(found) + "\nTake it out. Log in with `hf auth login` or set HF_TOKEN for what lies "
            "on the hub, and download a file from elsewhere first"
        )


def _hidden(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """(key, text without its secrets) of every text in ``value`` that holds one; keys of mappings count as texts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _hidden(f"{name}.{without_secrets(str(key))}".strip("."), inner)
            yield from _hidden(name, str(key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _hidden(f"{name}[{place}]", inner)
    elif isinstance(value, str) and HIDDEN in (shown := without_secrets(value)):
        yield name, shown
