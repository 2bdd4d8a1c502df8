"""Which runs a comparison consists of: variants × rates × seeds."""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

RATE = "train.lr"


@dataclass(frozen=True)
class Variant:
    """What is compared: ``overrides`` (``key.sub=value``) of the base configuration, and the ``rates`` to try; none:
    the configuration's own."""

    name: str
    overrides: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One run: a variant at a rate (None: the configuration's own) with a seed."""

    variant: Variant
    rate: str | None
    seed: int

    @property
    def overrides(self) -> tuple[str, ...]:
        rate = () if self.rate is None else (f"{RATE}={self.rate}",)
        return (*self.variant.overrides, *rate, f"run.seed={self.seed}")

    @property
    def name(self) -> str:
        """A folder name, unlike those of other overrides."""
        digest = hashlib.sha256(json.dumps(self.variant.overrides).encode()).hexdigest()[:6]
        words = [self.variant.name[:80], digest, *([f"lr-{self.rate}"] if self.rate else []), f"seed-{self.seed}"]
        return "+".join(re.sub(r"[^\w.-]+", "-", word).strip("-.") or "x" for word in words)


def as_text(value: Any) -> str:
    """A YAML value as it stands in an override."""
    return value if isinstance(value, str) else json.dumps(value)


def read_values(text: str, origin: str) -> list[str]:
    """``a,b,[1,2]`` → its values as texts. Raises :class:`ConfigError`."""
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: {text!r} is no list of values such as 0.001,0.002") from error
    if not values:
        raise ConfigError(f"{origin}: there is no value; give at least one, such as 0.001,0.002")
    return [as_text(value) for value in values]


def varied(assignments: list[str]) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """``key=a,b`` … → the values of every key but ``train.lr``, and the rates. Raises :class:`ConfigError`."""
    keys: dict[str, list[str]] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--vary {assignment!r} is not of the form key.sub=value,value")
        if key in keys:
            raise ConfigError(f"--vary names {key} twice; give all its values at once")
        keys[key] = read_values(text, f"--vary {key}")
    rates = tuple(keys.pop(RATE, ()))
    if "run.seed" in keys:
        raise ConfigError("--vary run.seed: give the seeds as --seeds 0,1")
    return keys, rates


def product(keys: dict[str, list[str]], rates: tuple[str, ...]) -> list[Variant]:
    """A variant for every combination of values, named after those that differ; one named ``base`` without any."""
    found = []
    for values in itertools.product(*keys.values()):
        pairs = list(zip(keys, values, strict=True))
        named = [
            value if key in ("method", "lowrank.rule") else f"{key.rsplit('.', 1)[-1]} {value}"
            for key, value in pairs
            if len(keys[key]) > 1 or len(keys) == 1
        ]
        found.append(Variant(", ".join(named) or "base", tuple(f"{k}={v}" for k, v in pairs), rates))
    return found


def one_variant(text: str, rates: tuple[str, ...]) -> Variant:
    """``NAME: key=value key=value`` → a variant; ``train.lr=a,b`` among them are its rates. Raises
    :class:`ConfigError`."""
    name, colon, rest = text.partition(":")
    overrides = rest.split()
    if not colon or not name.strip() or any("=" not in one for one in overrides):
        raise ConfigError(f"--variant {text!r} is not of the form NAME: key.sub=value key.sub=value")
    own = [one.partition("=")[2] for one in overrides if one.startswith(f"{RATE}=")]
    if own:
        rates = tuple(read_values(own[-1], f"--variant {name}"))
    return Variant(name.strip(), tuple(one for one in overrides if not one.startswith(f"{RATE}=")), rates)


def variants_of_file(path: Path, rates: tuple[str, ...]) -> list[Variant]:
    """The mapping NAME → ``key=value key=value`` (or a list of them) in a YAML file. Raises :class:`ConfigError`."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"{path} holds no variants; it must map names to overrides, NAME: key=value key=value")
    found = []
    for name, overrides in data.items():
        words = " ".join(map(str, overrides)) if isinstance(overrides, list) else str(overrides or "")
        found.append(one_variant(f"{str(name).replace(':', ' ')}: {words}", rates))
    return found


def check(variants: list[Variant]) -> list[Variant]:
    """``variants``, if their names differ. Raises :class:`ConfigError`."""
    names = [variant.name for variant in variants]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two variants are called {min(twice)!r}; give them different names")
    return variants


def first_jobs(variants: list[Variant], seeds: list[int], seeds_at: str) -> list[Job]:
    """What can run at once: every rate with the first seed, and with the others too under ``seeds_at`` "all", or
    where there is one rate only."""
    jobs = []
    for variant in variants:
        for rate in variant.rates or (None,):
            chosen = seeds if seeds_at == "all" or len(variant.rates) < 2 else seeds[:1]
            jobs += [Job(variant, rate, seed) for seed in chosen]
    return jobs
