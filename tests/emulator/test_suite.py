"""The checks of the operators can fail, and `make emulate` says so."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from fusedgpt.bench.emulator import Emulation, run, suite
from fusedgpt.bench.emulator.suite import BF16, Outcome
from fusedgpt.kernels.examples import Parity

RIGHT = Outcome("a check", "dropout", "sm_80", "early", "bfloat16", Parity(0.1, 0.2), {}, "", 1.0)
WRONG = [
    RIGHT._replace(parity=Parity(0.3, 0.2)),
    RIGHT._replace(parity=Parity(float("nan"), 0.2)),
    RIGHT._replace(parity=None),
    RIGHT._replace(findings={"race: a_kernel, PTX line 3": 2}),
    RIGHT._replace(error="EmulatorError: deadlock"),
]


@pytest.mark.parametrize("outcome", WRONG)
def test_an_outcome_is_wrong(outcome: Outcome) -> None:
    assert RIGHT.ok
    assert not outcome.ok
    assert "WRONG" in str(outcome)


def emulation(*kernels: str, ptx: str = "") -> Emulation:
    done = Emulation("sm_90", "early", "lockstep", 0, None)
    done.launches += [(kernel, (1, 1, 1), 0.0) for kernel in kernels]
    done.covered.update({(kernel, ptx): {1} for kernel in kernels})
    return done


def test_the_kernels_that_a_check_names_have_to_run() -> None:
    check = next(check for check in suite.checks().values() if check.kernels == suite.ONE_PASS)
    bulk = "cp.async.bulk.tensor.2d"
    assert not suite.wrong_path(check, "sm_90", emulation(*suite.ONE_PASS, ptx=bulk))
    assert "one_pass_kernel" in suite.wrong_path(check, "sm_90", emulation(*suite.TWO_PASSES, ptx=bulk))
    assert "did not run, but nothing" in suite.wrong_path(check, "sm_90", emulation())
    assert "wrong kind of address" in suite.wrong_path(check, "sm_90", emulation(*suite.ONE_PASS))


def test_what_a_check_raises_is_its_error() -> None:
    """Nothing can be compiled in this process, where the tests set TRITON_INTERPRET."""
    outcome = suite.run("linear 140 x 96 to 131", "sm_80", BF16, "early")
    assert "TRITON_INTERPRET" in outcome.error
    assert not outcome.ok


@pytest.mark.parametrize(("found", "code"), [([RIGHT], 0), ([RIGHT, WRONG[0]], 1), ([], 1)])
def test_make_emulate_fails_on_one_wrong_check(
    found: list[Outcome], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run, "version", lambda _: "3.9.0")
    monkeypatch.setattr(run, "install", lambda: "Triton 3.6.0 is not checked")
    monkeypatch.setattr(run, "_outcomes", lambda *_: found)
    assert run.run_emulate(["sm_80"], ["early"], "", 0) == code
    printed = capsys.readouterr().out
    assert "3.6.0 is not checked" in printed
    assert f"{len(found) - ('WRONG' in printed)} of {len(found)} checks are right" in printed


def test_a_triton_that_cannot_be_installed_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 1, "", "Looking\nERROR: no matching distribution")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.subprocess, "run", failing)
    assert run.install().endswith("could not be installed: ERROR: no matching distribution")


def test_every_mode_and_architecture_is_planned() -> None:
    every = run.jobs(["sm_80", "sm_90", "sm_120"], [*suite.MODES])
    assert {mode for job in every for mode, _ in job.modes} == {*suite.MODES}
    assert {seed for job in every for mode, seed in job.modes if mode == "random"} == {*range(run.SEEDS)}
    assert {job.check for job in every} == {*suite.checks()}
    small = [job for job in every if job.architecture == "sm_120"]
    assert small
    assert all(job.modes == (("early", 0),) for job in small)
