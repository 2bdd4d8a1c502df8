"""The configuration: pydantic models, YAML, overrides. The only room that knows YAML.

``load`` gives a validated :class:`Config` or one :class:`ConfigError` with every problem; ``resolve`` fills in what
the method and the device decide. Nothing mutates a configuration afterwards, and none travels below ``training``.
"""

from ..combinations import RULES
from .data_section import Source
from .duration import asked, steps_of, with_steps
from .mesh import Mesh
from .reading import PACKAGED, dump, find, load, parse
from .resolving import RESUMABLE, batch_major, differences, never_warm, remarks, resolve
from .sections import METHODS, Config, bytes_of

__all__ = [
    "METHODS", "PACKAGED", "RESUMABLE", "RULES", "Config", "Mesh", "Source", "asked", "batch_major", "bytes_of",
    "differences", "dump", "find", "load", "never_warm", "parse", "remarks", "resolve", "steps_of", "with_steps",
]  # fmt: skip
