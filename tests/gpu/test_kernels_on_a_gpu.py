"""What only a GPU can show of the kernels: CUDA graphs, compiled code under torch.compile, huge tensors, full sizes.

`make gpu` runs these, as `make test` does where there is a GPU. `tests/kernels` has the rest, which runs anywhere.
"""

from dataclasses import replace

import pytest
import torch

from fusedgpt.bench.gpu.run import DTYPES
from fusedgpt.bench.tiles.candidates import TABLES, in_table
from fusedgpt.bench.timing import full_rows
from fusedgpt.kernels import (
    add_layer_norm,
    dropout,
    embed,
    gelu_mlp,
    layer_norm,
    linear,
    matmul,
    use_backend,
)
from fusedgpt.kernels._triton import INTERPRETED
from fusedgpt.kernels.dropout_mask import _words, keep_mask
from fusedgpt.kernels.examples import SMALL, draw, full_size, parity, results
from fusedgpt.kernels.ops.mlp import operator as mlp
from fusedgpt.kernels.tiles import LIBRARY, hardware

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU that Triton compiles for"
)

GPU = torch.device("cuda")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def kernels_only():
    with use_backend("triton"):
        yield
    torch.cuda.empty_cache()


def leaf(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=GPU, requires_grad=True)


def seed(value: int) -> torch.Tensor:
    return torch.tensor([value], device=GPU)


def captured(work) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of `work()`, after the warm-up that capturing wants, and the tensors that each replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


def test_each_replay_of_a_cuda_graph_draws_the_mask_of_its_seed() -> None:
    counter = seed(0)
    x = torch.ones(64, 200, device=GPU, requires_grad=True)

    def work() -> list[torch.Tensor]:
        y = dropout(x, 0.5, counter, 3)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        counter.add_(1)
        return [y, dx]

    graph, results = captured(work)
    counter.fill_(40)
    for step in range(3):
        graph.replay()
        expected = 2.0 * keep_mask(seed(40 + step), 3, 64, 200, 0.5)
        assert all(torch.equal(result, expected) for result in results)


def test_add_layer_norm_in_a_cuda_graph_is_that_outside() -> None:
    counter = seed(0)
    tensors = [leaf(300, 768), leaf(300, 768), *(leaf(768, dtype=torch.float32) for _ in range(3))]
    x, residual, weight, bias, x_bias = tensors
    incoming = [torch.randn(300, 768, device=GPU, dtype=BF16) for _ in range(2)]

    def work() -> list[torch.Tensor]:
        outputs = add_layer_norm(x, residual, weight, bias, 1e-5, 0.1, counter, 2, x_bias)
        gradients = torch.autograd.grad(outputs, tensors, incoming)
        counter.add_(1)
        return [*outputs, *gradients]

    graph, results = captured(work)
    for start in (7, 8):
        counter.fill_(start)
        graph.replay()
        replayed = [result.detach().clone() for result in results]
        counter.fill_(start)
        assert all(torch.equal(a, b) for a, b in zip(replayed, work(), strict=True))


def test_the_embedding_and_a_projection_in_a_cuda_graph_are_those_outside() -> None:
    counter = seed(0)
    ids = torch.randint(1000, (8, 256), device=GPU)
    tensors = [leaf(*shape, dtype=torch.float32) for shape in ((1024, 768), (256, 768), (2304, 768), (2304,))]
    wte, wpe, weight, bias = tensors
    incoming = torch.randn(8, 256, 2304, device=GPU, dtype=BF16)

    def work() -> list[torch.Tensor]:
        y = linear(embed(ids, wte, wpe, 0.1, counter, 0, BF16), weight, bias)
        gradients = torch.autograd.grad(y, tensors, incoming)
        counter.add_(1)
        return [y, *gradients]

    graph, results = captured(work)
    for start in (7, 8):
        ids.copy_(torch.randint(1000, (8, 256), device=GPU))  # a replay sorts the ids that it finds
        counter.fill_(start)
        graph.replay()
        replayed = [result.detach().clone() for result in results]
        counter.fill_(start)
        assert all(torch.equal(a, b) for a, b in zip(replayed, work(), strict=True))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_embedding_gradients_of_skewed_tokens(share: float) -> None:
    """The same bits twice, and the sums of torch in float64, whatever share of all rows is one token's."""
    rows, vocabulary = full_rows(GPU), 50304
    ids = torch.randint(vocabulary, (rows,), device=GPU)
    ids = torch.where(torch.rand(rows, device=GPU) < share, 13, ids).view(-1, 1024)
    wte, wpe = leaf(vocabulary, 768, dtype=torch.float32), leaf(1024, 768, dtype=torch.float32)
    dx = torch.randn(*ids.shape, 768, device=GPU, dtype=BF16)
    x = embed(ids, wte, wpe, out_dtype=BF16)
    first, second = (torch.autograd.grad(x, [wte, wpe], dx, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = torch.zeros(vocabulary, 768, device=GPU, dtype=torch.float64)
    exact.index_add_(0, ids.flatten(), dx.flatten(0, 1).double())
    torch.testing.assert_close(first[0], exact.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(first[1], dx.double().sum(0).float(), rtol=1e-5, atol=1e-4)


def test_an_id_out_of_range_is_nan_and_breaks_nothing() -> None:
    ids = torch.tensor([[0, 50, -1, 2**40, 3]], device=GPU)
    wte, wpe = leaf(50, 768, dtype=torch.float32), leaf(5, 768, dtype=torch.float32)
    x = embed(ids, wte, wpe)
    assert x.isnan().all(2).tolist() == [[False, True, True, True, False]]
    dwte, dwpe = torch.autograd.grad(x, [wte, wpe], torch.ones_like(x))
    assert torch.equal(dwte[:5, 0], torch.tensor([1.0, 0, 0, 1, 0], device=GPU))  # 2**40 is not the id 0
    assert not dwte[5:].any()
    assert torch.equal(dwpe, torch.ones_like(dwpe))


def test_a_projection_of_float32_masters_keeps_the_accumulator() -> None:
    x, weight, bias = leaf(4096, 768), leaf(2304, 768, dtype=torch.float32), leaf(2304, dtype=torch.float32)
    conv = leaf(768, 2304, dtype=torch.float32)
    dy = torch.randn(4096, 2304, device=GPU, dtype=BF16)
    dweight, dbias = torch.autograd.grad(linear(x, weight, bias), [weight, bias], dy)
    (dconv,) = torch.autograd.grad(linear(x, conv.T), conv, dy)
    exact = dy.double().T @ x.detach().double()
    for ours, truth in ((dweight, exact), (dconv, exact.T), (dbias, dy.double().sum(0))):
        assert ours.dtype == torch.float32
        assert ours.is_contiguous()
        assert ((ours.double() - truth).norm() / truth.norm()).item() < 1e-4  # bfloat16 would be off by 2e-3
    nothing = linear(x[:0], weight, bias)
    for gradient in torch.autograd.grad(nothing.sum(), [weight, bias]):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_products_of_any_layout_keep_the_accumulator(dtype: torch.dtype) -> None:
    """Also of a transposed slice, as the logits' gradient is, over a total that held NaN before the first."""
    dz = torch.randn(300, 1024, device=GPU, dtype=dtype)[:, :1003].mT
    x = torch.randn(300, 64, device=GPU, dtype=dtype)
    exact = dz.double() @ x.double()
    total = torch.full((1003, 64), float("nan"), device=GPU)
    matmul.accumulate(total, dz, x, first=True)
    torch.testing.assert_close(total.double(), exact, rtol=1e-4, atol=1e-4)
    matmul.accumulate(total, dz, x)
    torch.testing.assert_close(total.double(), 2 * exact, rtol=1e-4, atol=1e-4)
    for a, b, truth in ((dz, x, exact), (x.T, dz.T, exact.T)):
        torch.testing.assert_close(matmul.product(a, b, torch.float32).double(), truth, rtol=1e-4, atol=1e-4)
        assert matmul.product(a, b, dtype).dtype == dtype


def _tables(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.randint(9, (3, 20), device=GPU), leaf(9, 70, dtype=dtype), leaf(20, 70, dtype=dtype)


@pytest.mark.parametrize("recompute", [False, True])
def test_gelu_mlp_in_a_cuda_graph_is_that_outside(recompute: bool) -> None:
    tensors = [leaf(2000, 256), *(leaf(*n, dtype=torch.float32) for n in ((1024, 256), (1024,), (256, 1024)))]
    incoming = torch.randn(2000, 256, device=GPU, dtype=BF16)

    def work() -> list[torch.Tensor]:
        y = gelu_mlp(*tensors, None, recompute=recompute)
        return [y, *torch.autograd.grad(y, tensors, incoming)]

    graph, results = captured(work)
    with torch.no_grad():
        tensors[0].copy_(torch.randn_like(tensors[0]))
    graph.replay()
    # cuBLAS promises no bits from one stream to another
    torch.testing.assert_close(results, work(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("title", ["MLP_UP", "MLP_DOWN_GRADIENT"])
def test_every_form_of_the_feed_forward_sub_layer(
    title: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the table does not choose here it may choose on another GPU; C and 4C are no multiples of a tile."""
    ran = []
    original = mlp._launch_matmul
    monkeypatch.setattr(mlp, "_launch_matmul", lambda *a: ran.append(a[1]) or original(*a))
    architecture = hardware(GPU).architecture
    for tile in TABLES[title].candidates(1024, architecture):
        ran.clear()
        with in_table(TABLES[title].table, architecture, tile):
            found = parity(TABLES[title].example(840), GPU, dtype)
        assert found.ok, tile
        assert bool(ran) == (tile != LIBRARY)


OPCHECK = [
    ("embed", lambda: (*_tables(torch.float32), 0.1, seed(1), 2, BF16)),
    (
        "linear",
        lambda: (leaf(33, 70), w := leaf(90, 70, dtype=torch.float32), w.detach().bfloat16(), leaf(90)),
    ),
    ("gelu_mlp", lambda: (leaf(33, 64), leaf(256, 64), leaf(256), leaf(64, 256), None, False, True)),
    ("dropout", lambda: (leaf(33, 70), 0.3, seed(1), 1)),
    ("attention", lambda: (*(leaf(2, 33, 3, 64) for _ in range(3)), None, 0.1, seed(1), 3, 0.125, True)),
    (
        "linear_cross_entropy",
        lambda: (
            *(leaf(33, 96), leaf(131, 96, dtype=torch.float32), torch.arange(33, device=GPU)),
            *(128, 5, 0.1, 1e-4, True, True, True),
        ),
    ),
    ("layer_norm", lambda: (leaf(33, 768), leaf(768, dtype=torch.float32), None, 1e-5, BF16)),
    ("layer_norm", lambda: (leaf(3, 9001), leaf(9001), leaf(9001), 1e-5, torch.float32)),
    (
        "add_layer_norm",
        lambda: (
            *(leaf(33, 768), leaf(33, 768, dtype=torch.float32), leaf(768), leaf(768), leaf(768)),
            *(1e-5, 0.2, seed(1), 3),
        ),
    ),
]


@pytest.mark.parametrize(("name", "arguments"), OPCHECK)
def test_opcheck_in_bfloat16(name: str, arguments) -> None:
    torch.library.opcheck(getattr(torch.ops.fusedgpt, name).default, arguments())


def test_opcheck_knows_every_operator() -> None:
    assert {name for name, _ in OPCHECK} == set(SMALL)


@pytest.mark.parametrize("operator", SMALL)
def test_inductor_compiles_one_graph_with_the_same_results(operator: str) -> None:
    example = SMALL[operator]
    tensors = draw(example, GPU, BF16)
    compiled = results(replace(example, call=torch.compile(example.call, fullgraph=True)), tensors)
    assert all(torch.equal(a, b) for a, b in zip(compiled, results(example, tensors), strict=True))


class TestMoreThan2To31Elements:
    ROWS, COLUMNS = 2**21 + 3, 1024

    @pytest.fixture(autouse=True)
    def room(self) -> None:
        free, _ = torch.cuda.mem_get_info()
        if free < 30 * 2**30:
            pytest.skip(f"needs 30 GiB of GPU memory, {free / 2**30:.0f} GiB are free")

    def test_layer_norm(self) -> None:
        x, weight, bias = leaf(self.ROWS, self.COLUMNS), leaf(self.COLUMNS), leaf(self.COLUMNS)
        incoming = torch.randn(self.ROWS, self.COLUMNS, device=GPU, dtype=BF16)
        y = layer_norm(x, weight, bias)
        (dx,) = torch.autograd.grad(y, x, incoming)
        tail = x.detach()[-5:].clone().requires_grad_()
        y_tail = layer_norm(tail, weight, bias)
        torch.testing.assert_close(y[-5:], y_tail)
        torch.testing.assert_close(dx[-5:], torch.autograd.grad(y_tail, tail, incoming[-5:])[0])

    def test_gelu_mlp(self) -> None:
        x, w_fc, b_fc = leaf(self.ROWS, 256), leaf(self.COLUMNS, 256), leaf(self.COLUMNS)
        w_proj = leaf(256, self.COLUMNS)
        incoming = torch.randn(self.ROWS, 256, device=GPU, dtype=BF16)
        y = gelu_mlp(x, w_fc / 16, b_fc, w_proj / 32, None)
        (dx,) = torch.autograd.grad(y, x, incoming)
        tail = x.detach()[-5:].clone().requires_grad_()
        y_tail = gelu_mlp(tail, w_fc / 16, b_fc, w_proj / 32, None)
        torch.testing.assert_close(y[-5:], y_tail, rtol=2e-2, atol=2e-2)
        (dx_tail,) = torch.autograd.grad(y_tail, tail, incoming[-5:])
        torch.testing.assert_close(dx[-5:], dx_tail, rtol=2e-2, atol=2e-2)

    def test_dropout(self) -> None:
        y = dropout(torch.ones(self.ROWS, self.COLUMNS, device=GPU, dtype=BF16), 0.5, seed(3), 1)
        row = torch.arange(self.ROWS - 5, self.ROWS, device=GPU)[:, None]
        words = _words(seed(3), 1, torch.zeros_like(row), row, torch.arange(self.COLUMNS, device=GPU))
        assert torch.equal(y[-5:] != 0, words >= 2**31)


def test_the_same_bits_twice_at_the_size_of_training() -> None:
    rows = full_rows(GPU)
    tensors = [leaf(rows, 768), leaf(rows, 768), leaf(768), leaf(768), leaf(768)]
    x, residual, weight, bias, x_bias = tensors
    incoming = [torch.randn(rows, 768, device=GPU, dtype=BF16) for _ in range(2)]

    def run() -> list[torch.Tensor]:
        outputs = add_layer_norm(x, residual, weight, bias, 1e-5, 0.1, seed(2), 1, x_bias)
        return [*outputs, *torch.autograd.grad(outputs, tensors, incoming)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", SMALL)
def test_parity_at_full_size(operator: str, dtype: torch.dtype) -> None:
    for example in full_size(full_rows(GPU), GPU, dtype):
        assert example.operator != operator or parity(example, GPU, dtype).ok, example.size
