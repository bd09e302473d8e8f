"""The feed-forward sub-layer: two projections with GELU between (Hendrycks and Gimpel, 2016).

    forward   pre = x W_fcᵀ,  a = GELU(pre + b_fc),  y = a W_projᵀ + b_proj
    backward  da = dy W_proj,  dpre = da · GELU'(pre + b_fc),  dx = dpre W_fc
              dW_proj = dyᵀ a,  db_proj = Σ rows of dy,  dW_fc = dpreᵀ x,  db_fc = Σ rows of dpre

GELU is 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), GPT-2's, or x Φ(x). Saved: x, the weights in x's dtype, and pre
unless it is recomputed; a is recomputed. dW_fc and dW_proj are rounded once, from the float32 accumulator to the weight's
dtype, or added to its `.grad` by their matmul (`matmul.gradients_in_place`). pre does not include its bias: the kernels add it in float32 from a register, where a matmul would first
round it to the activations' dtype.

For M rows of C, F = 4 C and s bytes an element: 6 matmuls, 12 M C F FLOPs (7 and 14 with recompute). Elementwise work
in addition moves

    library matmuls   forward 2 M F s: pre in, a out       backward 4 M F s: pre and da in, dpre and a out
    fused matmuls     forward none, as a is stored in      backward 2 M F s: pre in, a out, as dpre is stored in place
                      place of pre; M F s to save pre                of da

The first form runs the two passes of `gelu.py`, with dpre over da; the second does the same in the epilogue of the
matmuls of `fused_matmul.py`. Which is faster depends on the GPU and on C: see the rows of `tiles.py`. The gradients of
the weights and the other matmuls are the library's in both. db_fc is summed from partial sums that every program writes
once, in a fixed order; db_proj reads dy once more (`column_sum.py`), which add_layer_norm's `x_bias` saves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks, reference
from ..._triton import TensorDescriptor, on_device_of, triton
from ...backend import autocast, choose, register, without_autocast
from ...matmul import by_column, leaf, own_gradient, weight_gradient
from ...tiles import (
    GELU_BACKWARD,
    GELU_FORWARD,
    MLP_DOWN_GRADIENT,
    MLP_UP,
    MatmulTile,
    Tile,
    hardware,
    matmul_tile,
    select,
)
from ..column_sum import column_sum
from .fused_matmul import down_gradient_kernel, up_kernel
from .gelu import gelu_backward_kernel, gelu_kernel

_ALIGNED = 16  # bytes: alignment of a descriptor's address and of the distance between its rows


def _launch(
    x: Tensor,
    w_fc: Tensor,
    up: Tensor,
    b_fc: Tensor | None,
    w_proj: Tensor,
    down: Tensor,
    b_proj: Tensor | None,
    exact: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and the pre-activation without its bias (empty unless `keep`)."""
    bias = None if b_fc is None else b_fc.contiguous()
    pre, a = _up(x.reshape(-1, x.shape[-1]), up, bias, exact, keep)
    y = a @ down.T if b_proj is None else torch.addmm(b_proj.to(x.dtype), a, down.T)
    return y.view(*x.shape[:-1], down.shape[0]), x.new_empty(0) if pre is None else pre


def _up(x: Tensor, w: Tensor, bias: Tensor | None, exact: bool, keep: bool) -> tuple[Tensor | None, Tensor]:
    """x wᵀ, or None unless `keep`, and GELU(x wᵀ + bias)."""
    tile = _fused_tile(MLP_UP, x, w.shape[0])
    if tile is None:
        pre = x @ w.T
        a = torch.empty_like(pre) if keep else pre
        _launch_pass(gelu_kernel, GELU_FORWARD, pre, bias, (a,), exact)
        return (pre if keep else None), a
    rows, hidden = x.shape[0], w.shape[0]
    a = x.new_empty((rows, hidden))
    kept = torch.empty_like(a) if keep else None
    piece = (tile.rows, tile.block // tile.split)
    _launch_matmul(
        up_kernel,
        tile,
        (_described(x, (tile.rows, tile.depth)), _described(w, (tile.block, tile.depth))),
        (bias, _described(kept, piece), _described(a, piece)),
        x,
        hidden,
        exact,
    )
    return kept, a


def _down_gradient(
    dy: Tensor, w: Tensor, pre: Tensor, bias: Tensor | None, a: Tensor | None, exact: bool, summed: bool
) -> tuple[Tensor, Tensor | None]:
    """dpre = (dy w) · GELU'(pre + bias) and, if `summed`, partial sums of its rows. Writes GELU(pre + bias) to a."""
    tile = _fused_tile(MLP_DOWN_GRADIENT, dy, w.shape[1])
    if tile is None:
        da = dy @ w
        sums = _launch_pass(gelu_backward_kernel, GELU_BACKWARD, pre, bias, (da, a, da), exact, summed)
        return da, sums
    rows, hidden = pre.shape
    dpre = torch.empty_like(pre)
    sums = dy.new_empty((triton.cdiv(rows, tile.rows), hidden), dtype=torch.float32) if summed else None
    piece = (tile.rows, tile.block // tile.split)
    _launch_matmul(
        down_gradient_kernel,
        tile,
        (_described(dy, (tile.rows, tile.depth)), _described(w, (tile.depth, tile.block))),
        (_described(pre, piece), bias, _described(a, piece), _described(dpre, piece), sums),
        dy,
        hidden,
        exact,
    )
    return dpre, sums


def _launch_pass(
    kernel: Any,
    table: dict[str, tuple[Tile, ...]],
    pre: Tensor,
    bias: Tensor | None,
    others: tuple[Tensor | None, ...],
    exact: bool,
    summed: bool = False,
) -> Tensor | None:
    """Run an elementwise kernel over all of pre. Returns the partial sums of gelu_backward_kernel, if `summed`."""
    rows, hidden = pre.shape
    where = hardware(pre.device)
    tile = select(table, where.architecture, hidden)
    blocks = triton.cdiv(hidden, tile.block)
    splits = min(triton.cdiv(tile.programs * where.multiprocessors, blocks), triton.cdiv(rows, tile.rows))
    sums = pre.new_empty((splits, hidden), dtype=torch.float32) if summed else None
    last = (sums,) if kernel is gelu_backward_kernel else ()
    if rows:
        with on_device_of(pre):
            kernel[(blocks, splits)](
                pre, bias, *others, *last, rows, F=hidden, EXACT=exact, tile=tile, num_warps=tile.warps
            )
    return sums


def _fused_tile(table: dict[str, tuple[MatmulTile, ...]], x: Tensor, hidden: int) -> MatmulTile | None:
    """The fused matmul's tile for x (M, C) times (C, hidden), or None for the library's matmul.

    Descriptors require rows of a multiple of 16 bytes. With fewer tiles than multiprocessors, the library's smaller
    tiles finish sooner.
    """
    rows, columns = x.shape
    where = hardware(x.device)
    tile = matmul_tile(table, where.architecture, columns, x.dtype == torch.float32)
    if tile is None or columns * x.itemsize % _ALIGNED or hidden * x.itemsize % _ALIGNED:
        return None
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(hidden, tile.block)
    return tile if tiles >= where.multiprocessors else None


def _described(x: Tensor | None, block: tuple[int, int]) -> Any:
    """A descriptor of x (rows, columns) for blocks of that shape; of a copy if x's layout does not allow one."""
    if x is None:
        return None
    rows_apart = x.stride(0) >= x.shape[1] and x.stride(0) * x.itemsize % _ALIGNED == 0
    if x.stride(1) != 1 or not rows_apart or x.data_ptr() % _ALIGNED:
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def _launch_matmul(
    kernel: Any,
    tile: MatmulTile,
    operands: tuple[Any, Any],
    rest: tuple[Any, ...],
    x: Tensor,
    hidden: int,
    exact: bool,
) -> None:
    rows, columns = x.shape
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(hidden, tile.block)
    programs = min(tiles, tile.programs * hardware(x.device).multiprocessors)
    with on_device_of(x):
        kernel[(programs,)](
            *operands, *rest, rows, C=columns, F=hidden, EXACT=exact, tile=tile, num_warps=tile.warps
        )


def _launch_backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor | None,
    up: Tensor,
    b_fc: Tensor | None,
    down: Tensor,
    b_proj: Tensor | None,
    exact: bool,
    wanted: Sequence[bool],
    fc_dtype: torch.dtype,
    proj_dtype: torch.dtype,
    fc_total: Tensor | None = None,
    proj_total: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of x, w_fc, b_fc, w_proj and b_proj, empty where not wanted or added to a total. pre is recomputed
    if None."""
    if not x.numel():
        none = _fake_backward(
            dy, x, pre, up, b_fc, down, b_proj, exact, wanted, fc_dtype, proj_dtype, fc_total, proj_total
        )
        return tuple(gradient.zero_() for gradient in none)
    want_x, want_w_fc, want_b_fc, want_w_proj, want_b_proj = wanted
    dx, dw_fc, db_fc, dw_proj, db_proj = (x.new_empty(0) for _ in wanted)
    shape, x, dy = x.shape, x.reshape(-1, x.shape[-1]), dy.reshape(-1, down.shape[0]).contiguous()
    if want_b_proj and b_proj is not None:
        db_proj = column_sum(dy).to(b_proj.dtype)
    inner = want_x or want_w_fc or want_b_fc
    if not inner and not want_w_proj:
        return dx, dw_fc, db_fc, dw_proj, db_proj
    bias = None if b_fc is None else b_fc.contiguous()
    before = x @ up.T if pre is None else pre
    a = None
    if want_w_proj:
        a = before if pre is None else torch.empty_like(before)
    if inner:
        dpre, sums = _down_gradient(dy, down, before, bias, a, exact, want_b_fc)
        if sums is not None and b_fc is not None:
            db_fc = sums.sum(0).to(b_fc.dtype)
        if want_x:
            dx = (dpre @ up).view(shape)
        if want_w_fc:
            dw_fc = weight_gradient(dpre, x, fc_dtype, by_column(up), fc_total)
    else:
        _launch_pass(gelu_kernel, GELU_FORWARD, before, bias, (a,), exact)
    if a is not None:
        dw_proj = weight_gradient(dy, a, proj_dtype, by_column(down), proj_total)
    return dx, dw_fc, db_fc, dw_proj, db_proj


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor | None,
    up: Tensor,
    b_fc: Tensor | None,
    down: Tensor,
    b_proj: Tensor | None,
    exact: bool,
    wanted: Sequence[bool],
    fc_dtype: torch.dtype,
    proj_dtype: torch.dtype,
    fc_total: Tensor | None = None,
    proj_total: Tensor | None = None,
) -> tuple[Tensor, ...]:
    def weight(w: Tensor, dtype: torch.dtype, total: Tensor | None) -> Tensor:
        if total is not None:
            return w.new_empty(0, dtype=dtype)
        made = w.new_empty(w.shape[::-1] if by_column(w) else w.shape, dtype=dtype)
        return made.T if by_column(w) else made

    db_fc, db_proj = (x if b is None else b.new_empty(b.shape) for b in (b_fc, b_proj))
    dw_fc, dw_proj = weight(up, fc_dtype, fc_total), weight(down, proj_dtype, proj_total)
    gradients = (x.new_empty(x.shape), dw_fc, db_fc, dw_proj, db_proj)
    return tuple(t if want else x.new_empty(0) for t, want in zip(gradients, wanted, strict=True))


_backward = register(
    "gelu_mlp_backward(Tensor dy, Tensor x, Tensor? pre, Tensor up, Tensor? b_fc, Tensor down, Tensor? b_proj, "
    "bool exact, bool[] wanted, ScalarType fc_dtype, ScalarType proj_dtype, Tensor(a!)? fc_total=None, "
    "Tensor(b!)? proj_total=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, w_fc, up, b_fc, w_proj, down, b_proj, ctx.exact, keep = inputs
    ctx.dtypes, ctx.leaves = (w_fc.dtype, w_proj.dtype), (leaf(w_fc), leaf(w_proj))
    ctx.save_for_backward(x, output[1] if keep else None, up, b_fc, down, b_proj)


def _gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4, 6)]
    totals = [own_gradient(w) if wanted[i] else None for i, w in zip((1, 3), ctx.leaves, strict=True)]
    # A backward inside the autocast region would otherwise round the weights' gradients to its dtype.
    with without_autocast(dy):
        gradients = _backward(dy, *ctx.saved_tensors, ctx.exact, wanted, *ctx.dtypes, *totals)
    dx, dw_fc, db_fc, dw_proj, db_proj = (
        g if want else None for g, want in zip(gradients, wanted, strict=True)
    )
    dw_fc, dw_proj = (g if total is None else None for g, total in zip((dw_fc, dw_proj), totals, strict=True))
    return dx, dw_fc, None, db_fc, dw_proj, None, db_proj, None, None


# up, down: the weights in x's dtype, without gradient; w_fc and w_proj are only read for their dtype.
_gelu_mlp = register(
    "gelu_mlp(Tensor x, Tensor w_fc, Tensor up, Tensor? b_fc, Tensor w_proj, Tensor down, Tensor? b_proj, bool exact, "
    "bool keep) -> (Tensor, Tensor)",
    _launch,
    lambda x, w_fc, up, b_fc, w_proj, down, b_proj, exact, keep: (
        x.new_empty((*x.shape[:-1], w_proj.shape[0])),
        x.new_empty((x.numel() // x.shape[-1], w_fc.shape[0]) if keep else 0),
    ),
    _save,
    _gradients,
)


def gelu_mlp(
    x: Tensor,
    w_fc: Tensor,
    b_fc: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    approximate: str = "tanh",
    recompute: bool = False,
) -> Tensor:
    """Apply GPT-2's feed-forward sub-layer, GELU(x @ w_fc.T + b_fc) @ w_proj.T + b_proj.

    Args:
        x: (..., C) activations.
        w_fc: (F, C), any strides; F = 4C in GPT-2.
        b_fc: (F,), optional.
        w_proj: (C, F), any strides.
        b_proj: (C,), optional.
        approximate: "tanh" (GPT-2's) or "none" (the exact GELU).
        recompute: save only x and recompute the pre-activation in the backward.

    Returns:
        (..., C) in x's dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: unsupported dtype, shape or device of an argument; unknown `approximate`.
    """
    checks.floating("gelu_mlp", x=x, w_fc=w_fc, b_fc=b_fc, w_proj=w_proj, b_proj=b_proj)
    checks.one_of("gelu_mlp", "approximate", approximate, "tanh", "none")
    checks.numbers("gelu_mlp", int, recompute=recompute)
    if w_fc.dim() != 2 or x.shape[-1:] != w_fc.shape[1:]:
        raise ValueError(
            f"gelu_mlp: w_fc {tuple(w_fc.shape)} does not fit x {tuple(x.shape)}; it takes (F, C)"
        )
    checks.shape("gelu_mlp", "b_fc", b_fc, w_fc.shape[0])
    if w_proj.dim() != 2 or w_proj.shape[1] != w_fc.shape[0]:
        raise ValueError(
            f"gelu_mlp: w_proj {tuple(w_proj.shape)} does not fit w_fc {tuple(w_fc.shape)}; it takes (C, F)"
        )
    checks.shape("gelu_mlp", "b_proj", b_proj, w_proj.shape[0])
    x = autocast(x)
    given = (w_fc, b_fc, w_proj, b_proj)
    empty = "a weight has no element" if 0 in (*w_fc.shape, *w_proj.shape) else None
    if choose("gelu_mlp", x, *given, obstacle=empty).backend == "triton":
        trained = any(t is not None and t.requires_grad for t in (x, *given))
        keep = trained and torch.is_grad_enabled() and not recompute
        up, down = (w.detach().to(x.dtype) for w in (w_fc, w_proj))
        return _gelu_mlp(x, w_fc, up, b_fc, w_proj, down, b_proj, approximate == "none", keep)[0]
    return reference.gelu_mlp(x, w_fc, b_fc, w_proj, b_proj, approximate, recompute)
