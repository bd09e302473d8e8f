"""Would a check notice? Takes a barrier, a wait or a fence out of the PTX, inverts a predicate or changes an offset, and looks.

A mutant is caught by an error, by a finding, or by a result beyond the rule. One that is not caught, though its results
have other bits, is a blind spot. One with equal bits is explained: by `redundant`, or by what the emulator tracks.
"""

import hashlib
import random
import re
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..table import Column, heading, line
from . import suite
from .suite import BF16

REMOVED = {
    "barrier": r"bar(rier\.cta)?\.sync[^;]*;",
    "wait for cp.async": r"cp\.async\.wait_\w+[^;]*;",
    "wait for bulk copies": r"cp\.async\.bulk\.wait_group[^;]*;",
    "wait for wgmma": r"wgmma\.wait_group[^;]*;",
    "wait for an mbarrier": r"mbarrier\.try_wait[^;]*;[^;]*bra[^;]*;",
    "fence of wgmma": r"wgmma\.fence[^;]*;",
    "proxy fence": r"fence\.proxy[^;]*;",
}
PREDICATE = re.compile(r"@(!?)(%p\d+)")
ADDRESS = re.compile(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+)\s*)?\]")
STEP = 16  # bytes that an offset moves: aligned as before
ORDERED = {*REMOVED}  # what the timing of asynchronous operations and the order of warps may bring to light
TRIED = ({"timing": "early"}, {"timing": "late", "order": "random"})
GOAL = 0.95  # of the mutants that change anything


class Mutant(NamedTuple):
    check: str
    architecture: str
    kernel: str
    ptx: str  # digest of the PTX
    line: int
    kind: str
    start: int  # what is replaced
    end: int
    replacement: str
    text: str


class Verdict(NamedTuple):
    mutant: Mutant
    caught: str  # "error", "finding", "result", "hang" or ""
    changed: bool  # whether any bit of the results differs
    why: str  # of one that is not caught


COLUMNS: tuple[Column, ...] = (
    ("kernel", "<24", "kernel", "{}"),
    ("mutation", "<21", "kind", "{}"),
    ("mutants", ">8", "mutants", "{}"),
    *(
        (name, f">{len(name) + 1}", name, "{}")
        for name in ("error", "finding", "result", "hang", "unchanged", "missed")
    ),
)


def digest(ptx: str) -> str:
    return hashlib.sha256(ptx.encode()).hexdigest()[:16]


# ---- what can be mutated


def sites(ptx: str, lines: set[int]) -> Iterator[tuple[int, str, int, int, str]]:
    """Every mutation of the lines that ran: line, kind, the replaced part, and what replaces it."""
    starts = [0, *(match.end() for match in re.finditer("\n", ptx))]
    for number in sorted(lines):
        start = starts[number - 1]
        end = ptx.find("\n", start)
        for kind, pattern in REMOVED.items():
            if (match := re.compile(pattern).search(ptx, start)) and match.start() < end:
                yield number, kind, match.start(), match.end(), ""
        if match := PREDICATE.search(ptx, start, end):
            inverted = f"@{'' if match[1] else '!'}{match[2]}"
            yield number, "predicate", match.start(), match.end(), inverted
        if match := ADDRESS.search(ptx, start, end):
            moved = f"[{match[1]}+{int(match[2] or 0) + STEP}]"
            yield number, "offset", match.start(), match.end(), moved


class Survey(NamedTuple):
    """What a check runs on an architecture: kernel, PTX and the lines that ran."""

    check: str
    architecture: str

    def __call__(self) -> tuple[str, str, dict[tuple[str, str], set[int]]]:
        _, emulation = suite.computed(suite.checks()[self.check], self.architecture, BF16, timing="late")
        if emulation.findings:
            raise RuntimeError(
                f"{self.check} on {self.architecture} has findings as it is: run it without mutations"
            )
        return self.check, self.architecture, emulation.covered


def sample(
    surveys: Sequence[tuple[str, str, dict[tuple[str, str], set[int]]]], most: int, seed: int = 0
) -> list[Mutant]:
    """At most so many mutants for each architecture, kernel and kind."""
    found: dict[tuple[str, str, str], list[Mutant]] = defaultdict(list)
    seen = set()
    for check, architecture, covered in surveys:
        for (kernel, ptx), lines in covered.items():
            if ptx in seen:
                continue
            seen.add(ptx)
            for number, kind, start, end, replacement in sites(ptx, lines):
                text = " ".join(ptx[start : ptx.find("\n", start)].split())
                mutant = Mutant(
                    check, architecture, kernel, digest(ptx), number, kind, start, end, replacement, text
                )
                found[architecture, kernel, kind].append(mutant)
    draw = random.Random(seed)
    return [m for group in found.values() for m in draw.sample(group, min(most, len(group)))]


# ---- one mutant


class Trial(NamedTuple):
    """Some mutants of one check."""

    mutants: tuple[Mutant, ...]

    def __call__(self) -> list[Verdict]:
        return [judge(mutant) for mutant in self.mutants]


@cache
def _unchanged(name: str, architecture: str) -> tuple[list[Tensor], float, dict[str, str]]:
    """The results as they are, the seconds they take, and every PTX by its digest."""
    check, start = suite.checks()[name], time.process_time()
    ours, emulation = suite.computed(check, architecture, BF16, timing="late")
    return ours, time.process_time() - start, {digest(ptx): ptx for _, ptx in emulation.covered}


def judge(mutant: Mutant) -> Verdict:
    plain, seconds, sources = _unchanged(mutant.check, mutant.architecture)
    tried = ({"timing": "late"}, *(TRIED if mutant.kind in ORDERED else ()))
    changed = False
    for options in tried:
        # warps in random order take up to twenty times as long
        caught, ours = attempt(mutant, options, (20 if "order" in options else 1) * (5 + 10 * seconds))
        if caught:
            return Verdict(mutant, caught, True, "")
        changed |= not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(ours, plain, strict=True))
    why = "other bits, within the rule" if changed else explained(mutant, sources[mutant.ptx])
    return Verdict(mutant, "", changed, why)


def attempt(mutant: Mutant, options: dict[str, Any], limit: float) -> tuple[str, list[Tensor]]:
    """What catches the mutant, "" if nothing does, and its results. limit: seconds of this process."""

    def edit(_: str, ptx: str) -> str:
        if digest(ptx) != mutant.ptx:
            return ptx
        return ptx[: mutant.start] + mutant.replacement + ptx[mutant.end :]

    def out_of_time(*_: Any) -> None:
        raise TimeoutError

    check = suite.checks()[mutant.check]
    signal.signal(signal.SIGVTALRM, out_of_time)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        ours, emulation = suite.computed(check, mutant.architecture, BF16, edit=edit, **options)
    except TimeoutError:
        return "hang", []
    except Exception:  # a broken kernel may do anything
        return "error", []
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if emulation.findings:
        return "finding", ours
    return "" if suite.judged(check, BF16, ours).ok else "result", ours


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()]) if x.is_floating_point() else x


# ---- why one with equal bits is not caught

READS = re.compile(r"\bld\.shared|\bldmatrix")
USES = re.compile(
    r"\b(st\.shared|stmatrix|atom\.shared|red\.shared|cp\.async|mbarrier|wgmma|fence|ld\.shared|ldmatrix)"
)


def explained(mutant: Mutant, ptx: str) -> str:
    if mutant.kind == "barrier":
        return redundant(ptx, mutant.line) or "no shared word that both sides use: no race in any order"
    if mutant.kind in ORDERED:
        return "nothing uses what it orders: late operations stay in flight and are tracked"
    return "no result depends on it"


def redundant(ptx: str, number: int) -> str:
    """Why a barrier orders nothing, by the PTX alone; "" where that cannot tell.

    Between it and the barriers before and after it, on every path, a side does not touch shared memory, or both only read.
    """
    lines = [text.partition("//")[0] for text in ptx.splitlines()]
    labels = {match[1]: i for i, text in enumerate(lines) if (match := re.match(r"\s*(\$?\w+):", text))}
    after: dict[int, list[int]] = {}
    for i, text in enumerate(lines):
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$?\w+)\s*;", text)
        ends = re.search(r"^\s*(ret|exit|bra)\b", text)
        targets = [labels[branch[1]]] if branch and branch[1] in labels else []
        after[i] = targets + ([] if ends else [i + 1] * (i + 1 < len(lines)))
    before: dict[int, list[int]] = defaultdict(list)
    for i, following in after.items():
        for j in following:
            before[j].append(i)
    sides = [_until_barrier(lines, step, number - 1) for step in (before, after)]
    for uses, side in zip(sides, ("before", "after"), strict=True):
        if not uses:
            return f"no use of shared memory {side} it, up to the next barrier"
    if all(READS.search(text) for uses in sides for text in uses):
        return "both sides only read shared memory"
    return ""


def _until_barrier(lines: list[str], step: dict[int, list[int]], start: int) -> list[str]:
    """The instructions that use shared memory on the paths from a line to the nearest barriers."""
    reached, todo, uses = set(), list(step[start]), []
    while todo:
        i = todo.pop()
        if i in reached or re.search(REMOVED["barrier"], lines[i]):
            continue
        reached.add(i)
        todo += step[i]
        if USES.search(lines[i]):
            uses.append(lines[i])
    return uses


# ---- all of them


def run_mutations(architectures: Sequence[str], word: str, most: int) -> int:
    """Try mutants of all kernels and print the share that is caught, and what is not. 1 where that is below the goal."""
    from .run import processes, progress, workers

    surveys = [
        Survey(name, architecture)
        for architecture in architectures
        for name, check in suite.checks().items()
        if check.tested and check.kernels and word in name and architecture in check.architectures
        if check.operator != "GPT" and "mask" not in name
    ]
    with processes(workers()) as pool:
        mutants = sample(list(progress(pool, surveys, "kernels")), most)
        by_check = defaultdict(list)
        for mutant in mutants:
            by_check[mutant.check, mutant.architecture].append(mutant)
        trials = [
            Trial(tuple(some[i : i + 10])) for some in by_check.values() for i in range(0, len(some), 10)
        ]
        verdicts = [verdict for some in progress(pool, trials, "mutants, ten at a time") for verdict in some]
    return report(verdicts)


def report(verdicts: Sequence[Verdict]) -> int:
    for architecture in sorted({verdict.mutant.architecture for verdict in verdicts}):
        print(f"\n{architecture}\n{heading(COLUMNS)}")
        groups: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for mutant, caught, changed, _ in verdicts:
            if mutant.architecture == architecture:
                groups[mutant.kernel, mutant.kind][caught or ("missed" if changed else "unchanged")] += 1
        for (kernel, kind), counts in sorted(groups.items()):
            print(line(COLUMNS, {"kernel": kernel, "kind": kind, "mutants": counts.total(), **counts}))
    print("\nNot caught:")
    for mutant, caught, _, why in sorted(verdicts, key=lambda verdict: (verdict.changed, verdict.why)):
        if not caught:
            print(
                f"  {mutant.architecture} {mutant.kernel}, PTX line {mutant.line}, {mutant.kind}: {mutant.text[:70]}: {why}"
            )
    reasons = Counter(verdict.why for verdict in verdicts if not verdict.caught)
    print(*(f"  {count:5} {why}" for why, count in reasons.most_common()), sep="\n")
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for mutant, caught, changed, _ in verdicts:
        kinds[mutant.kind]["caught" if caught else "missed" if changed else "unchanged"] += 1
    for kind, counts in [*kinds.items(), ("all", sum(kinds.values(), Counter()))]:
        share = counts["caught"] / max(counts["caught"] + counts["missed"], 1)
        print(
            f"{kind}: {counts.total()} mutants, {counts['unchanged']} change nothing, {share:.1%} of the others caught"
        )
    return 0 if share >= GOAL else 1
