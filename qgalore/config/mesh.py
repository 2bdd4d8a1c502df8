"""The key ``parallel``: among how many processes a model is split, and how often it is there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from ..errors import ConfigError

LARGEST = 2**16  # more processes than any job has
ALL = 0  # as many as the job has processes


@dataclass(frozen=True)
class Mesh:
    """``replicas`` copies of a model, each split over ``shards`` processes; 0 stands for as many as there are.

    A configuration has a word for it, or a mapping with both sizes. :meth:`over` gives a mesh in which both are known.
    Process ``n`` holds share ``n % shards``, so that the shares of one copy are in neighbouring processes.
    """

    replicas: int = ALL
    shards: int = 1

    NAMES: ClassVar = ("replicate", "shard")  # words, each by itself, and the names of a mapping's sizes

    @property
    def splits(self) -> bool:
        """Whether a process holds a part of the model, if there are several."""
        return self.shards != 1

    def over(self, processes: int) -> "Mesh":
        """The mesh of so many ``processes``, whose number is the product of its sizes. Raises :class:`ConfigError` for
        another."""
        if processes == 1:
            return Mesh(1, 1)
        if ALL in (self.replicas, self.shards):
            return Mesh(self.replicas or processes, self.shards or processes)
        if self.replicas * self.shards != processes:
            inner = math.gcd(self.shards, processes)
            raise ConfigError(
                f"parallel is {self}, a mesh of {self.replicas * self.shards} processes, and there are {processes} "
                "(WORLD_SIZE, or --world-size of a plan). The product of its sizes must be the number of processes. "
                f"Start {self.replicas * self.shards}, or set 'parallel={Mesh(processes // inner, inner)}'"
            )
        return self

    def crosses(self, on_each: int) -> bool:
        """Whether the shares of one copy are on several machines, each of which has ``on_each`` processes."""
        return self.shards > 1 and on_each % self.shards != 0

    @property
    def written(self) -> str | dict[str, int]:
        sizes = (self.replicas, self.shards)
        return self.NAMES[sizes.index(ALL)] if ALL in sizes else dict(zip(self.NAMES, sizes, strict=True))

    def __str__(self) -> str:
        written = self.written
        return written if isinstance(written, str) else f"{{replicate: {self.replicas}, shard: {self.shards}}}"

    @classmethod
    def _read(cls, value: Any) -> "Mesh":
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and value in cls.NAMES:
            return cls() if value == "replicate" else cls(1, ALL)
        if isinstance(value, Mapping) and value.keys() == set(cls.NAMES):
            sizes = [value[name] for name in cls.NAMES]
            if all(type(size) is int and 1 <= size <= LARGEST for size in sizes):
                return cls(*sizes)
        raise ValueError("no mesh")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(lambda mesh: mesh.written)
        return core_schema.no_info_plain_validator_function(cls._read, serialization=written)
