"""When a checkpoint is due, and which ones a run may go back to."""

import pytest

from qgalore.files import checkpoint
from qgalore.parallel import ALONE, Team
from qgalore.training import keeping
from qgalore.training.keeping import Keeper


def keeper(tmp_path, now, save_every=None, team=ALONE):
    return Keeper(tmp_path, save_every=save_every, keep_last=2, keep_every=None, team=team, clock=lambda: now[0])


@pytest.mark.parametrize(
    ("save_every", "team", "asks"),
    [(None, ALONE, True), (None, Team(1, 2), False), (None, Team(0, 2), True), (5, ALONE, False)],
)
def test_the_clock_of_the_process_that_leads_asks_after_half_an_hour(tmp_path, save_every, team, asks):
    now = [7.0]
    one = keeper(tmp_path, now, save_every, team)
    now[0] += keeping.PATIENCE - 1
    assert not one.overdue
    now[0] += 1
    assert one.overdue == asks
    assert keeping.PATIENCE == 30 * 60


def test_steps_are_counted_where_save_every_says_so(tmp_path):
    assert [step for step in range(1, 12) if keeper(tmp_path, [0.0], 5).due(step)] == [5, 10]
    assert not keeper(tmp_path, [0.0]).due(5)


def test_regular_checkpoints_do_not_hang_on_a_clock(tmp_path):
    for step in (0, 5, 7, 10, 12):
        (tmp_path / checkpoint.name_for(step)).mkdir()
    assert keeper(tmp_path, [0.0], 5).regular(None) == [0, 5, 10]
    assert keeper(tmp_path, [0.0]).regular(12) == [0, 12]
