"""The feed-forward kernels in both forms: beside the library's matmuls, and within matmuls of our own.

Interpreted, so in float32 and float16, with tiles of 16 or 32 that no size here is a multiple of. Sizes that no
descriptor takes (not whole 16 bytes a row) run in the library's form whatever the table says.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fusedgpt.bench.tiles.candidates import in_table
from fusedgpt.kernels import _triton, gelu_mlp, matmul, use_backend
from fusedgpt.kernels.ops.mlp import operator as mlp
from fusedgpt.kernels.tiles import (
    ANY,
    GELU_BACKWARD,
    GELU_FORWARD,
    LIBRARY,
    MLP_DOWN_GRADIENT,
    MLP_UP,
    MatmulTile,
    select,
)

from .test_layer_norm_kernels import DTYPES, assert_within, drawn, gradients, leaves

pytestmark = pytest.mark.skipif(not _triton.INTERPRETED, reason="tiles that only the interpreter takes")

OWN = {"up": MatmulTile(ANY, 16, 32, 16, 1, 1, 2, 1, ""), "down": MatmulTile(ANY, 32, 32, 16, 1, 1, 4, 2, "")}
FORMS = ["library", "own"]


@contextmanager
def form(name: str) -> Iterator[list[str]]:
    """Our kernels in one form; yields the names of the matmuls of our own that ran."""
    up, down = (LIBRARY, LIBRARY) if name == "library" else (OWN["up"], OWN["down"])
    ran: list[str] = []
    original = mlp._launch_matmul

    def noted(kernel, *rest) -> None:
        ran.append(kernel.fn.__name__)
        original(kernel, *rest)

    with pytest.MonkeyPatch.context() as patch, use_backend("triton"):
        patch.setattr(mlp, "_launch_matmul", noted)
        with in_table(MLP_UP, "interpreter", up), in_table(MLP_DOWN_GRADIENT, "interpreter", down):
            yield ran


def plain(
    x: Tensor,
    w_fc: Tensor,
    b_fc: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    approximate: str = "tanh",
    recompute: bool = False,
) -> Tensor:
    """What torch's own operators make of it, the weights cast."""
    w_fc, b_fc, w_proj, b_proj = (t if t is None else t.to(x.dtype) for t in (w_fc, b_fc, w_proj, b_proj))
    return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate=approximate), w_proj, b_proj)


def inputs(
    dtype: torch.dtype, masters: torch.dtype, rows: int, width: int, hidden: int, biased: bool = True
) -> list[Tensor | None]:
    """x, w_fc, b_fc, w_proj, b_proj as leaves."""
    (x,) = leaves(torch.float16, dtype, (rows, width))
    w_fc, w_proj = leaves(torch.float16, masters, (hidden, width), (width, hidden))
    b_fc, b_proj = leaves(torch.float16, masters, (hidden,), (width,)) if biased else (None, None)
    for weight in (w_fc, w_proj):
        weight.data.mul_(0.25)  # a power of two, so the values stay the same in every dtype
    return [x, w_fc, b_fc, w_proj, b_proj]


def results(operator: Callable, tensors: list[Tensor | None], *options: object) -> list[Tensor]:
    return gradients([operator(*tensors, *options)], [t for t in tensors if t is not None])


@drawn
@given(
    name=st.sampled_from(FORMS),
    rows=st.integers(1, 50),
    width=st.sampled_from([8, 24, 40]),
    hidden=st.sampled_from([40, 56, 72, 104]),
    dtype=st.sampled_from(DTYPES),
    masters=st.booleans(),
    biased=st.booleans(),
    approximate=st.sampled_from(["tanh", "none"]),
    recompute=st.booleans(),
)
def test_parity(
    name: str,
    rows: int,
    width: int,
    hidden: int,
    dtype: torch.dtype,
    masters: bool,
    biased: bool,
    approximate: str,
    recompute: bool,
) -> None:
    def run(operator: Callable, dtype: torch.dtype, parameters: torch.dtype) -> list[Tensor]:
        tensors = inputs(dtype, parameters, rows, width, hidden, biased)
        return results(operator, tensors, approximate, recompute)

    parameters = torch.float32 if masters else dtype
    with form(name) as ran:
        ours = run(gelu_mlp, dtype, parameters)
    assert ran == (["up_kernel", "down_gradient_kernel"] if name == "own" else [])
    double = torch.float64
    assert_within(ours, run(plain, dtype, parameters), run(plain, double, double))


@pytest.mark.parametrize("size", [{"width": 30}, {"hidden": 50}, {"rows": 1, "hidden": 32}])
def test_what_our_matmul_does_not_take_the_library_does(size: dict[str, int]) -> None:
    """Rows of no whole 16 bytes; fewer tiles than multiprocessors, of which the interpreter has two."""
    tensors = inputs(torch.float16, torch.float16, **({"rows": 5, "width": 24, "hidden": 64} | size))
    with form("own") as ran:
        ours = results(gelu_mlp, tensors)
    assert ran == []
    torch.testing.assert_close(ours, results(plain, tensors), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.filterwarnings("ignore:overflow")  # that of the exponential is meant
def test_gelu_and_its_slope_over_the_whole_range(name: str, approximate: str) -> None:
    """Both projections the identity, so that nothing but GELU rounds."""
    one = torch.eye(8)
    near = torch.linspace(-12, 12, 8 * 40).view(40, 8)
    far = torch.tensor([-6e4, -300.0, -50.0, -20.0, 20.0, 50.0, 300.0, 6e4]).expand(40, 8)

    def run(operator: Callable, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        x = x.to(dtype).requires_grad_()
        y = operator(x, one.to(dtype), None, one.to(dtype), None, approximate)
        return [y.detach(), torch.autograd.grad(y.sum(), x)[0]]

    single, double = torch.float32, torch.float64
    with form(name):
        assert_within(run(gelu_mlp, near, single), run(plain, near, single), run(plain, near, double))
        y, slope = run(gelu_mlp, far, single)
    assert torch.equal(y, far.relu())
    assert torch.equal(slope, far.sign().relu())


@pytest.mark.parametrize("name", FORMS)
def test_any_strides_and_nothing_is_written_over(name: str) -> None:
    """Both weight orientations, a bias of every second number, x and the incoming gradient expanded or cut out."""
    torch.manual_seed(0)
    x = torch.randn(24, 3, 11, dtype=torch.float16).permute(2, 1, 0)
    w_fc, w_proj = torch.randn(24, 72).T / 8, torch.randn(72, 25)[:, 1:].T / 8
    b_fc, b_proj = torch.randn(72, 2)[:, 0], torch.randn(24, 2)[:, 1]
    tensors = [t.requires_grad_() for t in (x, w_fc, b_fc, w_proj, b_proj)]
    before = [t.detach().clone() for t in tensors]
    for incoming in (
        torch.ones((), dtype=torch.float16).expand(11, 3, 24),
        torch.randn(11, 3, 25).half()[..., 1:],
    ):
        kept = incoming.clone()
        with form(name) as ran:
            y = gelu_mlp(*tensors)
            ours = [torch.autograd.grad(y, tensors, incoming, retain_graph=True) for _ in range(2)]
        assert len(ran) == (3 if name == "own" else 0)
        expected = torch.autograd.grad(plain(*tensors), tensors, incoming)
        torch.testing.assert_close(ours[0], expected, rtol=1e-2, atol=1e-2)
        assert all(torch.equal(a, b) for a, b in zip(*ours, strict=True))  # the graph is as good as new
        assert all(torch.equal(a, b) for a, b in zip([*tensors, incoming], [*before, kept], strict=True))
    assert [g.is_contiguous() for g in ours[0][1:4:2]] == [False, False]  # in the order of its weight


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("trained", [(i,) for i in range(5)] + [(0, 2), (1, 3), (3, 4)])
def test_only_wanted_gradients(name: str, trained: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [t.detach() for t in inputs(torch.float32, torch.float32, 20, 24, 40)]
    wanted = [tensors[i].requires_grad_() for i in trained]
    products = []
    original = matmul.product
    monkeypatch.setattr(matmul, "product", lambda *a: products.append(1) or original(*a))
    with form(name) as ran:
        ours = torch.autograd.grad(gelu_mlp(*tensors).square().sum(), wanted)
    expected = torch.autograd.grad(plain(*tensors).square().sum(), wanted)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert len(products) == len({1, 3} & set(trained))  # gradients of weights
    assert ("down_gradient_kernel" in ran) == (name == "own" and min(trained) < 3)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,), (1, 8)])
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    _, *parameters = inputs(torch.float32, torch.float32, 1, 8, 40)
    x = torch.randn(shape, requires_grad=True)
    found = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            y = gelu_mlp(x, *parameters)
            found.append([y, *torch.autograd.grad(y.sum(), [x, *parameters])])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_saved(name: str) -> None:
    """x, the biases, the weights as they multiply, and the pre-activation; recomputing leaves that out and changes no bit
    of the gradient."""
    x, *parameters = inputs(torch.float16, torch.float32, 40, 24, 72)
    slopes = []
    casts = [(72, 24), (24, 72)]
    for recompute, extra in ((False, [(40, 72), *casts]), (True, casts)):
        saved: list[Tensor] = []
        with form(name):
            with saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                y = gelu_mlp(x, *parameters, recompute=recompute)
            slopes.append(torch.autograd.grad(y.sum(), x)[0])
        assert [t.shape for t in saved if all(t is not known for known in (x, *parameters))] == extra
    if name == "library":  # elsewhere two matmuls that sum in different orders
        assert torch.equal(*slopes)
    torch.testing.assert_close(*slopes, rtol=1e-2, atol=1e-2)


def test_without_gradients_nothing_is_kept() -> None:
    x, *parameters = inputs(torch.float32, torch.float32, 40, 24, 72)
    arguments = []
    with pytest.MonkeyPatch.context() as patch, form("own"), torch.no_grad():
        patch.setattr(mlp, "_gelu_mlp", lambda *a: arguments.append(a) or (a[0], None))
        gelu_mlp(x, *parameters)
    assert arguments[0][-1] is False


@pytest.mark.parametrize("name", FORMS)
def test_the_same_bits_twice(name: str) -> None:
    def run() -> list[Tensor]:
        with form(name):
            return results(gelu_mlp, inputs(torch.float16, torch.float32, 70, 24, 72))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_backward_inside_autocast_rounds_nothing() -> None:
    tensors = inputs(torch.float32, torch.float32, 20, 24, 72)
    with form("library"):
        y = gelu_mlp(*tensors).sum()
        outside = torch.autograd.grad(y, tensors, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            inside = torch.autograd.grad(y, tensors)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("table", [GELU_FORWARD, GELU_BACKWARD])
def test_what_is_written_in_place_each_element_has_one_thread(table: dict) -> None:
    for architecture in table.keys() - {"interpreter"}:
        for hidden in (1, 2, 3, 4, 5, 8, 100, 3072):
            tile = select(table, architecture, hidden)
            lanes = 64 if architecture.startswith("gfx") or architecture == "any" else 32
            assert tile.rows * tile.block >= lanes * tile.warps


def test_float64_is_left_to_the_reference() -> None:
    tensors = inputs(torch.float64, torch.float64, 3, 8, 40)
    with use_backend("triton"), pytest.raises(RuntimeError, match="float64"):
        gelu_mlp(*tensors)
    with use_backend("triton"), pytest.raises(RuntimeError, match="no element"):
        gelu_mlp(torch.ones(3, 0), torch.ones(4, 0), None, torch.ones(2, 4), None)
