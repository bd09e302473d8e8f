"""The model beside reality: times that a GPU took for kernels whose bounds are known, and so the error of a bound.

The only place of these figures. They were measured on one H200 with CUDA events (medians after warm-up, random data, torch 2.11.0+cu130, Triton 3.6.0,
2026-11-20) at B = 64, T = 1024, C = 768, 12 heads, vocabulary 50304, bfloat16. The packages' versions may differ from those counted.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..ops.harness import BACKWARD, BOTH, FORWARD
from ..record import Record

GPU = "H200"
ARCHITECTURE = "sm_90"


class Known(NamedTuple):
    name: str  # of the case
    word: str  # in the implementation's name
    direction: str
    milliseconds: float


KNOWN = (
    Known("layer_norm", "liger", FORWARD, 0.068),
    Known("layer_norm", "liger", BACKWARD, 0.468),
    Known("layer_norm", "inductor", FORWARD, 0.056),
    Known("layer_norm", "inductor", BACKWARD, 0.228),
    Known("attention", "flex", FORWARD, 0.398),
    Known("attention", "flex", BACKWARD, 1.319),
    Known("linear_cross_entropy", "liger", BOTH, 32.1),
    Known("linear_cross_entropy", "cut-cross-entropy", BOTH, 43.9),
)


class Error(NamedTuple):
    name: str
    direction: str
    side: str
    bound: float  # milliseconds, the library's matmuls included
    unit: str
    measured: float  # milliseconds

    @property
    def share(self) -> float:
        """Bound over measured: 1 where the model explains all of the time."""
        return self.bound / self.measured


def errors(record: Record) -> Iterator[Error]:
    """Each known time beside the bound in a record's rows; those that were not counted are left out."""
    for known in KNOWN:
        for row in record["rows"]:
            if _is(known, row):
                found = row["bounds"][GPU]
                bound = (found["microseconds"] + found["matmuls"]) / 1000
                yield Error(
                    known.name, known.direction, row["side"], bound, found["unit"], known.milliseconds
                )


def _is(known: Known, row: dict[str, Any]) -> bool:
    same = (row["name"], row["direction"], row["architecture"]) == (known.name, known.direction, ARCHITECTURE)
    return same and known.word in row["side"].lower() and GPU in row.get("bounds", ())


def summary(found: Sequence[Error]) -> str:
    """In a phrase, for the heading over bounds."""
    if not found:
        return "no known time beside it"
    least, most = min(found, key=lambda e: e.share), max(found, key=lambda e: e.share)
    many = len(found) > 1
    shares = f"{least.share:.0%} to {most.share:.0%}" if many else f"{least.share:.0%}"
    return f"{shares} of the {len(found)} time{'s' if many else ''} that {'are' if many else 'is'} known, on one {GPU}"
