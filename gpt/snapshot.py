"""The tensors of a model and its optimizers, by name: what a checkpoint holds, and copies of it while training goes on."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Muon

from .model import GPT
from .optim import Optimizers
from .tensors import Spec


def model_tensors(model: GPT) -> dict[str, Tensor]:
    """Weights by name, at the vocabulary's true size; views of the parameters."""
    padded = {id(table) for table in model.vocabulary_tables()}
    return {
        name: p.detach()[: model.config.vocab_size] if id(p) in padded else p.detach()
        for name, p in model.named_parameters()
    }


def optimizer_tensors(model: GPT, optimizers: Optimizers) -> dict[str, Tensor]:
    """The optimizers' state by "parameter|part". What an optimizer has yet to create is 0, as it would create it."""
    state = optimizers.state()
    return {
        name: state.get(id(p), {}).get(part, torch.zeros(shape, dtype=dtype))
        for name, (p, part, (shape, dtype)) in optimizer_parts(model, optimizers).items()
    }


def optimizer_parts(model: GPT, optimizers: Optimizers) -> dict[str, tuple[Tensor, str, Spec]]:
    """Parameter, part, shape and dtype of each tensor of an optimizer's state. torch's kernels do not check these: a
    shape that is not the parameter's makes them read and write outside of it."""
    names = {id(p): name for name, p in model.named_parameters()}
    parts: dict[str, tuple[Tensor, str, Spec]] = {}
    for optimizer in optimizers.all:
        kinds = ("momentum_buffer",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            for part in kinds:
                spec: Spec = ((), torch.float32) if part == "step" else (tuple(p.shape), p.dtype)
                parts[f"{names[id(p)]}|{part}"] = (p, part, spec)
    return parts


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor that has an element that is not finite. A sum shows it, which reads each element once."""
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors.values()])
    wrong = torch.isfinite(sums).logical_not().nonzero().flatten().tolist()
    return list(tensors)[wrong[0]] if wrong else None


class Snapshot:
    """Copies of tensors in host memory, which stays allocated; a GPU's are made by a stream of their own."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy these tensors; on a GPU the copies are complete after `finish`."""
        if (gpu := next(iter(tensors.values())).device).type != "cuda":
            return {name: self._buffer(name, tensor).copy_(tensor) for name, tensor in tensors.items()}
        self._stream = self._stream or torch.cuda.Stream(gpu)
        self._stream.wait_stream(torch.cuda.current_stream(gpu))
        with torch.cuda.stream(self._stream):
            copies = {
                name: self._buffer(name, tensor).copy_(tensor, non_blocking=True)
                for name, tensor in tensors.items()
            }
            self._copied = self._stream.record_event()
        return copies

    def wait(self) -> None:
        """Let the current stream wait for the copies; the host does not."""
        if self._stream is not None and self._copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)

    def finish(self) -> None:
        """Let the host wait for the copies."""
        if self._copied is not None:
            self._copied.synchronize()

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._buffers:
            pinned = tensor.device.type == "cuda"
            self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return self._buffers[name]
