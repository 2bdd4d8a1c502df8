"""Several processes that train one model."""

from .team import ALONE, Team, job

__all__ = ["ALONE", "Team", "job"]
