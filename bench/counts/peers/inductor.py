"""What torch.compile makes for a GPU, made without one: Inductor's kernels for operators written in plain PyTorch.

Dynamo and AOTAutograd trace on fake CPU tensors, since autograd wants a driver for any other device. The graphs of forward and backward then become
CUDA's, and Inductor compiles them as for the GPU of `gpu.pretended`. Its wrappers, called with CPU
tensors, launch the kernels by Triton's JIT, and so in the emulator.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.nn.attention import flex_attention
from torch.utils._pytree import tree_map_only

from .gpu import CUDA, pretended

aten = torch.ops.aten
# in its package the operator has taken the module's name
flex_operator = import_module("torch._higher_order_ops.flex_attention")


def compiled(function: Callable, arguments: tuple[Any, ...], architecture: str) -> Callable:
    """`function` of arguments like these, compiled for a GPU; takes CPU tensors, within `emulate`, `pretended` and `launching`.

    Call it within `emulate`: Inductor asks Triton for its target.
    """
    graphs: list[tuple[Any, list[str]]] = []

    def backend(graph: GraphModule, inputs: list[Any]) -> Callable:
        names = [n.meta["grapharg"].source.name for n in graph.graph.nodes if n.op == "placeholder"]
        graphs.append((compile_fx(graph, inputs, inner_compile=for_gpu, decompositions=table), names))
        outputs: Any = graph.graph.output_node().args[0]
        return lambda *args: tuple(node.meta["example_value"] for node in outputs)

    def for_gpu(graph: GraphModule, inputs: list[Any], **options: Any) -> Any:
        moved = _to_gpu(graph, inputs)
        with pretended(architecture):
            return compile_fx_inner(graph, moved, **options)

    table = {**select_decomp_table(), aten.native_layer_norm.default: _layer_norm}
    with ExitStack() as stack:
        enter, patch = stack.enter_context, mock.patch.object
        enter(patch(CachingAutotuner, "precompile"))
        enter(patch(torch.ops.prims.inductor_lookup_seed.default, "prim_meta_impl", _seed))
        enter(patch(flex_operator, "_permute_strides", _permuted))
        enter(patch(flex_attention, "_validate_device", _any_device))
        enter(patch(flex_attention, "_apply_kernel_options", _with_log_sum_exp))
        enter(inductor_config.patch(compile_threads=1, fx_graph_cache=False))
        enter(functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False))
        mode = enter(FakeTensorMode())
        fakes = tree_map_only(Tensor, mode.from_tensor, arguments)
        torch.compile(function, backend=backend, dynamic=False, fullgraph=True)(*fakes)
    torch._dynamo.reset()  # it keeps every compilation, and refuses the ninth of a function
    ((launcher, names),) = graphs

    def call(*arguments: Any) -> Any:
        bound = inspect.signature(function).bind(*arguments).arguments
        # Dynamo's own expressions, such as L['mask'].kv_indices; nothing of a file is in them
        found = launcher(*(eval(name, {"L": bound}) for name in names))
        return found[0] if len(found) == 1 else tuple(found)

    return call


def _to_gpu(graph: GraphModule, inputs: list[Any]) -> list[Any]:
    """Make a graph of CPU tensors one of CUDA tensors, and its fake inputs too."""
    mode = torch._guards.detect_fake_mode(inputs)
    assert mode is not None

    def moved(t: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA)

    for module in graph.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.args, node.kwargs = map_aggregate(
                    (node.args, node.kwargs), lambda a: CUDA if isinstance(a, torch.device) else a
                )
                if "val" in node.meta:
                    node.meta["val"] = tree_map_only(Tensor, moved, node.meta["val"])
            module.recompile()
    return tree_map_only(Tensor, moved, inputs)


def _layer_norm(x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    """As it is decomposed for CUDA: statistics in float32, where a CPU's are in the dtype of x."""
    y, mean, rstd = torch._refs.native_layer_norm(x.float(), shape, weight, bias, eps)
    return y.to(x.dtype), mean, rstd


def _seed(seeds: Tensor, index: int) -> Tensor:
    """Of dropout; Inductor's own indexes a fake CUDA tensor, which asks for the driver."""
    return seeds.new_empty(())


# In place of FlexAttention's own: on a CPU it refuses a backward, leaves out the log-sum-exp that it needs, and the copy of a fake
# CUDA tensor asks for the driver.
_kernel_options, _permute_strides = flex_attention._apply_kernel_options, flex_operator._permute_strides


def _any_device(query: Tensor, key: Tensor, value: Tensor) -> None:
    pass


def _with_log_sum_exp(*args: Any) -> Any:
    return {**_kernel_options(*args), "OUTPUT_LOGSUMEXP": True}


def _permuted(out: Tensor, strides: tuple[int, ...]) -> Tensor:
    like = _permute_strides(torch.empty_like(out, device="cpu"), strides)
    return torch.empty_strided(like.shape, like.stride(), dtype=out.dtype, device=out.device)


@contextmanager
def launching(cost: Callable[[Callable[[], None]], float]) -> Iterator[None]:
    """Within it Inductor's kernels are launched by Triton's JIT.

    Args:
        cost: of a launch, by which one of several configurations is chosen, as Inductor chooses by time.
    """

    def run(self: CachingAutotuner, *args: Any, stream: Any, **options: Any) -> None:
        def launch(config: triton.Config) -> None:
            given, grid = self._interpret_args_grid(args, config)
            warps_and_stages = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            self.fn[grid](*given, **options, **config.kwargs, **warps_and_stages)

        several = len(self.configs) > 1
        costs = [cost(partial(launch, config)) if several else 0.0 for config in self.configs]
        launch(self.configs[costs.index(min(costs))])

    with mock.patch.object(CachingAutotuner, "run", run):
        yield
