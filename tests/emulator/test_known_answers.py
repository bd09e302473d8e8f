"""The emulator itself: answers known from PyTorch and numpy, and faults that it has to notice."""

from concurrent.futures import ProcessPoolExecutor

import pytest

from fusedgpt.bench.emulator import known_answers

TARGETS = [(a, t) for a in ("sm_80", "sm_90") for t in ("early", "late")]
WORDS = {"matmul (": 40, "matmul of descriptors": 40, "two products": 2, "reductions": 4}


@pytest.mark.parametrize(("architecture", "timing"), TARGETS)
@pytest.mark.parametrize("word", WORDS)
def test_answers_are_right(word: str, architecture: str, timing: str, compiling: ProcessPoolExecutor) -> None:
    work = compiling.submit(known_answers.wrong_answers, architecture, timing, "lockstep", word)
    expected = 0 if word == "matmul of descriptors" and architecture == "sm_80" else WORDS[word]
    assert work.result() == (expected, [])


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "word", ["tf32", "integers", "conversions", "histogram", "transpose", "bulk add", "two products"]
)
def test_answers_are_right_in_a_random_order(
    word: str, architecture: str, compiling: ProcessPoolExecutor
) -> None:
    work = compiling.submit(known_answers.wrong_answers, architecture, "late", "random", word)
    solved, complaints = work.result()
    assert solved or (word, architecture) == ("bulk add", "sm_80")
    assert not complaints


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("timing", "order"), [("early", "lockstep"), ("late", "random")])
def test_faults_are_noticed(
    architecture: str, timing: str, order: str, compiling: ProcessPoolExecutor
) -> None:
    work = compiling.submit(known_answers.unnoticed_faults, architecture, timing, order)
    assert work.result() == (5 if architecture == "sm_80" else 11, [])
