"""Faults of a run, caused for real: the quick ones of the soak's table. What each promises is in docs/reliability.md."""

import pytest

from fusedgpt.bench.soak import commands
from fusedgpt.bench.soak.kills import kill
from fusedgpt.bench.soak.place import Place, Skipped
from fusedgpt.bench.soak.scenario import Scenario
from fusedgpt.bench.soak.scenarios import SCENARIOS

QUICK = [scenario for scenario in SCENARIOS if scenario.quick]


@pytest.mark.parametrize("scenario", QUICK, ids=lambda scenario: f"{scenario.group}: {scenario.fault}")
def test_a_run_survives(scenario: Scenario, place: Place) -> None:
    try:
        scenario.check(place)
    except Skipped as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("job", commands.JOBS, ids=lambda job: job.name)
def test_kill_9_loses_nothing(job: commands.Job, seed: int, place: Place) -> None:
    """Once or twice, at random moments and before random changes of files: in all more than 50 times."""
    killed = kill(job, place, 1000 * seed + commands.JOBS.index(job))
    assert not killed.problem, f"{', then '.join(killed.moments)}: {killed.problem}"
