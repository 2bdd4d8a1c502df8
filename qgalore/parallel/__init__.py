"""Several processes that train one model."""

from .start import job
from .team import ALONE, Team

__all__ = ["ALONE", "Team", "job"]
