"""The emulator against known answers: small kernels that use what Triton emits, and the same with a fault put into their PTX.

An answer is known from PyTorch or numpy. A fault has to end in a finding, in an error or in a wrong result, or the emulator is blind to it.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import EmulatorError, emulate

BF16, FP16 = torch.bfloat16, torch.float16


# ---- the kernels


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, TA: tl.constexpr, TB: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        if TA:
            x = tl.trans(
                tl.load(a + k[:, None] * M + m[None, :], mask=(k < K)[:, None] & (m < M)[None, :], other=0.0)
            )
        else:
            x = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        if TB:
            y = tl.trans(
                tl.load(b + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
            )
        else:
            y = tl.load(b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def matmul_of_descriptors_kernel(
    a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, TA: tl.constexpr, TB: tl.constexpr
):  # fmt: skip
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        x = tl.trans(a.load([k, m])) if TA else a.load([m, k])
        y = tl.trans(b.load([n, k])) if TB else b.load([k, n])
        acc = tl.dot(x, y, acc)
    c.store([m, n], acc.to(tl.float16))


@triton.jit
def add_descriptors_kernel(total, x, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    total.atomic_add([tl.program_id(0) % 2 * ROWS, 0], x.load([tl.program_id(0) * ROWS, 0]))


@triton.jit
def two_products_kernel(a, b, d, c, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    m, k, n = tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BN)
    s = tl.dot(tl.load(a + m[:, None] * BK + k[None, :]), tl.trans(tl.load(b + n[:, None] * BK + k[None, :])))
    z = tl.load(d + n[:, None] * BN + n[None, :])
    tl.store(c + m[:, None] * BN + n[None, :], tl.dot(s.to(tl.bfloat16), z))


@triton.jit
def reductions_kernel(x, sums, most, where, scan, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    r, c = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    v = tl.load(x + r[:, None] * BLOCK + c[None, :])
    tl.store(sums + c, tl.sum(v, 0))
    tl.store(most + r, tl.max(v, 1))
    tl.store(where + r, tl.argmax(v, 1))
    tl.store(scan + r[:, None] * BLOCK + c[None, :], tl.cumsum(v, 1))


@triton.jit
def integers_kernel(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a // b)
    tl.store(out + BLOCK + i, a % b)
    tl.store(out + 2 * BLOCK + i, tl.umulhi(a, b))
    tl.store(out + 3 * BLOCK + i, (a >> (b & 31)) ^ (a << (b & 31)))
    tl.store(out + 4 * BLOCK + i, tl.minimum(tl.maximum(a, b), 1000))
    tl.store(out + 5 * BLOCK + i, ((a.to(tl.int64) * b.to(tl.int64)) >> 17).to(tl.int32))


@triton.jit
def conversions_kernel(x, half, bfloat, integer, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(half + i, v.to(tl.float16))
    tl.store(bfloat + i, v.to(tl.bfloat16))
    tl.store(integer + i, v.to(tl.int32))


@triton.jit
def histogram_kernel(x, out, BLOCK: tl.constexpr):
    tl.atomic_add(out + tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 1.0)


@triton.jit
def transpose_kernel(x, out, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    r, c = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    v = tl.load(x + r[:, None] * BLOCK + c[None, :])
    tl.store(out + c[:, None] * ROWS + r[None, :], tl.trans(v))


@triton.jit
def add_one_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + 1, mask=i < n)


# ---- what they have to give: pairs of the result and the answer, and the error allowed of the largest value

Answers = Iterator[tuple[Tensor, Tensor, float]]


class Matmul(NamedTuple):
    m: int
    n: int
    k: int
    tile: tuple[int, int, int]
    warps: int
    stages: int


MATMULS = (
    Matmul(70, 50, 100, (64, 64, 32), 4, 3),
    Matmul(130, 130, 70, (128, 128, 64), 8, 2),
    Matmul(33, 40, 48, (32, 32, 16), 2, 1),
    Matmul(64, 256, 64, (64, 256, 32), 4, 4),
    Matmul(64, 24, 64, (64, 16, 64), 4, 2),
)


def _factors(m: int, n: int, k: int, dtype: torch.dtype, ta: int, tb: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two matrices, as they are stored, and their product."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn((k, m) if ta else (m, k), generator=generator).to(dtype)
    b = torch.randn((n, k) if tb else (k, n), generator=generator).to(dtype)
    return a, b, (a.T if ta else a).double() @ (b.T if tb else b).double()


def matmul(sizes: Matmul, dtype: torch.dtype, ta: int, tb: int, allowed: float = 1e-5) -> Answers:
    m, n, k, (bm, bn, bk), warps, stages = sizes
    a, b, product = _factors(m, n, k, dtype, ta, tb)
    c = torch.full((m, n), torch.nan)
    grid = (triton.cdiv(m, bm), triton.cdiv(n, bn))
    matmul_kernel[grid](a, b, c, m, n, k, bm, bn, bk, stages, ta, tb, num_warps=warps)
    yield c, product, allowed


def matmul_of_descriptors(sizes: Matmul, dtype: torch.dtype, ta: int, tb: int) -> Answers:
    m, n, k = (-(-size // 8) * 8 for size in sizes[:3])  # strides are multiples of 16 bytes
    bm, bn, bk = sizes.tile
    a, b, product = _factors(m, n, k, dtype, ta, tb)
    c = torch.full((m, n), torch.nan, dtype=FP16)
    described = (
        TensorDescriptor.from_tensor(a, [bk, bm] if ta else [bm, bk]),
        TensorDescriptor.from_tensor(b, [bn, bk] if tb else [bk, bn]),
        TensorDescriptor.from_tensor(c, [bm, bn]),
    )
    grid = (triton.cdiv(m, bm), triton.cdiv(n, bn))
    matmul_of_descriptors_kernel[grid](*described, k, bm, bn, bk, sizes.stages, ta, tb, num_warps=sizes.warps)
    yield c, product, 1e-3


def two_products(m: int, k: int, n: int) -> Answers:
    """The second takes its first operand from registers."""
    a, b, d = (
        torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(BF16)
        for shape in ((m, k), (n, k), (n, n))
    )
    c = torch.empty(m, n)
    two_products_kernel[(1,)](a, b, d, c, m, k, n, num_warps=4)
    yield c, (a.double() @ b.double().T).to(BF16).double() @ d.double(), 1e-2


def bulk_add() -> Answers:
    x, total = torch.randn(6 * 16, 64), torch.zeros(32, 64)
    add_descriptors_kernel[(6,)](
        TensorDescriptor.from_tensor(total, [16, 64]), TensorDescriptor.from_tensor(x, [16, 64]), 64, 16
    )
    yield total, x.double().view(3, 2, 16, 64).sum(0).view(32, 64), 1e-6


def reductions(rows: int, block: int, warps: int) -> Answers:
    x = torch.randn(rows, block)
    sums, most, scan = torch.empty(block), torch.empty(rows), torch.empty(rows, block)
    where = torch.empty(rows, dtype=torch.int32)
    reductions_kernel[(1,)](x, sums, most, where, scan, rows, block, num_warps=warps)
    yield sums, x.double().sum(0), 1e-6
    yield most, x.max(1)[0], 0
    yield where, x.argmax(1), 0
    yield scan, x.double().cumsum(1), 1e-5


def integers() -> Answers:
    random = np.random.default_rng(0)
    x, y = (random.integers(-(2**31), 2**31, 256).astype(np.int32) for _ in range(2))
    y[:128] %= 100
    y[y == 0] = 7
    out = torch.empty(6, 256, dtype=torch.int32)
    integers_kernel[(1,)](torch.from_numpy(x), torch.from_numpy(y), out, 256, num_warps=2)
    answers = [_integer_answers(int(a), int(b)) for a, b in zip(x, y, strict=True)]
    yield out, torch.tensor(answers).T, 0


def _integer_answers(a: int, b: int) -> list[int]:
    def low(v: int) -> int:
        return (v + 2**31) % 2**32 - 2**31

    quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)  # C's, towards zero
    high = (a % 2**32) * (b % 2**32) >> 32
    shifts = (a >> (b & 31)) ^ low(a << (b & 31))
    return [
        low(quotient),
        low(a - quotient * b),
        low(high),
        low(shifts),
        min(max(a, b), 1000),
        low(a * b >> 17),
    ]


def conversions() -> Answers:
    edges = [torch.inf, -torch.inf, torch.nan, 65519.0, 65520.0, 3.3895e38, 0.0, -0.0]
    x = torch.cat([torch.randn(200) * 100, torch.randn(48) * 1e-6, torch.tensor(edges)])
    half, bfloat = torch.empty(256, dtype=FP16), torch.empty(256, dtype=BF16)
    integer = torch.empty(256, dtype=torch.int32)
    conversions_kernel[(1,)](x, half, bfloat, integer, 256, num_warps=1)
    yield half, x.half(), 0
    yield bfloat, x.to(BF16), 0
    yield integer[:248], x[:248].int(), 0


def histogram() -> Answers:
    x = torch.randint(0, 10, (256,), dtype=torch.int32)
    out = torch.zeros(10)
    histogram_kernel[(2,)](x, out, 128, num_warps=1)
    yield out, torch.bincount(x.long(), minlength=10), 0


def transpose() -> Answers:
    x, out = torch.randn(32, 64), torch.empty(64, 32)
    transpose_kernel[(1,)](x, out, 32, 64, num_warps=4)
    yield out, x.T, 0


def problems(architecture: str) -> dict[str, Callable[[], Answers]]:
    """All that are to be solved, by name."""
    found: dict[str, Callable[[], Answers]] = {}
    for sizes in MATMULS:
        for dtype in (BF16, FP16):
            for ta, tb in ((0, 0), (1, 0), (0, 1), (1, 1)):
                name = f"{tuple(sizes)}, {str(dtype)[6:]}, {'T' if ta else 'N'}{'T' if tb else 'N'}"
                found[f"matmul {name}"] = partial(matmul, sizes, dtype, ta, tb)
                if architecture == "sm_90":
                    found[f"matmul of descriptors {name}"] = partial(
                        matmul_of_descriptors, sizes, dtype, ta, tb
                    )
    one_step = Matmul(64, 64, 32, (64, 64, 32), 4, 1)
    found["matmul in tf32"] = partial(matmul, one_step, torch.float32, 0, 0, 2e-3)
    for m, k, n in ((64, 64, 64), (128, 32, 64)):
        found[f"two products {m}, {k}, {n}"] = partial(two_products, m, k, n)
    for rows, block, warps in ((16, 128, 4), (8, 512, 8), (32, 16, 2), (4, 1024, 1)):
        found[f"reductions {rows} x {block}, {warps} warps"] = partial(reductions, rows, block, warps)
    for simple in (
        integers,
        conversions,
        histogram,
        transpose,
        *([bulk_add] if architecture == "sm_90" else []),
    ):
        found[simple.__name__.replace("_", " ")] = simple
    return found


def wrong_answers(architecture: str, timing: str, order: str, word: str = "") -> tuple[int, list[str]]:
    """How many of the problems whose names contain `word` were solved, and what is wrong with their answers."""
    complaints, solved = [], 0
    for name, solve in problems(architecture).items():
        if word in name:
            with emulate(architecture, timing=timing, order=order) as emulation:
                complaints += [f"{name}: {text}" for text in map(_difference, solve()) if text]
            complaints += [f"{name}: {text}" for text in emulation.findings]
            solved += 1
    return solved, complaints


def _difference(answer: tuple[Tensor, Tensor, float]) -> str:
    got, known, allowed = (*(t.double() for t in answer[:2]), answer[2])
    same = (got == known) | (got.isnan() & known.isnan())
    largest = known[known.isfinite()].abs().max()
    error = torch.where(same, 0.0, (got - known).abs()).max() / largest
    return "" if error <= allowed else f"error {error:.1e}"  # a NaN is more than anything is allowed


# ---- faults


class Fault(NamedTuple):
    """A change to one place of a kernel's PTX, and how it has to show."""

    name: str
    solve: Callable[[], Answers]
    pattern: str
    replacement: str
    which: int  # of the places that the pattern finds
    shows: str  # begins a finding or an error, one of several after "|"; "wrong": or the result is


def faults(architecture: str) -> list[Fault]:
    barrier = r"bar\.sync[ \t]+0;"
    by_pointer = partial(matmul, Matmul(64, 64, 256, (64, 64, 32), 4, 3), BF16, 0, 0)
    by_descriptor = partial(matmul_of_descriptors, Matmul(64, 64, 256, (64, 64, 32), 4, 3), BF16, 0, 0)
    found = [Fault("transpose without its barrier", transpose, barrier, "", 0, "race")]
    for which in (0, -1) if architecture == "sm_90" else (0, -1, -2):
        found.append(Fault(f"matmul without barrier {which}", by_pointer, barrier, "", which, "race"))
    wait = r"cp\.async\.wait_group[ \t]+(0x)?[012];"
    found.append(
        Fault("matmul that does not wait for copies", by_pointer, wait, "cp.async.wait_group 9;", 0, "async")
    )
    if architecture != "sm_90":
        return found
    expected = r"(mbarrier\.arrive\.expect_tx\S+ _, \[%r\d+\]), 8192;"
    group = r"cp\.async\.bulk\.wait_group(\.read)?[ \t]+0;"
    wait = r"mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;"
    for name, pattern, replacement, which, shows in (
        ("no wait for a bulk load", wait, "", 0, "async"),
        ("no wait for wgmma", r"wgmma\.wait_group\.sync\.aligned 0;", "", -1, "wgmma"),
        ("no fence before wgmma", r"wgmma\.fence\.sync\.aligned;", "", 0, "wgmma fence"),
        ("no proxy fence before a store", r"fence\.proxy\.async\.shared::cta;", "", -1, "proxy"),
        ("too few bytes expected", expected, r"\1, 4096;", 0, "deadlock|wrong|mbarrier"),
        ("too many bytes expected", expected, r"\1, 16384;", 0, "deadlock"),
        ("no wait for a bulk store", group, "", -1, "async"),
    ):
        found.append(Fault(name, by_descriptor, pattern, replacement, which, shows))
    return found


def unnoticed_faults(architecture: str, timing: str, order: str) -> tuple[int, list[str]]:
    """How many faults were put in, and those that nobody noticed."""
    every, missed = faults(architecture), []
    for fault in every:
        seen = _seen(fault, architecture, timing, order)
        if not any(
            text.startswith(kind) or f": {kind}" in text for kind in fault.shows.split("|") for text in seen
        ):
            missed.append(f"{fault.name}: noticed {seen}")
    return len(every), missed


def _seen(fault: Fault, architecture: str, timing: str, order: str) -> list[str]:
    def edit(name: str, ptx: str) -> str:
        place = list(re.finditer(fault.pattern, ptx))[fault.which]
        return ptx[: place.start()] + place.expand(fault.replacement) + ptx[place.end() :]

    try:
        with emulate(architecture, timing=timing, order=order, edit=edit) as emulation:
            differences: list[Any] = [*filter(None, map(_difference, fault.solve()))]
    except EmulatorError as error:
        return [str(error)]
    return [*emulation.findings, *(f"wrong: {text}" for text in differences)]
