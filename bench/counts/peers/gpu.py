"""A GPU that libraries see and nobody has: their launchers and PyTorch's compiler take the way that they take on a GPU, with tensors on the CPU.

Inside `emulate`, which runs what they launch.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.utils._triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.runtime import hints, triton_helpers
from torch.utils._python_dispatch import TorchDispatchMode

from ..rates import GPUS

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@contextmanager
def pretended(architecture: str) -> Iterator[None]:
    """Within it torch.cuda answers as for the first GPU of an architecture in `rates.GPUS`, and PyTorch's compiler compiles for it."""
    gpu = next(gpu for gpu in GPUS.values() if gpu.architecture == architecture)
    name = f"NVIDIA {gpu.name}"
    capability = divmod(int(architecture.removeprefix("sm_")), 10)
    properties = SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=gpu.multiprocessors,
        max_threads_per_multi_processor=32 * gpu.warps,
        max_threads_per_block=1024,
        regs_per_multiprocessor=gpu.registers,
        warp_size=32,
        gcnArchName=name,  # what a build of torch without CUDA asks for
    )
    answers: dict[str, Callable] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        **dict.fromkeys(("set_device", "synchronize"), lambda device=None: None),
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), lambda index: 0),
        "_lazy_init": lambda: None,
        **dict.fromkeys(("device", "_DeviceGuard"), lambda device: nullcontext()),
    }
    with ExitStack() as stack:
        for answer, function in answers.items():
            _patch(stack, torch.cuda, answer, function)
            plain = answer.removeprefix("_")
            if plain in vars(CudaInterface) and answer not in ("is_available", "device"):
                _patch(stack, CudaInterface, plain, staticmethod(function))
        _patch(stack, CudaInterface, "get_raw_stream", staticmethod(lambda index: 0))
        _patch(stack, torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True)
        _patch(stack, torch._C._dynamo.guards, "_empty_strided_cuda", _empty_strided)
        _patch(stack, triton_helpers, "set_driver_to_gpu", lambda: None)  # the emulator's stays
        stack.callback(_forget)
        _forget()
        yield


@contextmanager
def tensors_on_gpu() -> Iterator[None]:
    """Within it CPU tensors say that they are on a GPU, and what is to be made there is made on the CPU."""
    with ExitStack() as stack:
        _patch(stack, torch.Tensor, "device", property(_device))
        _patch(stack, torch.Tensor, "is_cuda", property(lambda self: _is_cuda(self.device)))
        stack.enter_context(_OnCPU())
        # torch.tensor(..., device="cuda") makes a CPU tensor first, as under FakeTensorMode
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        yield


class _OnCPU(TorchDispatchMode):
    """What is to be made on a GPU is made on the CPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [CPU if _is_cuda(a) else a for a in args]
        return function(*args, **{k: CPU if _is_cuda(a) else a for k, a in (kwargs or {}).items()})


def _device(tensor: Tensor) -> torch.device:
    device = torch._C.TensorBase.device.__get__(tensor)  # type: ignore[attr-defined]
    return CUDA if device == CPU else device


def _is_cuda(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


def _patch(stack: ExitStack, owner: Any, name: str, value: Any, **options: Any) -> None:
    stack.enter_context(mock.patch.object(owner, name, value, **options))


def _empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype)


def _forget() -> None:
    """What torch has cached of the GPU that it sees."""
    owners: tuple[Any, ...] = (torch.utils._triton, torch._inductor.utils, hints.DeviceProperties)
    for owner in owners:
        for value in map(owner.__dict__.get, dir(owner)):
            getattr(getattr(value, "__func__", value), "cache_clear", lambda: None)()
