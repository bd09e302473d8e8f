"""Every check of the package's compiled operators in the emulator, as one table, and how one of them is done.

A check computes the same thing three times: in the emulator, in plain PyTorch in the same dtype, and in plain PyTorch in
float64. Right is what the rule of `kernels/examples.py` allows, computed by the kernels that the check names, without a
finding. Memory that `torch.empty` returns holds NaN, so that an element nobody writes is seen.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from itertools import repeat
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ... import kernels
from ...gpt.config import DROPOUTS, ModelConfig, TrainConfig
from ...gpt.model import GPT
from ...gpt.optim import build_optimizers
from ...gpt.train.step import TrainStep
from ...kernels import examples, tiles, use_backend
from ...kernels.examples import Example, Parity
from ..tiles import candidates
from . import Emulation
from .package import emulated

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALVES, EVERY = (BF16, FP16), (BF16, FP16, FP32)
MODES: dict[str, dict[str, str]] = {
    "early": {"timing": "early"},
    "late": {"timing": "late"},
    "random": {"timing": "late", "order": "random"},
}
AMPERE, HOPPER = "sm_80", "sm_90"
SEED = torch.tensor([1234567890123])
TOO_MANY = 16  # multiprocessors, which so few heads do not fill: attention's backward takes two passes


class Check(NamedTuple):
    """One thing to compute, and what has to have computed it."""

    operator: str
    name: str
    compute: Callable[[torch.dtype, torch.dtype], list[Tensor]]  # of the computation; of the inputs' values
    kernels: tuple[str, ...]  # all of them have to run
    dtypes: tuple[torch.dtype, ...]
    tested: bool  # in `make test`, there in bfloat16 and float16
    architectures: tuple[str, ...] = (AMPERE, HOPPER)
    multiprocessors: int = 2
    own_matmul: int | None = None  # which of the sweep's tiles gelu_mlp's matmuls take; None: the library's
    descriptors: bool | None = None  # whether sm_90 has to read by tensor descriptor


class Outcome(NamedTuple):
    check: str
    operator: str
    architecture: str
    mode: str
    dtype: str
    parity: Parity | None
    findings: dict[str, int]  # text: how often
    error: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.parity is not None and self.parity.ok and not self.findings and not self.error

    def __str__(self) -> str:
        what = f"{self.check}, {self.dtype}, {self.architecture} {self.mode}"
        if self.ok and self.parity is not None:
            return f"{what}: {self.parity.error:.1e} of {self.parity.allowed:.1e}, {self.seconds:.1f} s"
        wrong = [self.error] if self.error else []
        if self.parity is not None and not self.parity.ok:
            wrong.append(f"error {self.parity.error:.1e}, allowed {self.parity.allowed:.1e}")
        wrong += [f"{count} x {text}" for text, count in [*self.findings.items()][:5]]
        wrong += [f"and {len(self.findings) - 5} more findings"] if len(self.findings) > 5 else []
        return "\n    ".join([f"{what}: WRONG", *wrong])


# ---- one check


def run(name: str, architecture: str, dtype: torch.dtype, mode: str, seed: int = 0) -> Outcome:
    """Do one check. seed: of the order in mode "random"."""
    check, start = checks()[name], time.perf_counter()
    parity, findings, error = None, {}, ""
    try:
        ours, emulation = computed(check, architecture, dtype, seed=seed, **MODES[mode])
        parity, findings = judged(check, dtype, ours), emulation.findings
        error = wrong_path(check, architecture, emulation)
    except Exception as failure:  # whatever a compiler or a launch throws; the other checks still run
        error = f"{type(failure).__name__}: {failure}"
    seconds = time.perf_counter() - start
    return Outcome(name, check.operator, architecture, mode, str(dtype)[6:], parity, findings, error, seconds)


def computed(
    check: Check, architecture: str, dtype: torch.dtype, **options: Any
) -> tuple[list[Tensor], Emulation]:
    """What the emulator computes, and the emulation. options: of `emulate`."""
    with ExitStack() as stack:
        if check.own_matmul is not None:
            stack.enter_context(_own_matmul(architecture, check.own_matmul))
        emulation = stack.enter_context(emulated(architecture, check.multiprocessors, **options))
        stack.enter_context(_nan_in_empty_memory())
        ours = check.compute(dtype, dtype)
    return ours, emulation


def judged(check: Check, dtype: torch.dtype, ours: list[Tensor]) -> Parity:
    """The worst of the outputs and gradients."""
    torchs, exact = _expected(check.name, dtype)
    return examples.worst(map(examples.compare, ours, torchs, exact))


def wrong_path(check: Check, architecture: str, emulation: Emulation) -> str:
    """What did not run as the check wants it; "" where all did."""
    ran = {name for name, *_ in emulation.launches}
    if missing := [name for name in check.kernels if name not in ran]:
        return f"{', '.join(missing)} did not run, but {', '.join(sorted(ran)) or 'nothing'}"
    if check.descriptors is None or architecture != HOPPER:
        return ""
    read = any("cp.async.bulk.tensor" in ptx for name, ptx in emulation.covered if name == check.kernels[0])
    return "" if read == check.descriptors else f"{check.kernels[0]} reads by the wrong kind of address"


@cache
def _expected(name: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    with use_backend("torch"):
        return tuple(checks()[name].compute(wanted, dtype) for wanted in (dtype, torch.float64))  # type: ignore[return-value]


@contextmanager
def _nan_in_empty_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _own_matmul(architecture: str, index: int) -> Iterator[None]:
    """Let gelu_mlp's matmuls take one of the tiles that the sweep tries."""
    up = {architecture: (candidates.MLP_UP_TILES[architecture][index],)}
    down = {architecture: (candidates.MLP_DOWN_GRADIENT_TILES[architecture][index],)}
    with mock.patch.dict(tiles.MLP_UP, up), mock.patch.dict(tiles.MLP_DOWN_GRADIENT, down):
        yield


# ---- what is computed


def _example(example: Example, computed: torch.dtype, values: torch.dtype) -> list[Tensor]:
    return examples.results(example, examples.draw(example, "cpu", computed, values=values), values)


def _dropout_mask(rows: int, columns: int, computed: torch.dtype, _: torch.dtype) -> list[Tensor]:
    """The mask that `dropout` draws, 0 or 1."""
    return [(kernels.dropout(torch.ones(rows, columns, dtype=computed), 0.3, SEED, 4) != 0).to(computed)]


def _attention_mask(
    length: int, n_head: int, head_dim: int, computed: torch.dtype, _: torch.dtype
) -> list[Tensor]:
    """The mask that attention's forward draws, 0 or 1: one-hot values give the weights of head_dim keys at a time."""
    q = torch.zeros(1, length, n_head, head_dim, dtype=computed)
    masks = []
    for start in range(0, length, head_dim):
        width = min(head_dim, length - start)
        v = torch.zeros_like(q)
        v[0, start : start + width, :, :width] = torch.eye(width, dtype=computed)[:, None]
        masks.append(kernels.attention(q, q.clone(), v, 0.3, SEED, 3, causal=False)[..., :width] != 0)
    return [torch.cat(masks, -1).to(computed)]


def _training_steps(computed: torch.dtype, _: torch.dtype) -> list[Tensor]:
    """Loss, norm and moments of the gradients after two steps of a GPT with two layers.

    In place of float64 it takes float32, as weights and gradients are in float32. The moments follow from the gradients
    of both steps, the second on updated weights. The weights themselves tell less: at first AdamW moves each by the
    learning rate, in the direction of the sign of what may be rounding. Roundings cancel in loss and norm, by luck more
    in one implementation than in the other: they are compared in the activations' dtype.
    """
    dtype: Any = str(torch.float32 if computed == torch.float64 else computed)[6:]
    rates: dict[str, Any] = dict.fromkeys(DROPOUTS, 0.1)
    shape = ModelConfig(300, 96, n_layer=2, n_head=2, n_embd=128, **rates)
    settings = TrainConfig(dtype=dtype, warmup_steps=0, lr=1e-4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, ids = GPT(shape), torch.randint(300, (2, 97))
    optimizers = build_optimizers(model, settings)
    step = TrainStep(model, optimizers, repeat((ids[:, :-1], ids[:, 1:])), settings)
    metrics = [metric.to(computed) for _ in range(2) for metric in step()]
    return [*metrics, *(state["exp_avg"] for state in optimizers.state().values())]


def _odd_strides(length: int, head_dim: int) -> Example:
    """q, k and v whose rows no descriptor can hold."""

    def call(x: Tensor, seed: Tensor) -> Tensor:
        q, k, v = (x[:, :, i : i + 1, :head_dim] for i in range(3))
        return kernels.attention(q, k, v, 0.1, seed, 3)

    integers = {"seed": examples.Integers((1,), 2**62)}
    size = f"odd strides, {length} x {head_dim}, p = 0.1"
    return Example("attention", size, call, {"x": (1, length, 3, head_dim + 3)}, {}, integers)


# ---- the table


def check_of(
    example: Example,
    *kernels: str,
    dtypes: tuple[torch.dtype, ...] = HALVES,
    tested: bool = True,
    label: str = "",
    **options: Any,
) -> Check:
    """A check of an example. label: what its size does not say. options: fields of `Check`."""
    name = f"{example.operator} {example.size}{', ' * bool(label)}{label}"
    return Check(example.operator, name, partial(_example, example), kernels, dtypes, tested, **options)


@cache
def checks() -> dict[str, Check]:
    """The table by name."""
    every = [
        *_rows(),
        *_attention(),
        *_decoding(),
        *_mlp(),
        *_cross_entropy(),
        *_empty(),
        *_masks(),
        Check("GPT", "GPT, two training steps", _training_steps, GPT_KERNELS, HALVES, True),
    ]
    table = {check.name: check for check in every}
    assert len(table) == len(every), "two checks of one name"
    return table


GPT_KERNELS = (
    *("embed_kernel", "chunk_sums_kernel", "row_sums_kernel", "column_sum_kernel", "forward_kernel"),
    *("backward_kernel", "gelu_kernel", "gelu_backward_kernel", "cross_entropy_kernel"),
)


def _rows() -> Iterator[Check]:
    """Operators that work on rows. A width for every row of the tables; enough rows for several turns of a program."""
    # width, rows, multiprocessors, in `make test`
    sizes = [(33, 230, 1, True), (200, 90, 1, True), (768, 53, 2, True), (8200, 3, 2, True)]
    sizes += [(500, 60, 2, False), (1600, 20, 2, False), (3000, 10, 2, False), (6000, 5, 2, False)]
    for columns, rows, multiprocessors, tested in sizes:
        forward = "wide_forward_kernel" if columns > 8192 else "forward_kernel"
        backward = "wide_backward_kernel" if columns > 4096 else "backward_kernel"
        options: dict[str, Any] = {"multiprocessors": multiprocessors, "dtypes": EVERY}
        yield check_of(
            examples.layer_norm(rows, columns), forward, backward, tested=columns == 200, **options
        )
        yield check_of(
            examples.add_layer_norm(rows, columns, 0.1), forward, backward, tested=tested, **options
        )
    plain = examples.add_layer_norm(30, 768, x_bias=False)
    yield check_of(plain, "forward_kernel", "backward_kernel", label="no x_bias")
    for rows, columns in ((37, 100), (5, 1030), (1, 7)):
        yield check_of(
            examples.dropout(rows, columns, 0.3), "dropout_kernel", dtypes=EVERY, tested=columns == 1030
        )
    names = ("embed_kernel", "chunk_sums_kernel", "row_sums_kernel")
    # two tokens: whole chunks of sixteen rows have one token, more of them than a program adds at once
    for batch, length, columns, vocabulary in ((2, 150, 96, 2), (3, 33, 768, 200), (1, 40, 1030, 11)):
        embed = examples.embed(batch, length, columns, vocabulary, 0.1)
        yield check_of(embed, *names, dtypes=EVERY, tested=columns != 1030)
        yield check_of(examples.in_place(embed), *names, dtypes=EVERY, tested=columns == 96)
    yield check_of(examples.embed(4, 64, 512, 50), *names, tested=False)
    yield check_of(examples.linear(140, 96, 131), "column_sum_kernel", dtypes=EVERY)
    yield check_of(examples.linear(300, 64, 768), "column_sum_kernel", tested=False)


TWO_PASSES = ("forward_kernel", "query_kernel", "key_kernel")
ONE_PASS = ("forward_kernel", "one_pass_kernel")


def _attention() -> Iterator[Check]:
    packed, separate = examples.causal_attention, examples.attention
    two = partial(check_of, multiprocessors=TOO_MANY, label="two passes", descriptors=True)
    one = partial(check_of, architectures=(HOPPER,), label="one pass", descriptors=True)
    # tile by tile: the whole triangle, ragged at its edges
    yield two(packed(1, 260, 1, 64), *TWO_PASSES)
    yield two(packed(1, 150, 2, 64, 0.1), *TWO_PASSES)
    yield two(packed(1, 150, 1, 64, 0.1, True), *TWO_PASSES, tested=False)
    yield two(packed(2, 140, 1, 128, 0.1, True), *TWO_PASSES)
    yield two(packed(1, 140, 1, 128, 0.1), *TWO_PASSES, tested=False)
    yield two(packed(1, 131, 1, 80, 0.1), *TWO_PASSES)
    yield two(packed(1, 200, 1, 64, causal=False), *TWO_PASSES)
    yield two(packed(1, 200, 1, 64, 0.1, causal=False), *TWO_PASSES, tested=False)
    yield two(separate(1, 70, 210, 1, 64), *TWO_PASSES)
    yield two(separate(1, 210, 70, 1, 64, 0.1), *TWO_PASSES, tested=False)
    by_pointer = partial(two, label="two passes by pointer")
    for head_dim in (64, 128):
        yield by_pointer(_odd_strides(150, head_dim), *TWO_PASSES, descriptors=False, tested=head_dim == 64)
    shared = separate(2, 150, 150, 1, 64, 0.1, shared=True)
    yield by_pointer(shared, *TWO_PASSES, descriptors=False, tested=False)
    yield one(packed(1, 260, 2, 64), *ONE_PASS)
    yield one(packed(1, 150, 2, 64, 0.1), *ONE_PASS)
    yield one(packed(2, 200, 1, 64, 0.1, True), *ONE_PASS)
    yield one(packed(1, 200, 2, 64, causal=False), *ONE_PASS, tested=False)
    yield one(packed(1, 200, 2, 64, 0.1, causal=False), *ONE_PASS)
    yield one(separate(1, 70, 210, 2, 64), *ONE_PASS)
    yield one(separate(1, 210, 70, 2, 64, 0.1), *ONE_PASS, tested=False)
    for head_dim in (16, 32, 48, 64, 80, 96, 128):
        for p in (0.0, 0.1):
            yield two(packed(1, 137, 1, head_dim, p), *TWO_PASSES, tested=False)
            if head_dim <= 64:
                one_pass = packed(1, 137, 2, head_dim, p)
                yield one(one_pass, *ONE_PASS, tested=(head_dim, p) == (32, 0.1))
    full = partial(two, dtypes=(FP32,), tested=False, descriptors=False)
    for head_dim in (16, 48, 64):
        yield full(packed(1, 75, 1, head_dim, 0.1, head_dim == 48), *TWO_PASSES, label="float32")


def _decoding() -> Iterator[Check]:
    decode = partial(check_of, multiprocessors=TOO_MANY)
    attention = partial(examples.attention, trained=False)
    yield decode(attention(2, 1, 300, 1, 64, first_key=True), "forward_kernel", label="decoding")
    yield decode(attention(2, 5, 200, 1, 128), "forward_kernel", label="decoding")
    yield decode(attention(2, 16, 129, 1, 64), "forward_kernel", tested=False, label="decoding")
    shared = attention(2, 1, 300, 1, 64, shared=True)
    yield decode(shared, "forward_kernel", label="decoding", descriptors=False)
    yield decode(
        attention(2, 1, 140, 1, 64), "forward_kernel", dtypes=(FP32,), tested=False, label="decoding"
    )


def _mlp() -> Iterator[Check]:
    mlp = examples.gelu_mlp
    exact: dict[str, Any] = {"approximate": "none", "recompute": True}
    library = ("gelu_kernel", "gelu_backward_kernel", "column_sum_kernel")
    yield check_of(mlp(70, 96), *library, dtypes=EVERY)
    yield check_of(mlp(150, 80, **exact), *library, dtypes=EVERY)
    own = partial(check_of, architectures=(HOPPER,), descriptors=True)
    for i in range(len(candidates.MLP_UP_TILES[HOPPER])):
        named = partial(own, label=f"own matmul, tile {i}", own_matmul=i)
        yield named(mlp(200, 136), "up_kernel", "down_gradient_kernel")
        yield named(mlp(150, 192, **exact), "up_kernel", "down_gradient_kernel", tested=False)


def _cross_entropy() -> Iterator[Check]:
    loss = partial(examples.linear_cross_entropy, ignored=True)
    smooth: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3}
    name = "cross_entropy_kernel"
    yield check_of(loss(70, 96, 1000, 3), name, dtypes=EVERY)
    yield check_of(loss(40, 64, 1030, 90, **smooth), name, dtypes=EVERY)
    yield check_of(loss(40, 64, 513, 87, **smooth), name, tested=False)
    yield check_of(loss(9, 32, 8900, 100), name, tested=False)
    yield check_of(loss(9, 32, 8900, 100, **smooth), name, dtypes=EVERY)
    yield check_of(loss(33, 48, 500, reduction="none"), name)
    yield check_of(loss(33, 48, 500, reduction="sum", **smooth), name, tested=False)


def _empty() -> Iterator[Check]:
    """Nothing to do: whatever is launched must not write, and gradients of what was read by no one are zero."""
    empty = partial(check_of, label="empty")
    yield empty(examples.layer_norm(0, 64))
    yield empty(examples.add_layer_norm(0, 64, 0.1))
    yield empty(examples.dropout(0, 64))
    yield empty(examples.embed(0, 5, 64, 9, 0.1))
    yield empty(examples.linear(0, 32, 48))
    yield empty(examples.causal_attention(0, 20, 2, 64, 0.1))
    yield empty(examples.attention(1, 0, 20, 1, 64))
    yield empty(examples.gelu_mlp(0, 32))
    yield empty(examples.linear_cross_entropy(0, 32, 48, reduction="none"))


def _masks() -> Iterator[Check]:
    for rows, columns in ((37, 100), (5, 1030)):
        mask = partial(_dropout_mask, rows, columns)
        yield Check("dropout", f"dropout mask {rows} x {columns}", mask, ("dropout_kernel",), HALVES, True)
    for length, n_head, head_dim in ((150, 2, 64), (130, 1, 128)):
        mask = partial(_attention_mask, length, n_head, head_dim)
        name = f"attention mask {length}, {n_head} x {head_dim}"
        yield Check("attention", name, mask, ("forward_kernel",), HALVES, True, multiprocessors=TOO_MANY)
