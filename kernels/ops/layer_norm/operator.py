"""LayerNorm, alone and with the residual addition and dropout before it (Ba, Kiros and Hinton, 2016).

    forward   h = residual + dropout(x + x_bias)          (layer_norm alone: h = x)
              μ = mean(h),  r = 1 / √(mean((h − μ)²) + eps)
              y = (h − μ) r · weight + bias
    backward  x̂ = (h − μ) r,  wdy = weight · dy,  c1 = mean(x̂ wdy),  c2 = mean(wdy)
              dh = r (wdy − c2 − x̂ c1) + dresidual_out
              dresidual = dh,  dx = dropout'(dh),  dx_bias = Σ rows of dx
              dweight = Σ rows of dy x̂,  dbias = Σ rows of dy

Statistics are float32, over the last dimension, with the biased variance. Saved: h (which is residual_out), the weight,
and μ and r, one float32 each per row.

Bytes moved for M rows of C elements of s bytes, beside 8 M of statistics and the parameters:

    layer_norm       forward 2 M C s: x in, y out            backward 3 M C s: dy and h in, dx out
    add_layer_norm   forward 4 M C s: x and residual in,     backward 4 M C s: dy, dresidual_out and h in, dh out;
                     residual_out and y out                  5 with dropout or a residual of another dtype: dx out

A row that fits in a program's registers is read once. Wider rows are processed in blocks and read twice (the second
time from the cache), and once more for the parameters' gradients. These are summed without atomics: every program
accumulates its rows in float32 and writes one partial row, and PyTorch adds those up in a fixed order.
"""

from typing import Any

import torch
from torch import Tensor

from ... import checks, reference
from ..._triton import on_device_of, triton
from ...backend import autocast, choose, register
from ...dropout_mask import int32_bits, keep_scale, threshold_bits
from ...tiles import LAYER_NORM_BACKWARD, LAYER_NORM_FORWARD, Tile, hardware, select
from .backward import Gradients, Incoming, Wanted, backward_kernel, wide_backward_kernel, wide_sums_kernel
from .forward import Inputs, Outputs, forward_kernel, wide_forward_kernel


def _launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    x_bias: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    stream: int,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    columns = x.shape[-1]
    rows = x.numel() // columns
    x, weight = x.contiguous(), weight.contiguous()
    residual, bias, x_bias = (t if t is None else t.contiguous() for t in (residual, bias, x_bias))
    y = torch.empty_like(x, dtype=out_dtype)
    residual_out = None if residual is None else torch.empty_like(residual)
    stats = x.new_empty((2, rows), dtype=torch.float32)
    if rows == 0:
        return y, residual_out, stats
    where = hardware(x.device)
    tile = select(LAYER_NORM_FORWARD, where.architecture, columns)
    kernel = forward_kernel if tile.block >= columns else wide_forward_kernel
    programs = _programs(tile, rows, where.multiprocessors)
    inp, out = Inputs(x, x_bias, residual, weight, bias), Outputs(y, residual_out, stats)
    mask = (seed, int32_bits(stream), threshold_bits(p), keep_scale(p))
    with on_device_of(x):
        kernel[(programs,)](inp, out, *mask, eps, rows, C=columns, tile=tile, num_warps=tile.warps)
    return y, residual_out, stats


def _programs(tile: Tile, rows: int, multiprocessors: int) -> int:
    tiles = triton.cdiv(rows, tile.rows)
    return min(tiles, tile.programs * multiprocessors) if tile.programs else tiles


def _launch_backward(
    dy: Tensor | None,
    dresidual_out: Tensor | None,
    h: Tensor,
    weight: Tensor,
    stats: Tensor,
    p: float,
    seed: Tensor | None,
    stream: int,
    x_dtype: torch.dtype,
    dweight: bool,
    dbias: bool,
    dx_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dh, dx (empty when identical to dh) and the sums (dweight + dbias + dx_bias, C) float32."""
    columns = h.shape[-1]
    rows = h.numel() // columns
    dy, dresidual_out = (t if t is None else t.contiguous() for t in (dy, dresidual_out))
    h, weight = h.contiguous(), weight.contiguous()
    dh = torch.empty_like(h)
    dx = torch.empty_like(h, dtype=x_dtype) if p > 0.0 or x_dtype != h.dtype else None
    wanted = Wanted(dweight, dbias, dx_bias)
    where = hardware(h.device)
    tile = select(LAYER_NORM_BACKWARD, where.architecture, columns)
    whole = tile.block >= columns
    programs = _programs(tile, rows, where.multiprocessors)
    blocks = triton.cdiv(columns, tile.block)
    splits = programs if whole else min(triton.cdiv(4 * where.multiprocessors, blocks), programs)
    partial = h.new_empty((splits, sum(wanted), columns), dtype=torch.float32)
    inp, out = Incoming(dy, dresidual_out, h, weight, stats), Gradients(dh, dx, partial)
    mask = (seed, int32_bits(stream), threshold_bits(p), keep_scale(p))
    sizes = {"C": columns, "tile": tile, "num_warps": tile.warps}
    with on_device_of(h):
        if rows and whole:
            backward_kernel[(programs,)](inp, out, *mask, rows, wanted=wanted, **sizes)
        elif rows:
            wide_backward_kernel[(programs,)](inp, out._replace(sums=None), *mask, rows, **sizes)
            if any(wanted):
                wide_sums_kernel[(blocks, splits)](inp, out, rows, wanted=wanted, **sizes)
    return dh, h.new_empty(0, dtype=x_dtype) if dx is None else dx, partial.sum(0)


def _fake_backward(
    dy, dresidual_out, h, weight, stats, p, seed, stream, x_dtype, dweight, dbias, dx_bias
) -> tuple[Tensor, Tensor, Tensor]:
    separate = p > 0.0 or x_dtype != h.dtype
    return (
        h.new_empty(h.shape),
        h.new_empty(h.shape if separate else 0, dtype=x_dtype),
        h.new_empty((dweight + dbias + dx_bias, h.shape[-1]), dtype=torch.float32),
    )


_backward = register(
    "layer_norm_backward(Tensor? dy, Tensor? dresidual_out, Tensor h, Tensor weight, Tensor stats, float p, "
    "Tensor? seed, int stream, ScalarType x_dtype, bool dweight, bool dbias, bool dx_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


def _save_layer_norm(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, *_ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, output[1])


def _layer_norm_backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    x, weight, stats = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1:3]
    dx, _, sums = _backward(dy, None, x, weight, stats, 0.0, None, 0, x.dtype, *wanted, False)
    return dx, *_split(sums, wanted, (weight.dtype, ctx.bias_dtype)), None, None


def _split(sums: Tensor, wanted: tuple[bool, ...], dtypes: tuple) -> list[Tensor | None]:
    """The parameters' gradients from the sums, each in its parameter's dtype, None where not wanted."""
    each = iter(sums)
    return [next(each).to(dtype) if want else None for want, dtype in zip(wanted, dtypes, strict=True)]


_layer_norm = register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType out_dtype) -> (Tensor, Tensor)",
    lambda x, weight, bias, eps, out_dtype: _launch_forward(
        x, None, weight, bias, None, eps, 0.0, None, 0, out_dtype
    )[::2],
    lambda x, weight, bias, eps, out_dtype: (x.new_empty(x.shape, dtype=out_dtype), _fake_stats(x)),
    _save_layer_norm,
    _layer_norm_backward,
)


def _fake_stats(x: Tensor) -> Tensor:
    return x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)


def _save_add_layer_norm(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, bias, x_bias, _, ctx.p, seed, ctx.stream = inputs
    ctx.dtypes = [x.dtype, *(None if t is None else t.dtype for t in (weight, bias, x_bias))]
    _, residual_out, stats = output
    ctx.save_for_backward(residual_out, weight, stats, seed)


def _add_layer_norm_backward(
    ctx: Any, dy: Tensor | None, dresidual_out: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    if dy is None and dresidual_out is None:
        return (None,) * 9
    h, weight, stats, seed = ctx.saved_tensors
    wanted = ctx.needs_input_grad[2:5]
    dh, dx, sums = _backward(
        dy, dresidual_out, h, weight, stats, ctx.p, seed, ctx.stream, ctx.dtypes[0], *wanted
    )
    # An operator may not return one tensor twice, but an autograd formula may: without dropout both gradients are dh.
    dx = dx if ctx.p > 0.0 or ctx.dtypes[0] != h.dtype else dh
    return dx, dh, *_split(sums, wanted, ctx.dtypes[1:]), None, None, None, None


_add_layer_norm = register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor? x_bias, float eps, float p, "
    "Tensor? seed, int stream) -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    lambda x, residual, *_: (x.new_empty(x.shape), residual.new_empty(residual.shape), _fake_stats(x)),
    _save_add_layer_norm,
    _add_layer_norm_backward,
)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Apply LayerNorm over the last dimension (Ba, Kiros and Hinton, 2016).

    Args:
        x: (..., C).
        weight: (C,).
        bias: (C,), optional.
        eps: added to the variance.
        out_dtype: dtype of the result; by default x's, or autocast's where autocast is enabled.

    Returns:
        (..., C) in out_dtype.

    Raises:
        TypeError, ValueError: unsupported dtype, shape or device of an argument.
    """
    checks.floating("layer_norm", x=x, weight=weight, bias=bias)
    checks.out_dtype("layer_norm", out_dtype)
    checks.numbers("layer_norm", float, eps=eps)
    _check_width("layer_norm", x, weight=weight, bias=bias)
    out_dtype = out_dtype or autocast(x.new_empty(0)).dtype
    if choose("layer_norm", x, weight, bias).backend == "triton":
        return _layer_norm(x, weight, bias, eps, out_dtype)[0]
    return reference.layer_norm(x, weight, bias, eps, out_dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a sub-layer's output to the residual stream, with dropout, and apply LayerNorm to the sum.

    Args:
        x: (..., C), the sub-layer's output.
        residual: (..., C), the residual stream; may be float32 with x of lower precision.
        weight: (C,), of the LayerNorm.
        bias: (C,), of the LayerNorm, optional.
        eps: added to the variance.
        dropout_p: probability of dropping an element of x + x_bias, in [0, 1].
        seed: int64, one element, on x's device; required if dropout_p > 0.
        stream: an integer that tells this dropout from others under the same seed.
        x_bias: (C,), optional: the bias of the projection that computed x.

    Returns:
        y: (..., C), the normalised stream in x's dtype (under autocast in autocast's).
        residual_out: (..., C), the new residual stream in the residual's dtype.

    Raises:
        TypeError, ValueError: unsupported dtype, shape, device or probability.
    """
    checks.floating("add_layer_norm", x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
    checks.shape("add_layer_norm", "residual", residual, *x.shape)
    _check_width("add_layer_norm", x, weight=weight, bias=bias, x_bias=x_bias)
    checks.numbers("add_layer_norm", float, eps=eps)
    checks.dropout("add_layer_norm", dropout_p, seed, x, stream)
    x = autocast(x)
    if choose("add_layer_norm", x, residual, weight, bias, x_bias).backend == "triton":
        seed = seed if dropout_p > 0.0 else None
        return _add_layer_norm(x, residual, weight, bias, x_bias, eps, dropout_p, seed, stream)[:2]
    return reference.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, stream, x_bias)


def _check_width(operator: str, x: Tensor, **parameters: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{operator}: x has shape {tuple(x.shape)}; it takes (..., C) with C of at least 1")
    for name, parameter in parameters.items():
        checks.shape(operator, name, parameter, x.shape[-1])
