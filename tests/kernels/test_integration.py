"""What every Triton operator owes PyTorch: opcheck, autocast, activation checkpointing, torch.compile.

An operator joins by a line in `fusedgpt.kernels.examples.SMALL` (its public call) and one in ARGUMENTS here (its
registered operators).
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fusedgpt import kernels
from fusedgpt.kernels import use_backend
from fusedgpt.kernels.examples import SMALL, draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor([77], device=DEVICE)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)


def flat(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


F32, F16 = torch.float32, torch.float16
FIRST = torch.tensor([[0, 0, 2], [1, 3, 0]], dtype=torch.int32, device=DEVICE)
IDS = torch.tensor([[3, 0, 3], [6, 3, 1]], device=DEVICE)
TARGETS = torch.tensor([0, 3, 4, 1, 3], device=DEVICE)
ARGUMENTS = [
    ("embed", (IDS, leaf(7, 5), leaf(4, 5), 0.3, SEED, 1, F16)),
    ("embed", (IDS.int(), leaf(7, 140, dtype=F16), leaf(3, 140), 0.0, None, 0, F32)),
    ("embedding_row_sums", (flat(2, 3, 5), *IDS.int().flatten().sort(stable=True), 7, F16, 0.3, SEED, 1)),
    (
        "embedding_row_sums",
        (flat(2, 3, 5), *IDS.int().flatten().sort(stable=True), 7, F16, 0.0, None, 1, flat(7, 5)),
    ),
    ("linear", (leaf(2, 3, 5), leaf(7, 5), flat(7, 5), leaf(7))),
    ("linear", (leaf(3, 5, dtype=F16), leaf(5, 7).T, flat(5, 7, dtype=F16).T, None)),
    ("linear_backward", (flat(2, 3, 7), flat(2, 3, 5), flat(7, 5), F32, False, True)),
    ("linear_backward", (flat(3, 7, dtype=F16), flat(3, 5, dtype=F16), None, F32, True, False)),
    ("linear_backward", (flat(2, 3, 7), flat(2, 3, 5), flat(7, 5), F32, False, True, flat(7, 5))),
    ("column_sum", (flat(40, 35, dtype=F16),)),
    ("dropout", (leaf(3, 5), 0.3, SEED, 1)),
    ("dropout_words", (SEED, 3, IDS.view(6, 1, 1), IDS.view(6, 1), IDS.view(6))),
    ("layer_norm", (leaf(2, 3, 5), leaf(5), leaf(5), 1e-5, F32)),
    ("layer_norm", (leaf(2, 140, dtype=F16), leaf(140), None, 1e-5, F32)),
    ("add_layer_norm", (leaf(3, 5), leaf(3, 5), leaf(5), leaf(5), leaf(5), 1e-5, 0.2, SEED, 3)),
    ("add_layer_norm", (leaf(3, 140, dtype=F16), leaf(3, 140), leaf(140), None, None, 1e-5, 0.0, None, 0)),
    ("attention", (*(leaf(2, 5, 3, 4) for _ in range(3)), None, 0.0, None, 0, 0.5, True)),
    (
        "attention",
        (
            leaf(2, 3, 1, 16, dtype=F16),
            *(leaf(2, 18, 1, 16, dtype=F16) for _ in range(2)),
            FIRST,
            0.1,
            SEED,
            3,
            0.25,
            False,
        ),
    ),
    ("packed_attention", (leaf(2, 3, 3 * 8), 2, FIRST, 0.1, SEED, 3, 0.5, True)),
    ("packed_attention", (leaf(2, 17, 3 * 16, dtype=F16), 1, None, 0.0, None, 0, 0.25, True)),
    (
        "attention_backward",
        (*(flat(2, 5, 3, 4) for _ in range(5)), flat(2, 3, 5), None, 0.1, SEED, 0, 0.5, True),
    ),
    (
        "packed_attention_backward",
        (flat(2, 3, 8), flat(2, 3, 24), flat(2, 3, 8), flat(2, 2, 3), 2, FIRST, 0.0, None, 0, 0.5, True),
    ),
    # in the interpreter, rows of whole 16 bytes go to our own matmuls, others to the library's
    (
        "gelu_mlp",
        (leaf(2, 33, 8), leaf(72, 8), flat(72, 8), leaf(72), leaf(8, 72), flat(8, 72), leaf(8), False, True),
    ),
    (
        "gelu_mlp",
        (
            *(leaf(3, 5, dtype=F16), leaf(7, 5), flat(7, 5, dtype=F16), None),
            *(leaf(7, 6).T, flat(7, 6, dtype=F16).T, None, True, False),
        ),
    ),
    (
        "gelu_mlp_backward",
        (
            *(flat(66, 8), flat(66, 8), flat(66, 72), flat(72, 8), flat(72), flat(8, 72)),
            None,
            False,
            [True] * 4 + [False],
            F32,
            F32,
        ),
    ),
    (
        "gelu_mlp_backward",
        (
            *(flat(66, 8), flat(66, 8), flat(66, 72), flat(72, 8), flat(72), flat(8, 72)),
            None,
            False,
            [True] * 4 + [False],
            F32,
            F32,
            flat(72, 8),
            flat(8, 72),
        ),
    ),
    (
        "gelu_mlp_backward",
        (
            *(flat(3, 6), flat(3, 5), None, flat(5, 7).T, None, flat(6, 7), flat(6)),
            True,
            [False, True, False, True, True],
            F32,
            F32,
        ),
    ),
    ("linear_cross_entropy", (leaf(5, 6), leaf(70, 6), TARGETS, 67, 3, 0.1, 1e-3, True, True, True)),
    (
        "linear_cross_entropy",
        (leaf(5, 6, dtype=F16), leaf(7, 6), TARGETS.int(), 5, -100, 0.0, 0.0, False, False, True),
    ),
    ("linear_cross_entropy_loss", (leaf(5, 6), leaf(70, 6, dtype=F16), TARGETS, 67, 3, 0.0, 1e-3)),
    (
        "linear_cross_entropy_backward",
        (flat(5), flat(5, 6, dtype=F16), flat(70, 6), TARGETS, flat(5), 67, 3, 0.1, 0.0, True, False),
    ),
    (
        "layer_norm_backward",
        (flat(3, 5), None, flat(3, 5), flat(5), flat(2, 3), 0.0, None, 0, F32, True, False, False),
    ),
    (
        "layer_norm_backward",
        (None, flat(3, 140), flat(3, 140), flat(140), flat(2, 3), 0.1, SEED, 0, F16, True, True, True),
    ),
]


@pytest.mark.parametrize(
    ("name", "arguments"), ARGUMENTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(ARGUMENTS)]
)
def test_opcheck(name: str, arguments: tuple) -> None:
    torch.library.opcheck(getattr(torch.ops.fusedgpt, name).default, arguments)


def test_every_operator_is_checked() -> None:
    assert set(SMALL) == {*kernels.__all__} - {"causal_attention", "explain", "use_backend"}
    assert {name for name, _ in ARGUMENTS} >= set(SMALL)


def loss_and_gradients(call, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    outputs = call(**tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(y.float().square().mean() for y in outputs)
    return [loss.detach(), *torch.autograd.grad(loss, floating(tensors))]


def floating(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [t for t in tensors.values() if t.is_floating_point()]


@pytest.mark.parametrize("operator", SMALL)
def test_memory_that_nobody_wrote_is_never_used(operator: str) -> None:
    """Partial sums, padding, accumulators: the results are the same where new memory holds NaN."""
    call = SMALL[operator].call
    tensors = draw(SMALL[operator], DEVICE, torch.float32)
    with use_backend("triton"):
        expected = loss_and_gradients(call, tensors)
        torch.use_deterministic_algorithms(True, warn_only=True)  # also fills what torch.empty returns
        try:
            assert torch.empty(1, device=DEVICE).isnan()
            results = loss_and_gradients(call, tensors)
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("operator", SMALL)
def test_compiled_without_graph_breaks(operator: str) -> None:
    tensors = draw(SMALL[operator], DEVICE, torch.float32)
    call = SMALL[operator].call
    with use_backend("triton"):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        ours = loss_and_gradients(compiled, tensors)
        eager = loss_and_gradients(call, tensors)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


@pytest.mark.parametrize("operator", SMALL)
def test_compiling_follows_the_backend(operator: str) -> None:
    tensors = draw(SMALL[operator], DEVICE, torch.float32)
    graphs = []

    def note(module: torch.fx.GraphModule, _):
        # plain PyTorch draws its mask by an operator, too
        graphs.append("torch.ops.fusedgpt" in module.code.replace("torch.ops.fusedgpt.dropout_words", ""))
        return module

    torch.compiler.reset()
    compiled = torch.compile(SMALL[operator].call, fullgraph=True, backend=note)
    for backend in ("triton", "torch"):
        with use_backend(backend):
            compiled(**tensors)
    assert graphs == [True, False]


@pytest.mark.parametrize("operator", SMALL)
def test_checkpointing_draws_the_same_masks(operator: str) -> None:
    tensors = draw(SMALL[operator], DEVICE, torch.float32)
    call = SMALL[operator].call
    with use_backend("triton"):
        ours = loss_and_gradients(lambda **t: checkpoint(call, use_reentrant=False, **t), tensors)
        eager = loss_and_gradients(call, tensors)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


@pytest.mark.parametrize("operator", SMALL)
def test_autocast_gives_the_dtypes_of_the_reference(operator: str) -> None:
    tensors = draw(SMALL[operator], DEVICE, torch.float32)
    dtypes = []
    for backend in ("triton", "torch"):
        with use_backend(backend), torch.autocast(DEVICE, torch.float16):
            outputs = SMALL[operator].call(**tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad(sum(y.float().sum() for y in outputs), floating(tensors))
        dtypes.append([t.dtype for t in (*outputs, *grads)])
    assert dtypes[0] == dtypes[1]
