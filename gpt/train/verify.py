"""Compare the operators of a run with plain PyTorch, on the device that trains, before the first step.

A GPU, a driver or a Triton that nobody has tried may compile a kernel wrongly or not at all. Every operator that the run
will launch is called forward and backward, at the run's widths, dtypes and dropout, on a few rows, and held to the rule of
`kernels/examples.py`. One that fails runs in plain PyTorch for this run, alone.

The verdicts are kept (`gpt/verdicts.py`), so a second run compares only what is new, and a kernel that once failed is not
launched again.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from ...kernels import _triton, examples, tiles
from ...kernels.backend import BackendError, choose, replace, replaced
from ...kernels.examples import Example, has_one_pass, parity
from ...kernels.ops.attention.operator import one_pass_tile
from ..config import RunConfig
from ..device import DTYPES
from ..output import warn
from ..verdicts import read_verdicts, write_verdicts
from .interruption import TrainingError

ROWS = 37 if _triton.INTERPRETED else 293  # of an example: several tiles, the last one ragged
REPORT = "https://github.com/fusedgpt/fusedgpt/issues"


def verify(config: RunConfig, device: torch.device, known: bool = False) -> None:
    """Replace the operators that are wrong on `device`, with a warning, until the `use_backend` block around this ends.

    Call it before a CUDA graph is captured: a graph keeps the kernels that it was captured with.

    Args:
        config: of the run, with vocabulary and dtype settled; nothing happens where its `verify` is "off".
        known: replace what an earlier run found wrong, and compare nothing.

    Raises:
        TrainingError: an operator is wrong and `verify` is "strict", or its kernel took the GPU's context with it.
        BackendError: "triton" was asked for and cannot run.
    """
    dtype, strict = DTYPES[config.train.dtype], config.train.verify == "strict"
    probe = torch.empty(0, dtype=dtype, device=device)
    if config.train.verify == "off" or choose("a training step", probe).backend == "torch":
        return
    verdicts, compared = read_verdicts(device), False
    for example in _examples(config, device):
        if example.operator in replaced():
            continue
        key = _key(example, dtype)
        if key not in verdicts and not known:
            try:
                verdicts[key], compared = _fault(example, device, dtype), True
            except torch.OutOfMemoryError:
                reject(
                    f"{example.operator} could not be compared: out of memory",
                    strict,
                    "This run uses it unseen",
                )
                continue
            if verdicts[key]:
                write_verdicts(device, verdicts)  # at once: the context may be lost
                _require_context(example, device)
        if fault := verdicts.get(key):
            reject(
                f"the kernel of {example.operator} is wrong here ({example.size}, {str(dtype)[6:]}): {fault}",
                strict,
            )
            replace(example.operator, f"its kernel was found wrong when this run began: {fault}")
    if compared:
        write_verdicts(device, verdicts)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def reject(what: str, strict: bool, instead: str = "This run uses plain PyTorch for it, alone") -> None:
    """Warn that something was found wrong, and what is used instead.

    Raises:
        TrainingError: `strict`.
    """
    report = f"Please report it with the output of `gpt doctor`: {REPORT}"
    if strict:
        raise TrainingError(f"{what}. --verify strict ends the run here; auto goes on without it. {report}")
    warn(f"{what}. {instead}. {report}")


def _examples(config: RunConfig, device: torch.device) -> Iterator[Example]:
    """The operators of the model's training step, evaluation and samples, on a few rows."""
    shape, settings = config.model, config.train
    width, bias, dtype = shape.n_embd, shape.bias, DTYPES[settings.dtype]
    pre = shape.norm == "pre"
    rows = (min(ROWS, shape.context_length) - 1) | 1  # odd
    heads, vocabulary = (shape.n_head, shape.head_dim), (shape.vocab_size, shape.padded_vocab_size)
    loss = (
        rows // 4 + 1,
        width,
        vocabulary[0],
        vocabulary[1] - vocabulary[0],
        True,
    )  # float64 holds all logits
    mlp = examples.gelu_mlp(
        rows,
        width,
        b_proj=None,
        **({} if bias else {"b_fc": None}),
        **({} if shape.gelu == "tanh" else {"approximate": "none"}),
    )

    wide = settings.float32_residual and pre and dtype != torch.float32
    residual, p = torch.float32 if wide else dtype, shape.resid_dropout
    yield examples.in_place(examples.embed(1, rows, width, vocabulary[1], shape.embd_dropout, residual))
    if pre:
        yield examples.layer_norm(rows, width, bias, wide)
        yield examples.add_layer_norm(rows, width, p, x_bias=bias, bias=bias, wide=wide)
    yield examples.add_layer_norm(rows, width, p, x_bias=bias, bias=bias, wide=wide, last=True)
    yield examples.in_place(examples.linear(rows, width, 3 * width, bias and shape.qkv_bias))
    yield examples.in_place(examples.linear(rows, width, width, bias=False))
    for one_pass in _passes(config, device):
        yield examples.causal_attention(1, rows, *heads, shape.attn_dropout, one_pass=one_pass)
    yield examples.in_place(mlp)
    yield examples.in_place(
        examples.linear_cross_entropy(*loss, label_smoothing=settings.label_smoothing, z_loss=settings.z_loss)
    )
    # no dropout, and the residual stream in `dtype`
    yield examples.evaluated(examples.embed(1, rows, width, vocabulary[1], out_dtype=dtype))
    if pre:
        yield examples.evaluated(examples.layer_norm(rows, width, bias))
    yield examples.evaluated(examples.add_layer_norm(rows, width, x_bias=bias, bias=bias))
    yield examples.evaluated(examples.causal_attention(1, rows, *heads))
    yield examples.evaluated(mlp)
    yield examples.evaluated(examples.linear_cross_entropy(*loss, reduction="sum"))
    if settings.sample_tokens:
        yield examples.attention(2, 1, rows, *heads, trained=False, cached=True)


def _passes(config: RunConfig, device: torch.device) -> list[bool]:
    """Which of attention's backwards the run takes, in one pass or not; both where the micro-batch is still to be found."""
    shape, dtype = config.model, DTYPES[config.train.dtype]
    if not has_one_pass(device, dtype, shape.head_dim):
        return [False]
    if config.train.micro_batch == "auto":
        return [False, True]
    row = tiles.attention_row(tiles.hardware(device).architecture, dtype == torch.float32, descriptors=True)
    heads = (config.train.sequences, shape.context_length, shape.n_head, shape.head_dim)
    return [one_pass_tile(row, heads, device) is not None]


def _fault(example: Example, device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with an example's operator; "" if nothing is."""
    # attention launches a program for each tile, and its number of heads decides between one pass and two
    few = nullcontext() if example.operator == "attention" else tiles.few_multiprocessors()
    try:
        with few:
            # the widest slack: float32 gradients out of 16-bit activations, and no right kernel is to be replaced
            found = parity(example, device, dtype, parameters=torch.float32, slack="log-sum-exp")
    except (BackendError, torch.OutOfMemoryError):
        raise
    # whatever a compiler, a driver or a launch may throw
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return "" if found.ok else f"relative error {found.error:.1e}, allowed {found.allowed:.1e}"


def _require_context(example: Example, device: torch.device) -> None:
    """Raise TrainingError where a kernel's failure, a bad address for example, has ended the GPU's context."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        raise TrainingError(
            f"the kernel of {example.operator} failed ({example.size}) and the GPU's context is lost. Start the run again: "
            f"it will run {example.operator} in plain PyTorch. Please report it with the output of `gpt doctor`: {REPORT}"
        ) from error


def _key(example: Example, dtype: torch.dtype) -> str:
    shapes = {**example.activations, **example.parameters, **example.integers}
    named = ", ".join(f"{name} {list(getattr(shape, 'shape', shape))}" for name, shape in shapes.items())
    return f"{example.operator} {example.size}, {str(dtype)[6:]}; {named}"
