"""Bytes and FLOPs of PyTorch's operators and our kernels' launches, recorded while Python runs: no clock, no GPU.

Counted is what an operator has to move: each tensor that it reads or writes, once. A broadcast tensor has the elements that it
stores, a view and an allocation move nothing, an operator in place reads and writes. What an implementation moves beyond that
(passes of a reduction, a sort's buffers, tiles read twice from the cache) is not counted.

Operators of `torch.library`, ours among them, are looked into: the operators inside them are recorded, under their name, and
they themselves are not. `limit` leaves large operators uncomputed, which is what makes a step of full size run in seconds:
their results have the right shape, dtype and strides, and hold whatever was in memory.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf, prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from ..kernels import matmul, tiles, use_backend
from .gpu.launches import kernels_on_cpu_tensors

# allocations, and reads of one element
FREE = {
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "_local_scalar_dense",
    "lift_fresh",
}
FREE |= {"alias", "_unsafe_view", "resize_", "set_", "record_stream"}
OVERWRITING = {
    "copy_",
    "fill_",
    "zero_",
    "normal_",
    "uniform_",
    "random_",
}  # they do not read what they write
# of their first tensor they take shape and dtype
LIKE = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
GATHERS = {"embedding", "index", "index_select", "gather"}  # of their first tensor they read what they return

# What a kernel writes, by the names of its arguments or of their fields; all other tensors are read.
WRITES = {
    "embed_kernel": {"out"},
    "chunk_sums_kernel": {"partial"},
    "row_sums_kernel": {"dw"},
    "column_sum_kernel": {"sums"},
    "dropout_kernel": {"out"},
    "forward_kernel": {"y", "residual_out", "stats", "o", "lse"},  # LayerNorm's and attention's
    "wide_forward_kernel": {"y", "residual_out", "stats"},
    "backward_kernel": {"dh", "dx", "sums"},
    "wide_backward_kernel": {"dh", "dx"},
    "wide_sums_kernel": {"sums"},
    "query_kernel": {"stats", "dq"},
    "key_kernel": {"dk", "dv"},
    "one_pass_kernel": {"stats", "dq_acc", "dq", "dk", "dv"},
    "gelu_kernel": {"a"},
    "gelu_backward_kernel": {"a", "dpre", "sums"},
    "up_kernel": {"pre", "a"},
    "down_gradient_kernel": {"a", "dpre", "db"},
    "cross_entropy_kernel": {"logits", "loss", "lse"},
}
READ_TOO = {("one_pass_kernel", "dq_acc"), ("cross_entropy_kernel", "logits")}
# `row_sums_kernel` accounts for every row of dx: the two kernels share them.
UNREAD = {("chunk_sums_kernel", "dx"), ("chunk_sums_kernel", "order")}


@dataclass
class Operation:
    """One operator or launch. Bytes and FLOPs are those of its whole tensors."""

    name: str  # aten.mm.default, or a kernel's: gelu_kernel
    read: int
    written: int
    flops: int = 0
    inside: str = ""  # the operator of torch.library that called it: fusedgpt::linear_backward
    node: str = ""  # the node of autograd's graph that called it, in a backward pass

    @property
    def bytes(self) -> int:
        return self.read + self.written


class Traffic(TorchDispatchMode):
    """Record every operator that runs within it, those of a backward pass included.

    Args:
        limit: operators that move more bytes are not computed.

    Attributes:
        operations: in the order in which they ran.
    """

    def __init__(self, limit: float = inf) -> None:
        super().__init__()
        self.limit = limit
        self.operations: list[Operation] = []
        self._inside = ""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if operator.namespace not in ("aten", "prim"):
            return self._look_into(operator, args, kwargs)
        with self:
            result = operator.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name = operator.overloadpacket.__name__
        given, written = _tensors(operator, args, kwargs)
        free = operator.is_view or name in FREE
        # before the operator runs: it may resize or overwrite them
        read = 0 if free else _distinct(given)
        overwritten = 0 if free else _distinct(written)
        large = not free and read + overwritten > self.limit
        result = _uncomputed(operator, args, kwargs, written) if large else operator(*args, **kwargs)
        if not free:
            results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            new = 0 if written or _aliases(results, given) else _distinct(results)
            if name in GATHERS:
                read += new - _distinct(given[:1])
            if name in LIKE:
                read = 0
            formula = flop_registry.get(_out_of_place(operator))
            shaped = [a for a in args if not isinstance(a, torch.dtype)]  # the formulas know no out_dtype
            flops = formula(*shaped, **kwargs, out_val=result) if formula else 0
            self._add(str(operator), read, overwritten + new, flops)
        return result

    def _look_into(self, operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the operator's kernel with the mode on."""
        outer, self._inside = self._inside, self._inside or operator.name()
        device = next((t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
        key = torch._C._dispatch_key_for_device(device.type if device else "cpu")
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        try:
            with self:
                return operator.redispatch(keys, *args, **kwargs)
        finally:
            self._inside = outer

    def launch(self, kernel: str, arguments: Mapping[str, Any]) -> None:
        """Record a Triton kernel's launch, by the arguments' names: each tensor once, read or written."""
        read = written = 0
        for name, tensor in _named_tensors(arguments):
            if name in WRITES[kernel] and not (kernel == "cross_entropy_kernel" and _given(name, arguments)):
                written += _size(tensor)
            elif (kernel, name) not in UNREAD:
                read += _size(tensor)
            if (kernel, name) in READ_TOO:
                read += _size(tensor)
        if kernel == "embed_kernel":  # of the tables, a row of wte for each token, and wpe's rows once
            ids, wte, wpe = (arguments[name] for name in ("ids", "wte", "wpe"))
            positions = min(len(wpe), arguments["T"])
            read += wte.itemsize * wte.shape[1] * (ids.numel() - len(wte)) - wpe[positions:].nbytes
        if kernel == "row_sums_kernel" and arguments.get("ADD"):  # it skips the rows of dw without a token
            offsets, dw = arguments["offsets"], arguments["dw"]
            added = int((offsets.diff() > 0).sum()) * dw[0].nbytes
            read, written = read + added, added
        self._add(kernel, read, written)

    def _add(self, name: str, read: int, written: int, flops: int = 0) -> None:
        node = torch._C._current_autograd_node()
        self.operations.append(
            Operation(name, read, written, flops, self._inside, node.name() if node else "")
        )


def _given(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether cross_entropy_kernel only reads it: the logits in evaluation, the log-sum-exp without a loss."""
    return (name == "logits" and not arguments["GRAD"]) or (name == "lse" and arguments["loss"] is None)


def _tensors(operator: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operator reads and those of its arguments that it writes."""
    name = operator.overloadpacket.__name__
    read: list[Tensor] = []
    written: list[Tensor] = []
    parameters = operator._schema.arguments
    values = [
        *zip(parameters, args, strict=False),
        *((a, kwargs[a.name]) for a in parameters if a.name in kwargs),
    ]
    for argument, value in values:
        found = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if name.startswith("_fused_adam") and argument.name == "grads":
            writes = kwargs.get("grad_scale") is not None  # it stores them divided
        if writes:
            written += found
        ignored = argument.is_out or (writes and name in OVERWRITING)
        ignored |= argument.name == "self" and kwargs.get("beta") == 0
        if not ignored:
            read += found
    return read, written


def _out_of_place(operator: Any) -> Any:
    """The packet of addmm for addmm_: what the formulas of FLOPs are registered for."""
    packet = operator.overloadpacket
    return getattr(torch.ops.aten, packet.__name__.rstrip("_"), packet)


def _size(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor stores: those of a broadcast dimension once."""
    return tensor.itemsize * prod(
        n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0
    )


def _distinct(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, those at one address with the same size once."""
    return sum({(t.data_ptr(), _size(t)): _size(t) for t in tensors}.values())


def _aliases(results: list[Tensor], given: list[Tensor]) -> bool:
    addresses = {t.untyped_storage().data_ptr() for t in given if t.numel()}
    return any(t.numel() and t.untyped_storage().data_ptr() in addresses for t in results)


def _uncomputed(operator: Any, args: tuple, kwargs: dict[str, Any], written: list[Tensor]) -> Any:
    """What the operator returns, not computed."""
    returns = operator._schema.returns
    if written:
        return written[0] if len(returns) == 1 else tuple(written) if returns else None

    def described(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    device = next(t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    options = {"device": "meta"} if kwargs.get("device") is not None else {}
    shapes = operator(
        *tree_map_only(Tensor, described, args), **tree_map_only(Tensor, described, kwargs) | options
    )
    return tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device), shapes
    )


def _named_tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among a launch's arguments, those in named tuples and behind descriptors included."""
    for name, value in arguments.items():
        value = getattr(value, "base", value) if type(value).__name__ == "TensorDescriptor" else value
        if isinstance(value, Tensor):
            yield name, value
        elif hasattr(value, "_asdict"):
            yield from _named_tensors(value._asdict())


@contextmanager
def without_a_gpu(traffic: Traffic, architecture: str, multiprocessors: int) -> Iterator[None]:
    """Take a GPU's path on CPU tensors: our kernels, recorded and not run, and the matmuls of its library.

    Args:
        traffic: with a limit; PyTorch's CPU operators lack some of these matmuls.
        architecture: whose rows of tiles.py are read.
        multiprocessors: of the GPU.
    """
    from triton.runtime import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        named = {name: value for name, value in options.items() if name in kernel.arg_names}
        traffic.launch(kernel.__name__, dict(zip(kernel.arg_names, args, strict=False)) | named)

    def stores_float32(a: Tensor) -> bool:  # not a Mock, which would keep every tensor it has seen
        return True

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(matmul, "_stores_float32", stores_float32))
        stack.enter_context(kernels_on_cpu_tensors(tiles.Hardware(architecture, multiprocessors)))
        stack.enter_context(use_backend("triton"))
        yield
