"""A conversation with a model: turns written by its chat template, answers that stream and stop where it learned to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from ..data.chat import answer_ends, has_template
from ..data.templates import template_text
from ..data.turns import Turn
from ..errors import ConfigError, printable


class TooLongError(ConfigError):
    """A message that leaves the model no position for an answer."""


@dataclass(frozen=True)
class Answer:
    """``text`` as it was shown. ``ended``: whether the model ended it with a mark, and was neither stopped nor cut.
    ``stopped``: whether Ctrl-C did."""

    text: str
    ended: bool
    stopped: bool


class _Shown(TextStreamer):
    """Hands text on as soon as whole words are known, without the marks that end an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: set[int], say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends, self._say = ends, say
        self.text, self.ended = "", False

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt and set(value.flatten().tolist()) & self._ends:
            self.ended = True
            return
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._say(printable(text))


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer, by the chat template, the model's generation config, and the tokenizer."""
    stated: Any = model.generation_config.eos_token_id
    known = [stated] if isinstance(stated, int) else list(stated or [])
    known += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*answer_ends(tokenizer), *known]))


def check_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise :class:`ConfigError` if the ``tokenizer`` of ``folder`` has no chat template for conversations."""
    if not has_template(tokenizer):
        raise ConfigError(
            f"{folder} has no chat template, which says how a conversation is written for its model; continue a text "
            f"with qgalore generate {folder} --prompt TEXT instead"
        )
    template_text(tokenizer)


@dataclass
class Conversation:
    """``turns`` of a user and ``model``, after a ``system`` message if there is one. ``sampling``: for ``generate``.
    Raises :class:`ConfigError` if the template refuses the system message."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    system: str | None = None
    max_new_tokens: int = 512
    sampling: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ends = ends_of(self.model, self.tokenizer)
        self._ids([Turn(role="user", content="Hello")])

    def instruct(self, system: str | None) -> None:
        """Let ``system`` be the system message from now on. Raises :class:`ConfigError`, and changes nothing, if the
        template takes none."""
        before, self.system = self.system, system
        try:
            self._ids([Turn(role="user", content="Hello")])
        except ConfigError:
            self.system = before
            raise

    def _ids(self, turns: list[Turn]) -> list[int]:
        """The tokens of ``turns`` and of what asks for an answer."""
        said = [] if self.system is None else [Turn(role="system", content=self.system)]
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in [*said, *turns]]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of somebody else's, and may fail in any way
            what = (str(error).splitlines() or [type(error).__name__])[0]
            remedy = "say without a system message what it would say" if said else "use another folder's tokenizer"
            raise ConfigError(f"the tokenizer's chat template refuses this conversation: {what}; {remedy}") from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _fit(self, turns: list[Turn]) -> tuple[list[Turn], list[int], int]:
        """(turns, their tokens, how many new ones at most), without the oldest turns where there is no room for all.
        Raises :class:`TooLongError` if there is none for the last of them alone."""
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        ids = self._ids(turns)
        if room is None:
            return turns, ids, self.max_new_tokens
        kept_free = min(self.max_new_tokens, room // 4)  # an answer may be longer where more is left
        while len(turns) > 2 and len(ids) + kept_free > room:
            turns = turns[2:]  # a question with its answer: templates want a user's turn first
            ids = self._ids(turns)
        if len(ids) >= room:
            raise TooLongError(
                f"this message makes a prompt of {len(ids)} tokens, and the model has {room} positions, answer "
                "included; shorten it"
            )
        return turns, ids, min(self.max_new_tokens, room - len(ids))

    @torch.no_grad()
    def answer(self, message: str, say: Callable[[str], None], tell: Callable[[str], None]) -> Answer:
        """The model's answer to ``message``, of which ``say`` gets piece after piece. ``tell`` gets a line about turns
        that had to be dropped. Ctrl-C ends the answer, and what was said until then counts as one. Raises
        :class:`TooLongError`."""
        asked = [*self.turns, Turn(role="user", content=message)]
        turns, ids, longest = self._fit(asked)
        if dropped := len(asked) - len(turns):
            tell(f"the oldest {dropped} turns no longer fit and were dropped")
        shown = _Shown(self.tokenizer, set(self._ends), say)
        inputs = torch.tensor([ids], device=self.model.get_input_embeddings().weight.device)
        stopped = False
        try:
            self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=longest,
                eos_token_id=self._ends or None,
                pad_token_id=self._ends[0] if self._ends else None,
                streamer=shown,
                **self.sampling,
            )
        except KeyboardInterrupt:
            stopped = True
            shown.end()
        self.turns = [*turns, Turn(role="assistant", content=shown.text.strip())]
        return Answer(shown.text, shown.ended, stopped)
