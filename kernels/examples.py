"""One table of examples, operator, shapes and call, and the one rule by which a result is right.

Doctor, sanitizer, benchmarks, kernel report, tile sweep and tests take their inputs from here. A new operator adds a
builder, which has the operator's name, and a line in each of `SMALL`, `full_size` and `compiled`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ._triton import INTERPRETED
from .backend import use_backend
from .matmul import gradients_in_place
from .ops.attention.operator import WIDEST
from .tiles import ANY, ATTENTION_ONE_PASS, attention_row, attention_tile, hardware

GPT2_WIDTHS = (768, 1024, 1280, 1600)  # C of the four sizes, small first
VOCABULARY, PADDED_VOCABULARY = 50257, 50304
IGNORED = -100  # the target that does not count
SLACK = {
    "rounding": 1.0,  # one unit in the last place
    "approximate": 3.0,  # two more: a GPU's exp2, rsqrt and division in float32 (PTX ISA: ex2, rsqrt.approx, div.full)
    "score": 4.0,  # attention rounds a score times log2(e) before it subtracts the maximum
    "slope": 4.0,  # GELU' out of one tanh, where its terms cancel
    "chain": 6.0,  # oneDNN adds a sum's terms one after the other on a CPU, MKL in several partial sums
    "log-sum-exp": 16.0,  # a softmax from its logarithm, up to 32, in float32
}

Shape = tuple[int, ...]
Tensors = dict[str, Tensor]
Outputs = Tensor | tuple[Tensor, ...]


class Integers(NamedTuple):
    """An int64 input: uniform in [0, high); multiples of `every` become `often`."""

    shape: Shape
    high: int
    often: int = 0
    every: int = 0


@dataclass(frozen=True)
class Example:
    """One operator at one size. `call` takes all inputs by name."""

    operator: str
    size: str
    call: Callable[..., Outputs]
    activations: Mapping[str, Shape]
    parameters: Mapping[str, Shape] = field(default_factory=dict)  # float32 masters in training
    integers: Mapping[str, Integers] = field(default_factory=dict)
    one_pass: bool = False  # attention's backward in one pass, however few heads there are
    in_place: bool = False  # gradients are added to parameters' `.grad`, by the operator itself where it can


def draw(
    example: Example,
    device: torch.device | str,
    dtype: torch.dtype,
    parameters: torch.dtype | None = None,
    values: torch.dtype | None = None,
    seed: int = 0,
) -> Tensors:
    """Random inputs by name; the floating ones require gradients.

    Matrices of parameters are scaled by the power of two next to 1 / √columns, as a model's are: pre-activations and
    logits are near 1, and the scaling rounds nothing.

    Args:
        dtype: of the activations.
        parameters: dtype of the parameters, `dtype` by default.
        values: every number is one of this dtype, `dtype` by default: the same seed gives the same numbers in any
            wider dtype.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensors: Tensors = {}
    for name, (shape, high, often, every) in example.integers.items():
        drawn = torch.randint(high, shape, generator=generator, device=device)
        tensors[name] = drawn.masked_fill(drawn % every == 0, often) if every else drawn
    for name, shape in {**example.activations, **example.parameters}.items():
        target = dtype if name in example.activations else parameters or dtype
        drawn = torch.randn(shape, generator=generator, device=device).to(values or dtype)
        if name in example.parameters and len(shape) > 1:
            drawn = drawn * 2.0 ** -round(math.log2(shape[-1]) / 2)
        tensors[name] = drawn.to(target).requires_grad_()
    return tensors


def results(example: Example, tensors: Tensors, values: torch.dtype | None = None) -> list[Tensor]:
    """The outputs and, where they have any, the gradients of the inputs, for random incoming gradients."""
    outputs = as_tuple(example.call(**tensors))
    if not outputs[0].requires_grad:
        return list(outputs)
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    incoming = [
        torch.randn(y.shape, generator=generator, device=y.device).to(values or y.dtype).to(y.dtype)
        for y in outputs
    ]
    leaves = [t for t in tensors.values() if t.requires_grad]
    with forced_one_pass() if example.one_pass else nullcontext():
        if example.in_place:
            for t in (tensors[name] for name in example.parameters):
                start = torch.randn(t.shape, generator=generator, device=t.device)
                t.grad = start.to(values or t.dtype).to(t.dtype)
            with gradients_in_place():
                torch.autograd.backward(outputs, incoming)
            gradients = tuple(t.grad for t in leaves if t.grad is not None)
        else:
            gradients = torch.autograd.grad(outputs, leaves, incoming)
    return [*(y.detach() for y in outputs), *gradients]


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@contextmanager
def forced_one_pass() -> Iterator[None]:
    """Take attention's backward in one pass wherever a row of the table allows it, however few heads there are."""
    kept = dict(ATTENTION_ONE_PASS)
    for name, rows in kept.items():
        ATTENTION_ONE_PASS[name] = tuple(row._replace(busy=0, cached=ANY) for row in rows)
    try:
        yield
    finally:
        ATTENTION_ONE_PASS.update(kept)


def has_one_pass(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether attention's backward has a row for one pass on a device."""
    device = torch.device(device)
    if not INTERPRETED and device.type != "cuda":
        return False
    name = attention_row(hardware(device).architecture, dtype == torch.float32, descriptors=True)
    return attention_tile(ATTENTION_ONE_PASS, name, head_dim).rows > 0


# ---- the rule


class Parity(NamedTuple):
    """Both relative to the largest value of the float64 result."""

    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def compare(
    ours: Tensor, torchs: Tensor, exact: Tensor, slack: str = "rounding", largest: float = 0.0
) -> Parity:
    """The rule: err(ours) <= 2 err(PyTorch in the same dtype) + slack, both errors the largest against float64.

    Args:
        slack: a name out of SLACK, in units in the last place of the largest value.
        largest: that value, by default the largest of `exact`.
    """

    def most(x: Tensor) -> float:
        return x.abs().max().item() if x.numel() else 0.0

    largest = largest or most(exact) or 1.0
    error, torch_error = (most(t.double() - exact) / largest for t in (ours, torchs))
    return Parity(error, 2 * torch_error + SLACK[slack] * torch.finfo(ours.dtype).eps)


def worst(parities: Iterable[Parity]) -> Parity:
    """The one closest to or furthest beyond what is allowed."""
    return max(
        parities, key=lambda parity: math.inf if math.isnan(parity.error) else parity.error / parity.allowed
    )


def parity(
    example: Example,
    device: torch.device | str,
    dtype: torch.dtype,
    parameters: torch.dtype | None = None,
    slack: str | None = None,
) -> Parity:
    """The worst of an example's outputs and gradients.

    Args:
        dtype, parameters: as `draw` takes them.
        slack: of float32 results, "approximate" on a GPU by default.
    """
    slack = slack or ("approximate" if torch.device(device).type == "cuda" else "rounding")

    def run(computed: torch.dtype, parameters: torch.dtype | None) -> list[Tensor]:
        return results(example, draw(example, device, computed, parameters, dtype), values=dtype)

    ours = run(dtype, parameters)
    with use_backend("torch"):
        torchs, exact = run(dtype, parameters), run(torch.float64, None)
    slacks = [slack if y.dtype == torch.float32 else "rounding" for y in ours]
    return worst(map(compare, ours, torchs, exact, slacks))


# ---- the builders


def embed(
    batch: int,
    length: int,
    columns: int,
    vocabulary: int,
    p: float = 0.0,
    out_dtype: torch.dtype | None = None,
    often: int | None = None,
) -> Example:
    """out_dtype: of the output where the tables are not float64. often: a token that is a twentieth of all."""

    def call(wte: Tensor, stream: int = 1, **rest: Any) -> Tensor:
        dtype = None if wte.dtype == torch.float64 else out_dtype
        return kernels.embed(wte=wte, dropout_p=p, stream=stream, out_dtype=dtype, **rest)

    ids = Integers((batch, length), vocabulary, *(() if often is None else (often, 20)))
    tables = {"wte": (vocabulary, columns), "wpe": (length, columns)}
    return Example(
        "embed", f"{batch * length} x {columns}, p = {p}", call, {}, tables, {"ids": ids} | _seed(p)
    )


def layer_norm(rows: int, columns: int, bias: bool = True, wide: bool = False) -> Example:
    """wide: of a float32 x, to its dtype in the example."""

    def call(x: Tensor, **rest: Any) -> Tensor:
        return kernels.layer_norm(_widened(x) if wide else x, out_dtype=x.dtype, **rest)

    vectors = dict.fromkeys(("weight", *(["bias"] if bias else [])), (columns,))
    size = f"{rows} x {columns}" + (", float32 to another dtype" if wide else "")
    return Example("layer_norm", size, call, {"x": (rows, columns)}, vectors)


def add_layer_norm(
    rows: int,
    columns: int,
    p: float = 0.0,
    x_bias: bool = True,
    bias: bool = True,
    wide: bool = False,
    last: bool = False,
) -> Example:
    """wide: with a float32 residual stream. last: nobody reads the new stream, as behind the last block."""

    def call(residual: Tensor, stream: int = 2, **rest: Any) -> Outputs:
        residual = _widened(residual) if wide else residual
        y, total = kernels.add_layer_norm(residual=residual, dropout_p=p, stream=stream, **rest)
        return y if last else (y, total)

    matrices = dict.fromkeys(("x", "residual"), (rows, columns))
    vectors = dict.fromkeys(
        ("weight", *(["bias"] if bias else []), *(["x_bias"] if x_bias else [])), (columns,)
    )
    size = (
        f"{rows} x {columns}, p = {p}" + (", float32 residual" if wide else "") + (", last" if last else "")
    )
    return Example("add_layer_norm", size, call, matrices, vectors, _seed(p))


def linear(rows: int, columns: int, out: int, bias: bool = True) -> Example:
    parameters: dict[str, Shape] = {"weight": (out, columns)} | ({"bias": (out,)} if bias else {})
    return Example(
        "linear", f"{rows} x {columns} to {out}", kernels.linear, {"x": (rows, columns)}, parameters
    )


def causal_attention(
    batch: int,
    length: int,
    n_head: int,
    head_dim: int,
    p: float = 0.0,
    first_key: bool = False,
    one_pass: bool = False,
    **options: Any,
) -> Example:
    """options: of `causal_attention`."""
    width = n_head * head_dim
    call = partial(kernels.causal_attention, n_head=n_head, dropout_p=p, stream=3, **options)
    size = f"{batch} x {length} x 3 x {width}, {n_head} heads, p = {p}{_named(options)}"
    integers = _first_key(first_key, batch, length, length) | _seed(p)
    size += ", first_key" if first_key else ""
    size += ", one pass" if one_pass else ""
    return Example("attention", size, call, {"qkv": (batch, length, 3 * width)}, {}, integers, one_pass)


def attention(
    batch: int,
    q_len: int,
    k_len: int,
    n_head: int,
    head_dim: int,
    p: float = 0.0,
    first_key: bool = False,
    shared: bool = False,
    trained: bool = True,
    cached: bool = False,
    **options: Any,
) -> Example:
    """options: of `attention`.

    shared: all sequences see the keys of one; their batch stride is 0, which no descriptor holds. trained: False calls
    it without gradients, as decoding does. cached: heads lie before positions, as in the cache of decoding.
    """

    def call(q: Tensor, k: Tensor, v: Tensor, **integers: Any) -> Tensor:
        k, v = (t.expand(batch, *t.shape[1:]) for t in (k, v))
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) if cached else t for t in (k, v))
        with torch.set_grad_enabled(trained):
            return kernels.attention(q, k, v, p, stream=3, **integers, **options)

    shapes = {"q": (batch, q_len, n_head, head_dim)}
    shapes |= dict.fromkeys("kv", (1 if shared else batch, k_len, n_head, head_dim))
    integers = _first_key(first_key, batch, q_len, k_len) | _seed(p)
    size = f"{batch} x {q_len} over {k_len} x {n_head} x {head_dim}, p = {p}{_named(options)}"
    size += ", shared keys" if shared else ""
    size += ", first_key" if first_key else ""
    return Example("attention", size, call, shapes, {}, integers)


def gelu_mlp(rows: int, columns: int, **options: Any) -> Example:
    """options: of `gelu_mlp`; b_proj=None leaves that bias out."""
    hidden = 4 * columns
    parameters: dict[str, Shape] = {"w_fc": (hidden, columns), "b_fc": (hidden,)}
    parameters |= {"w_proj": (columns, hidden), "b_proj": (columns,)}
    parameters = {name: shape for name, shape in parameters.items() if name not in options}
    call, size = partial(kernels.gelu_mlp, **options), f"{rows} x {columns}{_named(options)}"
    return Example("gelu_mlp", size, call, {"x": (rows, columns)}, parameters)


def linear_cross_entropy(
    rows: int,
    columns: int,
    vocabulary: int,
    padding: int = 0,
    ignored: bool = False,
    **options: Any,
) -> Example:
    """padding: more rows of the weight. ignored: a ninth of the targets. options: of `linear_cross_entropy`."""
    padded = vocabulary + padding
    call = partial(kernels.linear_cross_entropy, vocab_size=vocabulary, **options)
    targets = Integers((rows,), vocabulary, *((IGNORED, 9) if ignored else ()))
    return Example(
        "linear_cross_entropy",
        f"{rows} x {columns} x {padded}{_named(options)}",
        call,
        {"x": (rows, columns)},
        {"weight": (padded, columns)},
        {"targets": targets},
    )


def dropout(rows: int, columns: int, p: float = 0.1) -> Example:
    call = partial(kernels.dropout, p=p, stream=4)
    return Example("dropout", f"{rows} x {columns}", call, {"x": (rows, columns)}, {}, _seed(p))


def in_place(example: Example) -> Example:
    """The example as a training step calls it, within `gradients_in_place`."""
    return replace(example, size=f"{example.size}, in place", in_place=True)


def evaluated(example: Example) -> Example:
    """The example without gradients, as evaluation calls it."""

    def call(**tensors: Tensor) -> Outputs:
        with torch.no_grad():
            return example.call(**tensors)

    return replace(example, size=f"{example.size}, evaluated", call=call)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _seed(p: float) -> dict[str, Integers]:
    return {"seed": Integers((1,), 2**62)} if p else {}


def _first_key(wanted: bool, batch: int, q_len: int, k_len: int) -> dict[str, Integers]:
    return {"first_key": Integers((batch, q_len), k_len)} if wanted else {}


def _named(options: dict[str, Any]) -> str:
    return "".join(f", {name} = {value}" for name, value in options.items())


# ---- the sets

# uneven on purpose
SMALL: dict[str, Example] = {
    example.operator: example
    for example in (
        embed(2, 70, 96, 131, 0.1),
        layer_norm(140, 96),
        add_layer_norm(140, 96, 0.1),
        linear(140, 96, 131),
        causal_attention(2, 70, 3, 32, 0.1),
        gelu_mlp(140, 96),
        linear_cross_entropy(140, 96, 128, 3),
        dropout(140, 96),
    )
}
WIDE_ROW = add_layer_norm(5, 9001, 0.1)  # its rows are taken in blocks
ONE_PASS = causal_attention(2, 70, 3, 32, 0.1, one_pass=True)


def small(device: torch.device | str, dtype: torch.dtype) -> list[Example]:
    """`SMALL` and, on a device that has a row for it, `ONE_PASS`: every kernel that GPT-2's training launches there."""
    return [*SMALL.values(), *([ONE_PASS] if has_one_pass(device, dtype, 32) else [])]


def full_size(rows: int, device: torch.device | str, dtype: torch.dtype) -> list[Example]:
    """The sizes of GPT-2's training, with all that the kernels can do on a device in a dtype."""
    length, vocabulary = min(rows, 1024), min(16 * rows, PADDED_VOCABULARY)
    tables = partial(embed, rows // length, length, vocabulary=vocabulary, often=11)
    # a batch of 4: the float64 reference holds the T x T matrices of all heads
    heads = [(min(rows, 1024), 12, 64), (min(rows, 777), 25, 64), (min(rows, 1024), 8, 128)]
    heads = [sizes for sizes in heads if sizes[2] <= WIDEST[dtype]]
    one_pass_heads = [sizes for sizes in heads if has_one_pass(device, dtype, sizes[2])]
    # an eighth of the rows: it holds all logits too
    head = partial(linear_cross_entropy, max(rows // 8, 1), 768, VOCABULARY, PADDED_VOCABULARY - VOCABULARY)
    return [
        tables(columns=768),
        tables(columns=1600, p=0.1),
        *(layer_norm(rows, c) for c in GPT2_WIDTHS),
        *(add_layer_norm(rows, c, p) for c in GPT2_WIDTHS for p in (0.0, 0.1)),
        linear(rows, 768, 2304),
        linear(rows, 1600, 1600),
        *(causal_attention(4, *sizes, p) for sizes in heads for p in (0.0, 0.1)),
        *(causal_attention(4, *sizes, p, one_pass=True) for sizes in one_pass_heads for p in (0.0, 0.1)),
        *(gelu_mlp(rows, c) for c in GPT2_WIDTHS),
        gelu_mlp(rows, 768, approximate="none", recompute=True),
        head(ignored=True),
        head(ignored=True, reduction="none", label_smoothing=0.1, z_loss=1e-4),
        dropout(rows, 768),
    ]


def compiled() -> Iterator[tuple[Example, torch.dtype]]:
    """What the kernel report compiles: every row of `tiles.py`, every option that makes another kernel."""
    bf16, fp32 = torch.bfloat16, torch.float32
    rows, p = 37, 0.1
    for dtype in (bf16, fp32):
        yield dropout(rows, 768), dtype
        yield linear(rows, 768, 2304), dtype
        yield embed(1, rows, 768, 64, p, dtype), dtype
        yield in_place(embed(1, rows, 768, 64, p, dtype)), dtype
        yield add_layer_norm(rows, 768, p), dtype
        yield gelu_mlp(rows, 768, b_proj=None), dtype
        for reduction in ("mean", "none"):
            for label_smoothing in (0.0, 0.1):
                options: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
                yield linear_cross_entropy(rows, 64, VOCABULARY, 47, **options), dtype
    yield linear_cross_entropy(rows, 64, 1000, 24, label_smoothing=0.1), bf16
    yield gelu_mlp(rows, 768, b_proj=None, approximate="none"), bf16
    for columns in (128, 512):
        yield embed(1, rows, columns, 64, p, bf16), bf16
    yield layer_norm(rows, 768), bf16
    for columns in (64, 256, 512, 1024, 1280, 1600, 2048, 4096, 8192, 65536):
        yield add_layer_norm(rows, columns, p), bf16
    for batch in (1, 2):  # of one head: two passes; of two, where two multiprocessors count: one pass
        heads = partial(causal_attention, batch, rows, 1)
        yield heads(64, causal=False), bf16
        for head_dim in (64, 128):
            yield heads(head_dim), bf16
            yield heads(head_dim, p), bf16
            yield heads(head_dim, p, first_key=True), bf16
        for head_dim in (16, 32, 80):
            yield heads(head_dim, p), bf16
    for first_key in (False, True):
        yield causal_attention(1, rows, 1, 64, p, first_key), fp32
    for head_dim in (64, 128):
        yield attention(2, rows, rows, 1, head_dim, p, shared=True), bf16
        for shared in (False, True):
            yield attention(2, 1, rows, 1, head_dim, 0.0, True, shared, trained=False), bf16
    yield attention(2, 1, rows, 1, 64, 0.0, True, trained=False), fp32
