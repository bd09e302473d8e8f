"""Bytes and FLOPs of operators: what each has to move, by hand."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

from fusedgpt.bench.parts import environment
from fusedgpt.bench.step.bytes import PARTS
from fusedgpt.bench.traffic import WRITES, Traffic
from fusedgpt.kernels import _triton, linear, use_backend

M, N, K = 6, 10, 4


def recorded(function, limit: float = float("inf")) -> list[tuple[str, int, int, int]]:
    traffic = Traffic(limit)
    with traffic:
        function()
    return [(o.name.removeprefix("aten."), o.read, o.written, o.flops) for o in traffic.operations]


@pytest.mark.parametrize(
    ("name", "function", "read", "written"),
    [
        ("add.Tensor", lambda x, y: x + y, 2, 1),
        ("add.Tensor", lambda x, y: x + x, 1, 1),  # one tensor, read once
        ("add.out", lambda x, y: torch.add(x, y, out=x), 2, 1),
        ("add.out", lambda x, y: torch.add(x, x, out=y), 1, 1),  # what y held is not read
        ("add_.Tensor", lambda x, y: x.add_(y), 2, 1),
        ("add.Tensor", lambda x, y: x + y[0].expand(M, N), 1 + 1 / M, 1),
        ("copy_.default", lambda x, y: x.copy_(y), 1, 1),
        ("zero_.default", lambda x, y: x.zero_(), 0, 1),
        ("zeros_like.default", lambda x, y: torch.zeros_like(x), 0, 1),
        ("new_full.default", lambda x, y: x.new_full((M,), 3.0), 0, 1 / N),
        ("_to_copy.default", lambda x, y: x.to(torch.bfloat16), 1, 1 / 2),
        ("sum.default", lambda x, y: x.sum(), 1, 1 / (M * N)),
        ("clone.default", lambda x, y: x.T[:5].contiguous(), 1 / 2, 1 / 2),  # and nothing for the views
        ("_foreach_add_.List", lambda x, y: torch._foreach_add_([x, y], [y, y]), 2, 2),
    ],
)
def test_bytes_by_hand(name: str, function, read: float, written: float) -> None:
    x, y = torch.ones(M, N), torch.ones(M, N)
    found = recorded(lambda: function(x, y))
    assert found == [(name, read * x.nbytes, written * x.nbytes, 0)]


@pytest.mark.parametrize("limit", [float("inf"), 0])
def test_matmuls(limit: float) -> None:
    a, b, total = torch.ones(M, K), torch.ones(K, N), torch.zeros(M, N)
    operands, result, flops = (M * K + K * N) * 4, M * N * 4, 2 * M * N * K
    assert recorded(lambda: a @ b, limit) == [("mm.default", operands, result, flops)]
    assert recorded(lambda: torch.addmm(total, a, b), limit) == [
        ("addmm.default", operands + result, result, flops)
    ]
    assert recorded(lambda: total.addmm_(a, b), limit) == [
        ("addmm_.default", operands + result, result, flops)
    ]
    overwrite = recorded(lambda: total.addmm_(a, b, beta=0), limit)
    assert overwrite == [("addmm_.default", operands, result, flops)]
    half = a.bfloat16(), b.bfloat16()
    if limit == 0:  # not a CPU's
        into = recorded(lambda: torch.addmm(total, *half, out_dtype=torch.float32, out=total), limit)
        assert into == [("addmm.dtype_out", operands // 2 + result, result, flops)]


def test_what_is_not_computed_looks_like_what_is() -> None:
    a, b = torch.randn(M, K), torch.randn(N, K)
    functions = [lambda: a @ b.T, lambda: a.T.exp(), lambda: torch.stack([a, a]), lambda: torch.sort(a)[1]]
    for function in functions:
        expected = function()
        with Traffic(limit=0):
            found = function()
        assert (found.shape, found.stride(), found.dtype) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
        )


@pytest.mark.parametrize("divided", [False, True])
def test_adamw_stores_gradients_where_it_divides_them(divided: bool) -> None:
    """Parameters, gradients and both moments in; all but the gradients out, or all."""
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in (100, 28)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    optimizer.step()
    if divided:
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())  # type: ignore[attr-defined]
    found = {name: (read, written) for name, read, written, _ in recorded(optimizer.step)}
    numbers = 2 * 4 + (2 * 4 if divided else 0)  # each parameter's step; both scalars
    tensors = 128 * 4
    assert found["_fused_adamw_.default"] == (4 * tensors + numbers, (4 if divided else 3) * tensors)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="the operator runs in Triton's interpreter")
def test_operators_are_looked_into() -> None:
    x, w, b = torch.randn(M, K, requires_grad=True), torch.randn(N, K, requires_grad=True), torch.randn(N)
    traffic = Traffic()
    with use_backend("triton"), traffic:
        linear(x, w, b).sum().backward()
    inside = {(o.inside, o.name, o.flops) for o in traffic.operations if o.inside}
    assert inside == {
        ("fusedgpt::linear", "aten.addmm.default", 2 * M * N * K),
        ("fusedgpt::linear_backward", "aten.clone.default", 0),  # of the sum's gradient, which is one number
        ("fusedgpt::linear_backward", "aten.mm.default", 2 * M * N * K),
    }
    backward = [o for o in traffic.operations if o.inside == "fusedgpt::linear_backward"]
    assert len(backward) == 3
    assert all("linear" in o.node for o in backward)


def compiled(code: str) -> list:
    """What code prints as JSON, in a process whose kernels are compiled and not interpreted."""
    environ = {key: value for key, value in environment().items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_launches_have_the_bytes_of_the_docstrings() -> None:
    pytest.importorskip("triton")
    found = compiled("""
        import json, torch
        from fusedgpt.bench.traffic import Traffic, without_a_gpu
        from fusedgpt.kernels import add_layer_norm, embed, gelu_mlp
        rows, columns, length = 512, 64, 128
        def leaf(*shape, dtype=torch.float32): return torch.empty(shape, dtype=dtype, requires_grad=True)
        x, residual = (leaf(rows, columns, dtype=torch.bfloat16) for _ in range(2))
        traffic = Traffic(limit=2**15)  # ids are computed: a CPU checks their range
        with without_a_gpu(traffic, "sm_90", 132), traffic:
            y, out = add_layer_norm(x, residual, leaf(columns), leaf(columns))
            torch.autograd.backward([y, out], [torch.empty_like(y), torch.empty_like(out)])
            gelu_mlp(x, leaf(256, columns), None, leaf(columns, 256), None).backward(torch.empty_like(x))
            ids = torch.zeros(rows // length, length, dtype=torch.int64)
            embed(ids, leaf(1000, columns), leaf(2 * length, columns), out_dtype=torch.bfloat16)
        print(json.dumps([(o.name, o.read, o.written) for o in traffic.operations if "aten" not in o.name]))
    """)
    tensor, hidden, stats, parameter = 512 * 64 * 2, 512 * 256 * 2, 2 * 512 * 4, 64 * 4
    by_name = {name: (read, written) for name, read, written in found}
    assert by_name["forward_kernel"] == (2 * tensor + 2 * parameter, 2 * tensor + stats)
    assert by_name["backward_kernel"][0] == 3 * tensor + stats + parameter
    assert by_name["gelu_kernel"] == (hidden, hidden)
    assert by_name["gelu_backward_kernel"] == (2 * hidden, 2 * hidden)
    assert by_name["embed_kernel"] == (512 * 8 + 512 * 64 * 4 + 128 * 64 * 4, tensor)


def test_every_kernel_is_known() -> None:
    from fusedgpt.bench.gpu.launches import kernels

    assert {name for _, name in kernels()} <= WRITES.keys()


def test_a_tensor_is_no_part_of_an_operation() -> None:
    """An operation outlives the step: it must not keep its tensors."""
    traffic = Traffic()
    with traffic:
        torch.ones(3) + 1
    assert not any(isinstance(value, Tensor) for o in traffic.operations for value in vars(o).values())


def test_the_bytes_of_a_step() -> None:
    pytest.importorskip("triton")
    rows = compiled("""
        import json, torch
        from fusedgpt.bench.step import bytes
        from fusedgpt.bench.step.sizes import Workload
        from fusedgpt.gpt.config import ModelConfig
        config = ModelConfig(500, context_length=128, n_layer=2, n_head=2, n_embd=256)
        work = Workload("test", 2, config, torch.device("cpu"), torch.bfloat16)
        bytes.COMPUTED = 1 << 16
        print(json.dumps([vars(row) for row in bytes.measure(work)]))
    """)
    *parts, whole, peak = rows
    by_part = {row["name"]: row for row in parts}
    assert by_part.keys() >= {*PARTS.values(), "AdamW", "gradient norm", "weight casts"}
    assert sum(row["gigabytes"] for row in parts) == pytest.approx(whole["gigabytes"])
    assert sum(row["share"] for row in parts) == pytest.approx(1.0)
    width, tokens, vocabulary = 256, 2 * 128, 512
    blocks, vectors = 2 * 12 * width**2, 2 * 13 * width + 2 * width
    parameters = blocks + vectors + (vocabulary + 128) * width
    # every matmul three times: forward, dx and dW
    assert whole["teraflops"] == pytest.approx(6 * tokens * (blocks + vocabulary * width) / 1e12)
    assert by_part["gradient norm"]["gigabytes"] == pytest.approx(4 * parameters / 1e9, rel=0.01)
    assert by_part["other"]["gigabytes"] < 0.01 * whole["gigabytes"]
    assert by_part["AdamW"]["further"] == 0
    assert whole["further"] < whole["gigabytes"]
    held, activations = 16 * parameters, tokens * (2 * (24 * width + 4 * 2 + 16) + 8 * width)
    assert (
        held + activations < 1e9 * peak["gigabytes"] < held + 2 * activations + 8 * vocabulary * width + 2**20
    )
