"""What is said of a plan beside its table: what its choices mean, and what a step computes."""

from ..config import Config
from ..errors import counted
from ..memory import orthogonal_work, plan
from .model import Vocabulary
from .paper import on_paper


def of_plan(config: Config, found: plan.Plan) -> list[str]:
    """What streamed blocks and the choice of activations mean for a walk."""
    choice, lines = config.train.activation_checkpointing, []
    if found.streamed is not None:
        lines.append(found.streamed.line(tokens_of_a_step(config)))
    if choice == "offload" and found.walked:
        many = counted(config.train.grad_accumulation, "micro-batch", "micro-batches")
        size = plan.human(found.host[plan.INPUTS])
        lines.append(f"the blocks' inputs of {many} wait in host memory, {size} of it page-locked")
    if not isinstance(choice, bool | str):
        some = "block keeps its graph" if choice == 1 else f"{choice} blocks keep their graphs"
        lines.append(f"the last {some} from the forward pass; the others run again in the backward pass")
    return lines


def of_copy(found: plan.Plan, writers: int, room: int | None) -> str | None:
    """What one of so many ``writers`` of a checkpoint copies of the state that it keeps; None if there is no ``room``
    for that on the host, which the run then says by itself. None is a room that is not known."""
    kept = sum(found.resident.values())
    if found.streamed is not None:
        kept += found.streamed.host_bytes - sum(found.streamed.on_device().values())
    size = kept // writers
    if room is not None and size > room:
        return None
    size = plan.human(size)
    if room is None:
        return f"with {size} of the host's memory free for a copy, training goes on while a checkpoint is written"
    return f"training goes on while a checkpoint is written from a copy, which takes {size} of the host's memory"


def tokens_of_a_step(config: Config) -> int:
    """Those of one process, whose ``train.grad_accumulation`` is given."""
    return config.train.micro_batch_size * config.data.sequence_length * config.train.grad_accumulation


def orthogonalisation(config: Config, vocabulary: Vocabulary) -> str:
    """The share of a step's arithmetic in one process, whose ``train.grad_accumulation`` is given."""
    work = orthogonal_work.of_training(on_paper(config, vocabulary)[0], ["muon"])
    assert work is not None, "this rule orthogonalises"
    return orthogonal_work.line(work, tokens_of_a_step(config))
