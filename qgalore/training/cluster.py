"""What the cards of a job send in a step, by link, and from how many tokens on its work hides that.

All of it is counted from the trainer's own tensors and operations, or follows from rates that are assumed. Nothing here
was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..config import Config
from ..errors import counted
from ..lowrank.tensors.base import TrainedTensor
from ..memory.plan import Plan, human
from ..memory.resident import resident
from ..memory.traffic import payload
from ..memory.wire import Cards, Sent, all_sent, busiest
from ..models.compiling import blocks_of
from ..parallel.environment import on_this_machine
from ..speed import Card, Link, find, links
from .model import Vocabulary
from .paper import on_paper
from .remarks import tokens_of_a_step
from .roofline import seconds_of_a_token
from .say import say

USUAL, CARD = 8, "H100"  # cards in a machine, if there are as many, and which, if nothing else is said
GATHER, REDUCE, HAND = "gather", "reduce", "hand"
AGAIN = "gather again, to step"
# Of collectives, or of their first words. All wait for what is handed out, and for all that is gathered but blocks.
_KINDS = {"gather blocks": GATHER, "gather": HAND, "hand": HAND, "pass": HAND, "broadcast": HAND}


@dataclass(frozen=True)
class Machines:
    """The machines of a job: cards in each, which card, and its links in GB/s; None stands for the usual. Raises
    :class:`ConfigError` for a card that is not known."""

    per_machine: int | None = None
    card: str | None = None
    inside: float | None = None
    between: float | None = None

    def __post_init__(self) -> None:
        self.linked_card()

    def cards(self, config: Config, processes: int) -> Cards:
        """The cards of a job of so many ``processes``."""
        mesh = config.parallel.over(processes)
        each = self.per_machine or on_this_machine(processes) or USUAL
        return Cards(mesh.replicas, mesh.shards, min(each, processes))

    def linked_card(self) -> Card:
        """The card, with the links that were asked for."""
        card = find(self.card or CARD)
        inside = card.inside if self.inside is None else Link("as given", self.inside)
        between = card.between if self.between is None else Link("as given", self.between)
        return replace(card, inside=inside, between=between)


@dataclass(frozen=True)
class Wire:
    """``sent``: what the mean card sends in a step, by collective. ``uneven``: how many times as much the busiest owner
    hands out."""

    cards: Cards
    sent: dict[str, Sent]
    uneven: float = 1.0

    @property
    def inside(self) -> float:
        return sum(one.inside for one in self.sent.values())

    @property
    def between(self) -> float:
        return sum(one.between for one in self.sent.values())

    def __str__(self) -> str:
        """A table by collective; with two columns if there are several machines."""
        several = self.cards.machines > 1
        rows = [f"  {'':<40}{'inside':>10}{'between':>12}"] if several else []
        for name, one in self.sent.items():
            sizes = (one.inside, one.between) if several else (one.total,)
            rows.append(f"  {name:<40}" + "  ".join(f"{human(round(size)):>10}" for size in sizes))
        return "\n".join(rows)

    def seconds(self, card: Card) -> tuple[float, float, float]:
        """On the wire of ``card``: forward, when blocks are gathered; until the end of the step, beside its work; and
        for what all wait for, such as what owners hand out."""
        parts: dict[str, list[tuple[float, float]]] = {GATHER: [], REDUCE: [], HAND: []}
        for name, one in self.sent.items():
            kind = _KINDS.get(name) or _KINDS.get(name.split()[0], REDUCE)
            times = self.uneven if name.startswith(HAND) else 0.5 if kind == GATHER else 1.0
            parts[kind].append((one.inside * times, one.between * times))
        gathered, reduced, handed = (links.seconds(part, card.inside, card.between) for part in parts.values())
        return gathered, gathered + reduced, handed

    def tokens_to_hide(self, card: Card, token: tuple[float, float]) -> float:
        """The tokens of a card in a step from which its work takes longer than what it sends beside. A ``token`` takes
        so many seconds forward and backward."""
        return max(sent / work for sent, work in zip(self.seconds(card), token, strict=False))


def wire_of(model: nn.Module, tensors: Sequence[TrainedTensor], gap: int, cards: Cards, clips: bool = False) -> Wire:
    """What a step sends, of which every ``gap``-th one finds new bases (``traffic.payload``). If it ``clips``, all that
    is split comes once more, to step when all gradients are known."""
    sizes = payload(tensors, gap)
    gathered = sizes.get("gather blocks", 0.0) / 2 + sum(t.stored.nbytes for t in tensors if t.gathered)
    again = {AGAIN: gathered} if clips and gathered else {}
    return Wire(cards, all_sent(sizes | again, cards), busiest(blocks_of(model), tensors, cards.size))


def print_job(config: Config, vocabulary: Vocabulary, processes: int, found: Plan, machines: Machines | None) -> None:
    """What each of ``processes`` sends in a step, and the host memory of a machine. ``config`` is for one of them, and
    ``found`` its plan. With ``machines`` it is said too from how many tokens on a step hides the wire."""
    model, optimizer = on_paper(config, vocabulary, processes)
    optimizer.accumulate_in_fp32(config.train.order != "batch_major")
    cards = (machines or Machines()).cards(config, processes)
    clips = config.train.clip_grad_norm > 0
    wire = wire_of(model, optimizer.tensors, config.lowrank.update_proj_gap, cards, clips)
    inside, between, whole = (human(round(size)) for size in (wire.inside, wire.between, wire.inside + wire.between))
    where = f": {inside} inside machines of {cards.per_machine}, {between} between them" if cards.machines > 1 else ""
    say("wire", f"{whole} sent by each of {processes} processes in a step, counted, not measured{where}")
    print(wire, flush=True)
    if config.lowrank.rank == "auto" and cards.shards > 1:
        say("ranks", "bases are whole everywhere; memory is planned at lowrank.max_rank, what is sent at mean_rank")
    together, many = human(cards.per_machine * found.host_total), counted(cards.per_machine, "process", "processes")
    say("host", f"{many} of one machine take {together} of its memory, without copies for checkpoints")
    if machines is not None:
        say("hidden", _not_counted(config, vocabulary, found) or _hidden(config, vocabulary, wire, machines))


def _not_counted(config: Config, vocabulary: Vocabulary, found: Plan) -> str | None:
    """Why it is not known when a step hides the wire; None if it is."""
    reasons = (
        (config.device == "cpu", "for a CPU; state memory.budget to plan for a card"),
        (vocabulary.labels is not None, "for classifiers"),
        (not found.walked, "for batch-major steps, in which hardly anything travels while blocks work"),
        (config.memory.streams, "for blocks that are streamed"),
    )
    return next((f"not counted {why}" for met, why in reasons if met), None)


def _hidden(config: Config, vocabulary: Vocabulary, wire: Wire, machines: Machines) -> str:
    """From how many tokens of a card on a step hides what it sends."""
    card, tokens = machines.linked_card(), tokens_of_a_step(config)
    enough = wire.tokens_to_hide(card, seconds_of_a_token(config, vocabulary, card))
    over = f"{card.inside.rate:g} GB/s ({card.inside.name})"
    if wire.cards.machines > 1:
        over += f" inside a machine and {card.between.rate:g} GB/s ({card.between.name}) between machines"
    return (
        f"the work of a step hides what travels beside it from {enough:,.0f} tokens of a card on, and here are "
        f"{tokens:,}. It waits {wire.seconds(card)[2]:.3f} s for the rest. By arithmetic, not measured, for "
        f"the {card.name} with {over}"
    )


@dataclass(frozen=True)
class Figures:
    """Of one card of a job: bytes that the fullest one ``kept`` between two steps, what the mean one sends (``wire``),
    the ``tokens`` of a step from which its work hides that, and the seconds that all have ``waited`` in it."""

    kept: int
    wire: Wire
    tokens: float
    waited: float


def figures(
    config: Config, vocabulary: Vocabulary, processes: int, machines: Machines, token: tuple[float, float]
) -> Figures:
    """The figures of a resolved ``config`` on so many ``processes``. ``token``: see :func:`seconds_of_a_token`."""
    model, optimizer = on_paper(config, vocabulary, processes)
    optimizer.accumulate_in_fp32(True)
    cards, clips = machines.cards(config, processes), config.train.clip_grad_norm > 0
    wire = wire_of(model, optimizer.tensors, config.lowrank.update_proj_gap, cards, clips)
    kept = sum(resident(model, optimizer.tensors).values())
    card = machines.linked_card()
    return Figures(kept, wire, wire.tokens_to_hide(card, token), wire.seconds(card)[2])
