"""Every kernel once on small uneven inputs, for compute-sanitizer to watch: `compute-sanitizer python -m fusedgpt.bench.gpu.sanitize`.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives each tensor an allocation of its own, so that an access past its end is seen.
"""

import torch

from ...kernels import use_backend
from ...kernels.backend import OPERATORS
from ...kernels.ops.layer_norm.operator import add_layer_norm
from ...kernels.selfcheck import EXAMPLES
from ..timing import require_gpu


def main() -> None:
    device = require_gpu()
    seed = torch.tensor([77], device=device)

    def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # drawn on the CPU: the fewer kernels besides ours, the faster
        return torch.randn(shape).to(device, dtype).requires_grad_()

    with use_backend("triton"):
        for dtype in (torch.bfloat16, torch.float32):
            for operator in OPERATORS:
                shapes, call = EXAMPLES[operator]
                inputs = {name: tensor(shape, dtype) for name, shape in shapes.items()}
                extra = {
                    "seed": seed,
                    "ids": torch.randint(100, (2, 70)).to(device),
                    "targets": torch.randint(100, (140,)).to(device),
                }
                _backward(call(inputs | extra), list(inputs.values()))
            x, residual = (tensor((5, 9001), dtype) for _ in range(2))  # a row that is taken in blocks
            parameters = [tensor((9001,), torch.float32) for _ in range(3)]
            weight, bias, x_bias = parameters
            outputs = add_layer_norm(x, residual, weight, bias, 1e-5, 0.1, seed, 2, x_bias)
            _backward(outputs, [x, residual, *parameters])
    torch.cuda.synchronize()
    print(f"ran {len(OPERATORS)} operators")


def _backward(outputs: torch.Tensor | tuple[torch.Tensor, ...], inputs: list[torch.Tensor]) -> None:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, inputs, [torch.randn(y.shape).to(y) for y in outputs])


if __name__ == "__main__":
    main()
