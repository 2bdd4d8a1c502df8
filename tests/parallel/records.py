"""What runs of several processes have written, and what they hold beside what was planned."""

import contextlib
import gc
import io
import json
import os

import torch

from qgalore.training import assemble


def timeless(path):
    """The rows of a run's records, without what hangs on the machine, by step and layer."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    clocks = ("second", "memory_bytes")
    found.sort(key=lambda row: (row["step"], row.get("layer", "")))
    return [{name: value for name, value in row.items() if not any(c in name for c in clocks)} for row in found]


def planned_and_real(where, arguments):
    """Resident bytes by the plan, and of the tensors that are there after two steps."""
    from qgalore import config
    from qgalore.lowrank.layers.bases import Basis
    from qgalore.memory.resident import state_bytes
    from qgalore.parallel import apart, job, shards

    os.chdir(where)
    with job("cpu") as team, contextlib.redirect_stdout(io.StringIO()):
        made = assemble.build(config.load("tiny.yaml", arguments), None, team)
        made.loop.run()
        model, slots = made.model, made.loop.optimizer.tensors
        tensors = (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and not shards.is_shared(t))
        storages = (t.untyped_storage() for t in tensors if t.dtype == torch.int8 and not t.is_meta)
        integers = {storage.data_ptr(): storage.nbytes() for storage in storages}
        scales = {shards.local(m.weight_scale) for m in model.modules() if getattr(m, "weight_scale", None) is not None}
        real = {"int8 weights": sum(integers.values()), "moments": state_bytes(slots)}
        real["weight scales"] = sum(scale.untyped_storage().nbytes() for scale in scales)
        sides = [basis for basis in model.modules() if isinstance(basis, Basis)]
        bases = {shards.local(value) for basis in sides for value in (basis.codes, basis.scale) if value is not None}
        real["bases"] = sum(value.untyped_storage().nbytes() for value in bases)
        dense = [apart.kept(p) for p in {t.stored for t in slots if t.module is None}]
        turning = [value for name, value in model.named_buffers() if "inv_freq" in name]
        real["trained in full"] = sum(shards.local(value).nbytes for value in (*dense, *turning))
        return {name: made.planned.resident[name] for name in real}, real
