"""How often a kernel is compiled: once, whatever the number of rows, so that a new length never waits for a compiler.

The launchers run in a process of their own with Triton's real binder for an H200, up to where it would compile.
"""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import collections

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

variants = collections.defaultdict(set)


class Device:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def count(*, key, fn, **_):
    variants[fn.name.rpartition(".")[2]].add(key)
    return True  # not to be compiled


driver.set_active(Device())
triton.knobs.runtime.jit_cache_hook = count
from fusedgpt.kernels import tiles
from fusedgpt.kernels.ops import column_sum, cross_entropy, dropout, embedding
from fusedgpt.kernels.ops.layer_norm import operator as layer_norm
from fusedgpt.kernels.ops.mlp import operator as mlp
for module in (column_sum, cross_entropy, embedding, layer_norm, mlp):
    module.hardware = lambda device: tiles.Hardware("sm_90", 132)
cross_entropy.BUDGET = 2**20

C, SEED = 128, torch.zeros(1, dtype=torch.int64)
vector = torch.zeros(C)
for rows in (1, 16, 17, 4096, 5001):
    x = torch.zeros(rows, C, dtype=torch.bfloat16)
    for stream in (0, 1, 16):
        layer_norm._launch_forward(x, x, vector, vector, vector, 1e-5, 0.1, SEED, stream)
        stats = torch.zeros(2, rows)
        layer_norm._launch_backward(x, x, x, vector, stats, 0.1, SEED, stream, x.dtype, True, True, True)
        dropout._launch(x, 0.1, SEED, stream)
        for vocabulary in (16, 1000):
            table = torch.zeros(vocabulary, C)
            ids = torch.zeros(1, rows, dtype=torch.int64)
            embedding._launch_forward(ids, table, torch.zeros(rows, C), 0.1, SEED, stream, x.dtype)
            keys, order = ids.flatten().int().sort()
            embedding._launch_row_sums(x, keys, order, vocabulary, torch.float32, 0.1, SEED, stream)
    column_sum._launch(x)
    for label_smoothing, z_loss in ((0.1, 0.0), (1.0, 1e-4)):
        for vocabulary in (1000, 1003):
            targets = torch.zeros(rows, dtype=torch.int64)
            weight = torch.zeros(vocabulary, C)
            options = (vocabulary - 1, 1, label_smoothing, z_loss, True, True)
            cross_entropy._chunks(x, weight, targets, None, None, *options)
    mlp._launch_pass(mlp.gelu_kernel, mlp.GELU_FORWARD, x, vector, (x,), False)
    mlp._launch_pass(mlp.gelu_backward_kernel, mlp.GELU_BACKWARD, x, vector, (x, x, x), False, True)
for table, launch in ((mlp.MLP_UP, "up"), (mlp.MLP_DOWN_GRADIENT, "down")):
    table["sm_90"] = (getattr(tiles, "MLP_UP_TILES" if launch == "up" else "MLP_DOWN_GRADIENT_TILES")["sm_90"][0],)
for rows in (17000, 17001):
    x, w = torch.zeros(rows, C, dtype=torch.bfloat16), torch.zeros(4 * C, C, dtype=torch.bfloat16)
    pre, _ = mlp._up(x, w, torch.zeros(4 * C), False, True)
    mlp._down_gradient(x, w.T.contiguous(), pre, torch.zeros(4 * C), pre, False, True)
print(*(f"{name} {len(keys)}" for name, keys in sorted(variants.items())), sep="\\n")
"""

KERNELS = """_dropout_kernel backward_kernel chunk_sums_kernel column_sum_kernel cross_entropy_kernel down_gradient_kernel
embed_kernel forward_kernel gelu_backward_kernel gelu_kernel row_sums_kernel up_kernel"""


def test_no_number_of_rows_has_a_kernel_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"{name} 1" for name in KERNELS.split()]
