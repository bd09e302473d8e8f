"""The emulator's checks can fail: a small sample of broken PTX, and the proof that a barrier is redundant."""

from concurrent.futures import ProcessPoolExecutor

import pytest

from fusedgpt.bench.emulator.mutations import REMOVED, Survey, Trial, redundant, sample, sites


@pytest.mark.parametrize(
    ("check", "architecture", "kernel", "kinds"),
    [
        ("add_layer_norm 53 x 768, p = 0.1", "sm_80", "forward_kernel", {"barrier", "wait for cp.async"}),
        (
            "attention 1 x 137 x 3 x 64, 2 heads, p = 0.1, one pass",
            "sm_90",
            "one_pass_kernel",
            {*REMOVED} - {"wait for cp.async"},
        ),
    ],
)
def test_broken_kernels_are_noticed(
    check: str, architecture: str, kernel: str, kinds: set[str], compiling: ProcessPoolExecutor
) -> None:
    sampled = sample([compiling.submit(Survey(check, architecture)).result()], most=1)
    mutants = tuple(mutant for mutant in sampled if mutant.kernel == kernel)
    assert {mutant.kind for mutant in mutants} >= kinds | {"predicate", "offset"}
    verdicts = compiling.submit(Trial(mutants)).result()
    assert not [verdict for verdict in verdicts if verdict.changed and not verdict.caught]
    assert sum(bool(verdict.caught) for verdict in verdicts) >= len(verdicts) / 2


PTX = """
	ld.shared.b32 	%r1, [%r9+16];
	{between};
	bar.sync 	0;
	@%p1 bra 	$L__BB0_2;
	{after};
$L__BB0_2:
	bar.sync 	0;
	ret;
"""


@pytest.mark.parametrize(
    ("between", "after", "reason"),
    [
        ("add.s32 %r2, %r3, %r4", "st.shared.b32 [%r9], %r1", ""),
        ("st.shared.b32 [%r9], %r1", "ld.shared.b32 %r1, [%r9]", ""),
        ("add.s32 %r2, %r3, %r4", "ld.shared.b32 %r1, [%r9]", "both sides only read"),
        ("st.shared.b32 [%r9], %r1", "add.s32 %r2, %r3, %r4", "no use of shared memory after"),
    ],
)
def test_a_redundant_barrier_is_known_by_its_ptx(between: str, after: str, reason: str) -> None:
    found = redundant(PTX.format(between=between, after=after), 4)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_what_can_be_mutated() -> None:
    ptx = PTX.format(between="add.s32 %r2, %r3, %r4", after="st.shared.b32 [ %r9 + 0 ], %r1")
    found = [(line, kind, ptx[start:end], new) for line, kind, start, end, new in sites(ptx, {2, 3, 4, 5, 6})]
    assert found == [
        (2, "offset", "[%r9+16]", "[%r9+32]"),
        (4, "barrier", "bar.sync \t0;", ""),
        (5, "predicate", "@%p1", "@!%p1"),
        (6, "offset", "[ %r9 + 0 ]", "[%r9+16]"),
    ]
