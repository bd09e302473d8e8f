"""Peers in the emulator compute what their operator is: what is counted is a kernel that works."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import fusedgpt

# In a process of its own: in this one kernels are interpreted.
SCRIPT = """
import json, sys
import torch
from fusedgpt.bench.counts.measure import Case
from fusedgpt.bench.counts.peers.measure import arguments, on_gpu
from fusedgpt.bench.counts.peers.table import TABLE, Setting
from fusedgpt.bench.emulator import emulate
from fusedgpt.kernels import examples, use_backend
from torch._inductor import config

CASES = (
    Case(examples.add_layer_norm(70, 96, x_bias=False), {}),
    Case(examples.gelu_mlp(70, 32), {}),
    Case(examples.linear_cross_entropy(70, 32, 160), {}),
    Case(examples.causal_attention(1, 256, 1, 64), {"T": 256, "H": 1}),
)
# at few rows too, LayerNorm's backward in the one kernel that it takes at many
config.triton.mix_order_reduction_non_strict_mode = True


def results(call, tensors):
    outputs = examples.as_tuple(call(*tensors))
    leaves = [t for t in tensors if t.requires_grad]
    torch.manual_seed(0)
    incoming = [torch.randn(y.shape).to(y.dtype) if y.ndim else torch.ones_like(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, incoming)]


def exact(case, tensors):
    names = list(arguments(case.example))
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    with use_backend("torch"):
        return results(lambda *given: case.example.call(**dict(zip(names, given, strict=True))), wide)


found = {}
package = sys.argv[1]
for case in CASES:
    if case.name not in TABLE[package]:
        continue
    tensors = list(arguments(case.example, random=True).values())
    with emulate("sm_90") as emulation:
        peer = TABLE[package][case.name](Setting(case, tensors, "sm_90", None))
        with on_gpu(emulation):
            theirs = results(peer.call, tensors)
    pairs = list(zip(theirs, exact(case, tensors), strict=True))
    errors = [(a.double() - b).abs().max() / b.abs().max() for a, b in pairs]
    error = torch.stack(errors).max().item()  # NaN where one is
    found[case.name] = [peer.name, error, [kernel for kernel, *_ in emulation.launches]]
print(json.dumps(found))
"""
ROOT = str(Path(fusedgpt.__path__[0]).parent)
KERNELS = {  # of each operator, in the names of what it has to launch
    "Inductor": {
        "add_layer_norm": ["layer_norm", "layer_norm_backward"],
        "gelu_mlp": ["gelu", "gelu_backward", "sum"],
        "linear_cross_entropy": ["log_softmax", "log_softmax_backward"],
    },
    "FlexAttention": {"attention": ["tem_fused_flex_attention", "tem_fused_flex_attention_backward"]},
    "liger-kernel": {
        "add_layer_norm": ["layer_norm_forward", "layer_norm_backward"],
        "linear_cross_entropy": ["liger_cross_entropy"],
    },
    "cut-cross-entropy": {"linear_cross_entropy": ["cce_lse_forward", "indexed_neg_dot", "cce_backward"]},
}


@pytest.mark.parametrize("package", KERNELS)
def test_a_peer_is_right(package: str) -> None:
    if "-" in package and find_spec(package.replace("-", "_")) is None:
        pytest.skip(f"{package} is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([ROOT, *filter(None, [environment.get("PYTHONPATH")])])
    environment |= {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, package]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == KERNELS[package].keys()
    for operator, (name, error, launched) in found.items():
        assert error < 0.02, f"{name}, {operator}"  # of the largest value; 2.5 units in bfloat16's last place
        for kernel in KERNELS[package][operator]:
            assert any(kernel in each for each in launched), f"{name}, {operator}: {launched}"
        assert any(character.isdigit() for character in name), name
