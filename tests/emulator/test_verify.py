"""A run finds a compiled kernel that is wrong, whatever is wrong with it, and goes on without that one alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, re, sys
from itertools import repeat

import torch

from fusedgpt.bench.emulator.package import emulated
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.optim import build_optimizers
from fusedgpt.gpt.train.step import TrainStep
from fusedgpt.gpt.train.verify import verify
from fusedgpt.kernels.backend import replaced

kernel, pattern, replacement = sys.argv[1:]
shape = ModelConfig(90, context_length=24, n_layer=1, n_head=2, n_embd=32, attn_dropout=0.1, resid_dropout=0.1)
settings = TrainConfig(batch_size=1, dtype="bfloat16", device="cpu", backend="triton", sample_tokens=0)
config, cpu = RunConfig(shape, settings), torch.device("cpu")


def edit(name, ptx):
    if name != kernel:
        return ptx
    if not pattern:
        raise RuntimeError("`ptxas` failed with error code 255\\nand its log")
    edited, count = re.subn(pattern, replacement, ptx)
    assert count, ptx
    return edited


with emulated("sm_90", edit=edit) as emulation:
    verify(config, cpu)
    verified = len(emulation.launches)
    ids = torch.arange(24)[None]
    step = TrainStep(GPT(shape), build_optimizers(GPT(shape), settings), repeat((ids, ids)), settings)
    step.micro_step(ids, ids)
    launched = sorted({name for name, *_ in emulation.launches[verified:]})
    print(json.dumps({"replaced": replaced(), "launched": launched, "loss": step.loss.item()}))
"""
# the kernel, what is edited in its PTX and into what, the kernel's operator, what is said of it
FAULTS = {
    "wrong results": (
        "cross_entropy_kernel",
        r"ex2\.approx",
        "lg2.approx",
        "linear_cross_entropy",
        "relative error",
    ),
    "a bad address": ("gelu_kernel", r" \+ 0 \]", " + 268435456 ]", "gelu_mlp", "EmulatorError: "),
    "not compiled": (
        "one_pass_kernel",
        "",
        "",
        "attention",
        "RuntimeError: `ptxas` failed with error code 255",
    ),
}
KERNELS = {
    "embed_kernel",
    "forward_kernel",
    "backward_kernel",
    "one_pass_kernel",
    "gelu_kernel",
    "cross_entropy_kernel",
}


@pytest.mark.parametrize("fault", ["nothing wrong", *FAULTS])
def test_a_wrong_compiled_kernel_is_replaced_alone(fault: str, tmp_path: Path) -> None:
    kernel, pattern, replacement, operator, said = FAULTS.get(fault, ("", "", "", "", ""))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kernel, pattern, replacement],
        env=environment | {"FUSEDGPT_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert KERNELS - {*found["launched"]} == ({kernel} if kernel else set())
    assert 3.0 < found["loss"] < 6.0
    assert [*found["replaced"]] == ([operator] if operator else [])
    assert said in found["replaced"].get(operator, "")
    assert done.stderr.count("warning: ") == (1 if operator else 0)
    assert said in done.stderr
