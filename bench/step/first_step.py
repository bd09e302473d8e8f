"""A fresh process up to its first finished training step, for `startup`: `python -m fusedgpt.bench.step.first_step SIDE SIZE DEVICE`.

Prints one JSON object: the seconds that `import torch` took, and those from then to the end of the first step. Nothing that
imports torch may stand at the top.
"""

import json
import sys
import time


def main(name: str, size: str, device_name: str) -> None:
    began = time.perf_counter()
    import torch

    imported = time.perf_counter()
    from .implementations import builders
    from .sizes import workload

    work = workload(size, device_name)
    side = dict(builders(work))[name]()
    loss, _ = side.step(*next(work.batches()))
    loss.item()
    if work.device.type == "cuda":
        torch.cuda.synchronize(work.device)
    finished = time.perf_counter()
    print(json.dumps({"import_torch": imported - began, "seconds": finished - imported}))


if __name__ == "__main__":
    main(*sys.argv[1:])
