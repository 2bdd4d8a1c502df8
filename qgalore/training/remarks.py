"""What is said of a plan beside its table: what its choices mean, and what a step sends and computes."""

from ..config import Config
from ..errors import counted
from ..memory import orthogonal_work, plan, traffic
from .model import Vocabulary
from .paper import on_paper
from .say import say


def of_plan(config: Config, found: plan.Plan) -> list[str]:
    """What streamed blocks and the choice of activations mean for a walk."""
    choice, lines = config.train.activation_checkpointing, []
    if found.streamed is not None:
        lines.append(found.streamed.line(_tokens_of_a_step(config)))
    if choice == "offload" and found.walked:
        many = counted(config.train.grad_accumulation, "micro-batch", "micro-batches")
        size = plan.human(found.host[plan.INPUTS])
        lines.append(f"the blocks' inputs of {many} wait in host memory, {size} of it page-locked")
    if not isinstance(choice, bool | str):
        some = "block keeps its graph" if choice == 1 else f"{choice} blocks keep their graphs"
        lines.append(f"the last {some} from the forward pass; the others run again in the backward pass")
    return lines


def _tokens_of_a_step(config: Config) -> int:
    """Those of one process, whose ``train.grad_accumulation`` is given."""
    return config.train.micro_batch_size * config.data.sequence_length * config.train.grad_accumulation


def print_traffic(config: Config, vocabulary: Vocabulary, processes: int) -> None:
    """What each of ``processes`` sends in a step."""
    _, optimizer = on_paper(config, vocabulary, processes)
    optimizer.accumulate_in_fp32(config.train.order != "batch_major")
    sizes = traffic.payload(optimizer.tensors, config.lowrank.update_proj_gap)
    sent = {name: traffic.ring(size, processes, name) for name, size in sizes.items()}
    say("wire", f"{plan.human(round(sum(sent.values())))} sent by each of {processes} processes in a step")
    for name, size in sent.items():
        print(f"  {name:<40}{plan.human(round(size)):>10}", flush=True)


def orthogonalisation(config: Config, vocabulary: Vocabulary) -> str:
    """The share of a step's arithmetic in one process, whose ``train.grad_accumulation`` is given."""
    work = orthogonal_work.of_training(on_paper(config, vocabulary)[0], ["muon"])
    assert work is not None, "this rule orthogonalises"
    return orthogonal_work.line(work, _tokens_of_a_step(config))
