"""How often a kernel is compiled: once, whatever the number of rows, so that a new length never waits for a compiler.

The public functions run in a process of their own with Triton's real binder, up to where it would compile.
"""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from fusedgpt.bench.gpu.launches import caught, kernels
from fusedgpt.bench.tiles.candidates import TABLES, in_table
from fusedgpt.kernels import examples
from fusedgpt.kernels.ops import cross_entropy

cross_entropy.BUDGET = 2**20
C = 128


def run(example):
    examples.results(example, examples.draw(example, "cpu", torch.bfloat16, torch.float32))


def own_matmul(title):
    sweep = TABLES[title]
    return in_table(sweep.table, "sm_90", next(iter(sweep.candidates(C, "sm_90"))))


def run_all(rows):
    for stream in (0, 1, 16):
        masked = [examples.add_layer_norm(rows, C, 0.1), examples.dropout(rows, C)]
        masked += [examples.embed(1, rows, C, vocabulary, 0.1, torch.bfloat16) for vocabulary in (16, 1000)]
        if rows < 100:
            masked.append(examples.add_layer_norm(rows, 9001, 0.1))
        for example in masked:
            run(replace(example, call=partial(example.call, stream=stream)))
    run(examples.linear(rows, C, C))
    for options, vocabulary in product(((0.1, 0.0), (1.0, 1e-4)), (1000, 1003)):
        options = dict(zip(("label_smoothing", "z_loss"), options), ignore_index=1)
        run(examples.linear_cross_entropy(rows, C, vocabulary - 1, 1, **options))
    run(examples.gelu_mlp(rows, C))
    with own_matmul("MLP_UP"), own_matmul("MLP_DOWN_GRADIENT"):
        run(examples.gelu_mlp(rows, C))
    if rows > 16:  # fewer queries have a tile of their own
        for batch in (1, 2):  # two passes, one
            run(examples.causal_attention(batch, rows, 1, 64, 0.1))


variants = defaultdict(set)
with caught("sm_90") as launches:
    for rows in (1, 16, 17, 4096, 5001):
        run_all(rows)
for launch in launches:
    variants[launch.module, launch.kernel].add(launch.key)
assert variants.keys() == kernels(), kernels() - variants.keys()
for kernel, keys in variants.items():
    assert len(keys) == 1, "\\n".join([str(kernel), *keys])
"""


def test_no_number_of_rows_has_a_kernel_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
