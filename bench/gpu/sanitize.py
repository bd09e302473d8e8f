"""Every kernel once on small uneven inputs, for compute-sanitizer to watch: `compute-sanitizer python -m fusedgpt.bench.gpu.sanitize`.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives each tensor an allocation of its own, so that an access past its end is seen.
"""

import torch

from ...kernels import use_backend
from ...kernels.examples import SMALL, WIDE_ROW, draw, results
from ..timing import require_gpu


def main() -> None:
    device = require_gpu()
    with use_backend("triton"):
        for dtype in (torch.bfloat16, torch.float32):
            for example in (*SMALL.values(), WIDE_ROW):
                # drawn on the CPU: the fewer kernels besides ours, the faster
                drawn = draw(example, "cpu", dtype).items()
                on_device = {name: t.detach().to(device) for name, t in drawn}
                results(
                    example, {name: t.requires_grad_(t.is_floating_point()) for name, t in on_device.items()}
                )
    torch.cuda.synchronize()
    print(f"ran {len(SMALL)} operators")


if __name__ == "__main__":
    main()
