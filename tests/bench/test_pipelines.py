"""Which copies of a pipelined loop have work to hide behind: short TTGIR, as Triton writes it."""

import pytest

from fusedgpt.bench.gpu.pipelines import Copies, copies

WORK = "%y = arith.mulf %x, %x : tensor<64xf32, #blocked>"
REDUCTION = """%s = "tt.reduce"(%x) <{axis = 1 : i32}> ({
^bb0(%a: f32, %b: f32):
%c = arith.addf %a, %b : f32
tt.reduce.return %c : f32
}) : (tensor<64xf32>) -> tensor<f32>"""
INTEGERS = "%i = arith.addi %j, %c1_i32 : i32"


def issue(name: str = "x") -> str:
    return (
        f"%{name}_1 = ttg.async_copy_global_to_local %{name}, %{name}_tile mask %m : tensor<64x!tt.ptr<f32>> -> <64xf32>\n"
        f"%{name}_2 = ttg.async_commit_group tokens %{name}_1"
    )


def wait(left: int) -> str:
    return f"%w = ttg.async_wait %t {{num = {left} : i32}}"


def loop(*body: str) -> str:
    lines = "\n".join(body)
    return f"%r = scf.for %i = %low to %high step %c1 iter_args(%t = %x_2) -> (!ttg.async.token) : i32 {{\n{lines}\nscf.yield %x_2\n}} loc(#loc)"


def kernel(*lines: str) -> str:
    text = "\n".join(lines)
    return f'module attributes {{"ttg.num-warps" = 4 : i32}} {{\ntt.func public @k() {{\n{text}\ntt.return\n}} loc(#l)\n}}'


BARRIERS = "%bars = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64>"


def issue_by_descriptor(name: str = "x", barriers: str = "bars") -> str:
    return (
        f"%{name}_b = ttg.memdesc_index %{barriers}[%c] : !ttg.memdesc<2x1xi64> -> !ttg.memdesc<1xi64>\n"
        f"ttng.barrier_expect %{name}_b, 8192, %true : !ttg.memdesc<1xi64>\n"
        f"ttng.async_tma_copy_global_to_local %{name}[%i, %c0] %{name}_tile, %{name}_b, %true : !tt.tensordesc<64xf32>"
    )


def wait_for_barrier(barriers: str = "bars") -> str:
    return (
        f"%a = ttg.memdesc_index %{barriers}[%d] : !ttg.memdesc<2x1xi64> -> !ttg.memdesc<1xi64>\n"
        "ttng.wait_barrier %a, %phase : !ttg.memdesc<1xi64>"
    )


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([loop(WORK)], Copies(0, 0)),
        # one stage: issued and awaited in one iteration
        ([loop(issue(), wait(0), WORK)], Copies(0, 0)),
        # two stages, the copy last in the body: nothing but integers before its wait
        ([issue(), loop(wait(0), WORK, INTEGERS, issue(), INTEGERS), wait(0)], Copies(1, 1)),
        # the copy first in the body
        ([issue(), loop(wait(0), issue(), WORK)], Copies(1, 0)),
        # three stages: one copy stays in flight
        ([issue(), issue(), loop(wait(1), WORK, issue())], Copies(1, 0)),
        # but for a wait of everything
        ([issue(), issue(), loop(wait(0), WORK, issue())], Copies(1, 1)),
        # two loads of an iteration; keys are awaited at once, values after the first matmul
        ([issue("k"), issue("v"), loop(wait(1), REDUCTION, wait(0), WORK, issue("k"), issue("v"))], Copies(2, 1)),
        # an outer loop that waits for its own load, around a pipelined one
        ([loop(issue("k"), wait(0), issue(), loop(wait(0), WORK, issue()), wait(0))], Copies(1, 1)),
        ([loop(issue("k"), wait(0), issue(), issue(), loop(wait(1), WORK, issue()), wait(0))], Copies(1, 0)),
    ],
)  # fmt: skip
def test_copies_in_groups(lines: list[str], found: Copies) -> None:
    assert copies(kernel(*lines)) == found


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([loop(issue_by_descriptor(), wait_for_barrier(), WORK)], Copies(0, 0)),
        ([issue_by_descriptor(), loop(wait_for_barrier(), WORK, issue_by_descriptor())], Copies(1, 1)),
        ([*[issue_by_descriptor()] * 2, loop(wait_for_barrier(), WORK, issue_by_descriptor())], Copies(1, 0)),
        (
            [
                issue_by_descriptor("k"), "%more = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64>",
                issue_by_descriptor("v", "more"),
                loop(wait_for_barrier(), WORK, wait_for_barrier("more"), WORK,
                     issue_by_descriptor("k"), issue_by_descriptor("v", "more")),
            ],
            Copies(2, 1),
        ),
    ],
)  # fmt: skip
def test_copies_by_descriptor(lines: list[str], found: Copies) -> None:
    assert copies(kernel(BARRIERS, *lines)) == found
