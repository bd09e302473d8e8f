"""Do the copies of a software-pipelined loop have any work to hide behind? Read from TTGIR, Triton's last form before LLVM.

A loop of two or more stages issues asynchronous copies for a later iteration. A copy that is issued last in the body and
awaited first in the next iteration prefetches nothing: its whole latency is exposed. The criterion:

    A copy is exposed where it is awaited in a later iteration of the loop that issued it, and no arithmetic on
    floating-point tensors, no reduction and no matmul stands between its issue and its wait.

It follows the copies, not a count of stages, so it holds for `cp.async` (sm_80, and pointers anywhere), whose groups
complete in order, and for tensor descriptors (sm_90, sm_100), whose copies complete on an mbarrier. Each loop is run through
four times, a branch always taken. A load that is issued and awaited in one iteration is not pipelined and not counted.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

ROUNDS = 4  # more than a loop has stages
_WORK = re.compile(
    r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma|tt\.reduce)\b"
    r"|\b(arith\.\w+f|math\.\w+) .*: tensor<"
)


class Copies(NamedTuple):
    """The copies that a kernel's loops issue for a later iteration, as operations of the TTGIR."""

    pipelined: int
    exposed: int  # of these


def copies(ttgir: str) -> Copies:
    """Count the copies of the pipelined loops of a kernel, and those that are awaited at once."""
    run = _Run()
    run.block(_parse(ttgir.splitlines()))
    return Copies(len(run.pipelined), len(run.exposed))


@dataclass
class _Loop:
    body: list["str | _Loop"] = field(default_factory=list)


def _parse(lines: list[str]) -> list["str | _Loop"]:
    """Lines and loops, nested; other regions are flattened."""
    outer: list[tuple[int, _Loop]] = []
    current, depth = _Loop(), 0
    for line in lines:
        depth += line.count("{") - line.count("}")
        if re.search(r"\bscf\.(for|while)\b", line):
            outer.append((depth, current))
            current = _Loop()
        elif outer and depth < outer[-1][0]:
            loop, (_, current) = current, outer.pop()
            current.body.append(loop)
        else:
            current.body.append(line)
    return current.body


@dataclass
class _Copy:
    operation: str
    loops: dict[int, int]  # those that it was issued in, innermost last, with their iterations
    worked: bool = False  # since it was issued


class _Run:
    """The program in order; finds copies that cross a back edge."""

    def __init__(self) -> None:
        self.pipelined: set[str] = set()
        self.exposed: set[str] = set()
        self.loops: dict[int, int] = {}
        self.group: list[_Copy] = []  # of cp.async, not committed
        self.groups: list[list[_Copy]] = []  # of cp.async, in flight
        self.barriers: dict[str, list[list[_Copy]]] = defaultdict(list)  # phases of each array, in flight
        self.array: dict[str, str] = {}  # of each barrier

    def block(self, body: list[str | _Loop]) -> None:
        for item in body:
            if isinstance(item, str):
                self.operation(item)
                continue
            for iteration in range(ROUNDS):
                self.loops[id(item)] = iteration
                self.block(item.body)
            del self.loops[id(item)]

    def operation(self, line: str) -> None:
        names = re.findall(r"%[\w#]+", line)
        if "ttg.memdesc_index" in line:
            self.array[names[0]] = self.array.get(names[1], names[1])
        elif "ttg.async_copy_global_to_local" in line:
            self.group.append(_Copy(line, dict(self.loops)))
        elif "ttg.async_commit_group" in line:
            self.groups.append(self.group)
            self.group = []
        elif "ttg.async_wait" in line:
            left = int(re.findall(r"num = (\d+)", line)[0])
            done, self.groups = self.groups[: len(self.groups) - left], self.groups[len(self.groups) - left :]
            self.awaited(done)
        elif "ttng.barrier_expect" in line:
            self.barriers[self.array.get(names[0], names[0])].append([])
        elif "ttng.async_tma_copy_global_to_local" in line or "ttng.async_tma_gather" in line:
            barrier = names[-2]  # desc[coordinates] buffer, barrier, predicate
            self.barriers[self.array.get(barrier, barrier)][-1].append(_Copy(line, dict(self.loops)))
        elif "ttng.wait_barrier" in line:
            array = self.array.get(names[0], names[0])
            self.awaited(self.barriers[array][:1])
            del self.barriers[array][:1]
        elif _WORK.search(line):
            in_flight = [*self.groups, *(phase for phases in self.barriers.values() for phase in phases)]
            for copy in (copy for phase in in_flight for copy in phase):
                copy.worked = True

    def awaited(self, groups: list[list[_Copy]]) -> None:
        for copy in (copy for group in groups for copy in group):
            *_, (loop, iteration) = copy.loops.items() or [(0, 0)]
            if self.loops.get(loop, iteration) > iteration:
                self.pipelined.add(copy.operation)
                if not copy.worked:
                    self.exposed.add(copy.operation)
