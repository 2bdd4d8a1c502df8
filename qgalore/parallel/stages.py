"""Work that every process of a team does in stages, at once or beside its other work.

A generator describes the work. It yields what a process has to do in a stage, and it gets what that gave in every
process. Beside other work, a thread does each stage and sends nothing. What the stages gave is exchanged by the main
threads, at places to which all of them come anyway. So all that processes send to each other has one order, and no
second group of processes is needed.
"""

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from functools import partial
from typing import Any

from .team import ALONE, Team

Work = Callable[[], Any]
Stages = Generator[Work, list[Any], None]


def complete(place: str, stages: Stages, team: Team = ALONE) -> None:
    """Do all ``stages`` now, in every process of ``team``. ``place`` names the work where processes meet.

    An error in one process is raised in the generators of all, which may clean up, and then here.
    """
    answer = partial(next, stages)
    while (work := _ask(answer)) is not None:
        answer = _reply(place, stages, team, work)


def _ask(answer: Callable[[], Work]) -> Work | None:
    """What is to be done next; None at the end."""
    try:
        return answer()
    except StopIteration:
        return None


def _reply(place: str, stages: Stages, team: Team, work: Work) -> Callable[[], Work]:
    """Do ``work`` and return the call that hands its outcome in all processes to the generator."""
    try:
        with team.together(place):
            found = team.gather(place, work())
    except Exception as error:
        return partial(stages.throw, error)
    return partial(stages.send, found)


class Beside:
    """Stages, the first of which begins now in a thread. All processes call :meth:`look` and :meth:`wait` alike; the
    one that finds a stage done in all of them begins the next one. Both raise what :func:`complete` would.

    The thread does not keep a program from ending. In one process it goes through all stages without a look.
    """

    def __init__(self, place: str, stages: Stages, team: Team = ALONE) -> None:
        self.place, self.team = place, team
        self._stages = stages if team.size > 1 else _as_one(place, stages)
        self._doing: Future | None = None  # the present stage; None when all are done
        self._begin(partial(next, self._stages))

    def look(self) -> bool:
        """Whether all stages are done. Waits for nothing but the other processes' calls."""
        if self._doing is not None and not self.team.meet(self.place, note=not self._doing.done()):
            self._collect()
        return self._doing is None

    def wait(self) -> None:
        """Until all stages are done."""
        while self._doing is not None:
            self._collect()

    def _collect(self) -> None:
        assert self._doing is not None, "there is no stage to wait for"
        done, self._doing = self._doing, None
        self._begin(_reply(self.place, self._stages, self.team, done.result))

    def _begin(self, answer: Callable[[], Work]) -> None:
        work = _ask(answer)
        self._doing = None if work is None else _in_a_thread(self.place, work)


def _as_one(place: str, stages: Stages) -> Stages:
    """All ``stages`` of a single process as one."""
    yield partial(complete, place, stages)


def _in_a_thread(place: str, work: Work) -> Future:
    done: Future = Future()

    def live() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=live, name=place, daemon=True).start()
    return done
