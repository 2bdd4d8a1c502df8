"""What the processes of a job do together, and how they fail together."""

import pytest
import torch
from processes import run_in

from qgalore.errors import ConfigError, NumericalError, QGaloreError, RankError
from qgalore.parallel import ALONE, job
from qgalore.parallel.telling import is_told, reaching


def operations():
    with job("cpu") as team:
        later = team.begin_total("first of all", team.rank + 1)
        mine = [torch.full((3,), team.rank + 1.0), torch.full((300, 300), team.rank + 1.0).T, torch.ones(2).bfloat16()]
        team.sum_("a", mine)
        received = torch.full((2,), float(team.rank))
        team.receive_("b", [received])
        return {
            "deal": team.deal(range(5)),
            "sum": [float(t.unique()) for t in mine],
            "received": received.tolist(),
            "total": team.total("c", 0.1 * (team.rank + 1)),
            "count": team.total("d", team.rank + 1),
            "later": later(),
            "both": team.total_and_any("l", 0.5, [team.rank == 2, False]),
            "many": team.total_and_any("m", 2, [team.rank == place % 4 for place in range(64)])[1],
            "any": team.any("e", [team.rank == 1, False]),
            "word": team.any("h", [team.rank == place % 4 for place in range(63)]),
            "more": team.any("i", [team.rank == place % 4 for place in range(64)]),
            "negative": (team.total("j", -0.5 * team.rank), team.total("k", -team.rank)),
            "first": team.of_first("f", lambda: ("from", team.rank)),
            "note": team.meet("g", digest=0.5, note=team.rank),
        }


def operations_elsewhere():
    """With a default device that no process can send from."""
    with job("cpu") as team, torch.device("meta"):
        note = team.leave_note(False, [team.rank == 0, False])
        team.meet("a", note=team.rank)
        found = team.total("b", 1.5), team.any("c", [team.rank == 1, False]), team.hear(note, None)
        return (*found, team.lowest("d", team.rank == 1))


def fail(how):
    """The error's class and words in each process, and that all can go on together after it."""
    with job("cpu") as team:
        try:
            with team.together("the end"):
                if how == "one" and team.rank == 1:
                    raise NumericalError("the loss is nan")
                if how == "several" and team.rank > 0:
                    raise [ConfigError, NumericalError][team.rank - 1]("words")
                if how == "foreign" and team.rank == 2:
                    raise KeyError("a bug")
                if how == "places":
                    team.meet("here" if team.rank else "there")
                if how == "digest":
                    team.meet("here", digest=float(team.rank == 1))
                team.sum_("the gradient", [torch.ones(2)])
        except (QGaloreError, KeyError) as error:
            team.meet("afterwards")
            return type(error).__name__, str(error)
        return None


def test_operations_give_every_process_the_same():
    found = run_in(3, operations)
    assert [result.pop("deal") for result in found] == [[0, 3], [1, 4], [2]]
    assert found[0] == found[1] == found[2]
    wanted = {"sum": [6.0, 6.0, 3.0], "received": [0.0, 0.0], "total": 0.1 + 0.2 + 0.1 * 3, "count": 6}
    wanted |= {"any": [True, False], "first": ("from", 0), "note": 2, "negative": (-1.5, -3)}
    wanted |= {name: [place % 4 != 3 for place in range(n)] for name, n in (("word", 63), ("more", 64), ("many", 64))}
    wanted |= {"later": 6, "both": (1.5, [True, False])}
    assert found[0] == wanted


def test_a_programs_default_device_is_not_that_of_meetings():
    assert run_in(2, operations_elsewhere) == [(3.0, [True, False], [True, False], 1)] * 2


@pytest.mark.parametrize(
    ("how", "kinds", "words"),
    [
        ("one", ["NumericalError"] * 3, "rank 1: the loss is nan"),
        ("several", ["ConfigError"] * 3, "rank 1: words"),
        ("foreign", ["RankError", "RankError", "KeyError"], "rank 2: KeyError: 'a bug'"),
        ("places", ["RankError"] * 3, "rank 0 came to: there; rank 1 to: here"),
        ("digest", ["RankError"] * 3, "different numbers at: here (0.0, 1.0, 0.0)"),
    ],
)
def test_an_error_of_one_is_the_error_of_all(how, kinds, words):
    found = run_in(3, fail, how)
    assert [kind for kind, _ in found] == kinds
    assert words in found[0][1]


def lose():
    with job("cpu") as team:
        if team.rank == 1:
            return None
        try:
            with team.together("the end"):
                team.sum_("the gradient", [torch.ones(2)])
        except RankError as error:
            return str(error)


def test_a_process_that_is_gone_is_noticed():
    found = run_in(2, lose)
    assert "another process of the job has ended" in found[0]


def test_a_process_without_memory_says_so_and_blames_no_other():
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as error, reaching():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert is_told(error.value)  # it cannot take part any more, so it ends without a meeting


def test_alone_nothing_is_sent():
    tensor = torch.ones(2)
    ALONE.sum_("a", [tensor])
    assert ALONE.total("b", 0.5) == 0.5
    assert ALONE.deal(range(3)) == [0, 1, 2]
    assert ALONE.meet("c", digest=1.0, note=7) == 7
    with pytest.raises(RankError, match="own"), ALONE.together("d"):
        raise RankError("own")
