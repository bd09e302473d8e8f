"""dk and dv of one key tile: the loop over the query tiles that both backwards run."""

from ..._triton import tl, triton
from ...dropout_mask import keep_signs
from .masking import first_keys, query_range, visible
from .tile_io import add, as_operand, drop, load, load_stats


@triton.jit
def key_gradients(
    q, k, v, do, stats, dq_acc, first_key, key, bh, row, start_n, padded, threshold, scale, meta
):
    """Unscaled dk and dv of the key tile at start_n: two (BLOCK_N, BLOCK_D) in float32.

    q, k, v and do are heads; `row` is theirs in stats and dq_acc. Where dq_acc is not None, what these keys contribute to dq is added to it, unscaled too.
    S is transposed here, (BLOCK_N, BLOCK_M), so that P and dS multiply from registers.
    """
    q_len, k_len = q.length, k.length
    rows = tl.arange(0, meta.BLOCK_M)
    columns = tl.arange(0, meta.BLOCK_N)
    offs_n = start_n + columns
    k_tile = load(k, start_n, meta.BLOCK_N, True, meta)
    v_tile = load(v, start_n, meta.BLOCK_N, True, meta)
    tiles, low, some, every = query_range(start_n, q_len, k_len, first_key, q.batch, meta)
    dk = tl.zeros((meta.BLOCK_N, meta.BLOCK_D), tl.float32)
    dv = tl.zeros((meta.BLOCK_N, meta.BLOCK_D), tl.float32)
    for MASKED in tl.static_range(first_key is not None, 2):
        for index in tl.range(0, tiles - low - every if MASKED else every, num_stages=meta.STAGES):
            if MASKED:
                start_m = (low + index + tl.where(index < some, 0, every)) * meta.BLOCK_M
            else:
                start_m = (low + some + index) * meta.BLOCK_M
            offs_m = start_m + rows
            q_tile = load(q, start_m, meta.BLOCK_M, MASKED, meta)
            do_tile = load(do, start_m, meta.BLOCK_M, MASKED, meta)
            lse_i = load_stats(stats, 2 * row, start_m, padded, meta.BLOCK_M)
            qk = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            p = tl.exp2(qk * scale - lse_i[None, :])
            if MASKED:
                first = first_keys(first_key, offs_m, q.batch, q_len, k_len, IN_LOOP=True)
                p = tl.where(visible(offs_m, offs_n, first, q_len, k_len, meta.CAUSAL, True), p, 0.0)
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
            if dq_acc is None:
                delta = load_stats(stats, 2 * row + 1, start_m, padded, meta.BLOCK_M)
            dropped = p
            if key is not None:
                keep = keep_signs(
                    key, bh, start_m, rows[None, :], start_n, columns[:, None], threshold, meta.PTX
                )
                dropped = drop(p, keep, meta)
            dv = tl.dot(as_operand(dropped, do_tile.dtype, meta), do_tile, dv, input_precision="ieee")
            # this late it saves 16 registers; in two passes matmuls would be serialized
            if dq_acc is not None:
                delta = load_stats(stats, 2 * row + 1, start_m, padded, meta.BLOCK_M)
            # with dropout p · (keep · dp - delta), without a second mask
            ds = p * (dp - delta[None, :]) if key is None else dropped * dp - p * delta[None, :]
            ds = ds.to(q_tile.dtype)
            dk = tl.dot(ds, q_tile, dk, input_precision="ieee")
            if dq_acc is not None:
                dq = tl.dot(tl.trans(ds), k_tile, input_precision="ieee")
                add(dq_acc, row, start_m, padded, dq, meta.BLOCK_M, meta)
    return dk, dv
