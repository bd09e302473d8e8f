"""Run every kernel once on small uneven inputs under compute-sanitizer: `compute-sanitizer python -m fusedgpt.bench.gpu.sanitize`.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives each tensor its own allocation, so that an access past its end is detected.
"""

import torch

from ...kernels import use_backend
from ...kernels.examples import WIDE_ROW, draw, results, small
from ..timing import require_gpu


def main() -> None:
    device, ran = require_gpu(), 0
    with use_backend("triton"):
        for dtype in (torch.bfloat16, torch.float32):
            for example in (*small(device, dtype), WIDE_ROW):
                # drawn on the CPU: the sanitizer is slow, the fewer foreign kernels the better
                tensors = {name: t.detach().to(device) for name, t in draw(example, "cpu", dtype).items()}
                for tensor in tensors.values():
                    tensor.requires_grad_(tensor.is_floating_point())
                results(example, tensors)
                ran += 1
    torch.cuda.synchronize()
    print(f"ran {ran} examples")


if __name__ == "__main__":
    main()
