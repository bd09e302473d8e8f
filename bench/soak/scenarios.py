"""Every scenario of the fault loop, in one table."""

from . import damage, disk, environment, job, powercut, signals
from .scenario import Scenario

SCENARIOS: tuple[Scenario, ...] = (
    *disk.SCENARIOS,
    *damage.SCENARIOS,
    *job.SCENARIOS,
    *powercut.SCENARIOS,
    *signals.SCENARIOS,
    *environment.SCENARIOS,
)
