"""What each unit of a GPU does at most: the rates that turn counts into bounds.

Sources, by the letter in the table below:
    G   CUDA C++ Programming Guide 12.9: "Throughput of Native Arithmetic Instructions" and "Technical Specifications per
        Compute Capability"
    W   NVIDIA's white papers: A100 Tensor Core GPU Architecture; H100 Tensor Core GPU Architecture; Ada GPU Architecture
    D   NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, GeForce RTX 4090
    L   microbenchmarks of L2 with cp.async, github.com/smallscientist1/cuda_microbenchmark (A100 PCIe, H100 SXM5, RTX 4090). For
        H100, XLA's cost model has 6.65 TB/s, measured within one of L2's two partitions
    P   latency of a dependent load that hits or misses L2: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
        Architecture via Microbenchmarking", arXiv 2402.13499, table of memory latencies (A100, H100 PCIe, RTX 4090)
    M   measured: read plus written bytes of a large copy on one H200, torch 2.11, 2026-11-20

Where sources differ, the higher rate stands here, so that a bound stays a bound.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class GPU:
    """One GPU. Rates without another unit are results a cycle and multiprocessor."""

    name: str
    architecture: str  # whose kernels stand for its own
    multiprocessors: int  # W
    clock: float  # Hz, the highest (D)
    tensor_clock: float  # Hz, of the published tensor peak: power keeps it there (W, D)
    floats: int  # float32 additions, multiplications, multiply-adds (G)
    tensor: int  # FLOPs of dense bfloat16 with float32 accumulators (W)
    l2_bandwidth: float  # bytes a second, read (L)
    l2_bytes: int  # W
    l2_cycles: float  # latency (P)
    dram_bandwidth: float  # bytes a second, published (D)
    dram_cycles: float  # latency (P)
    shared_bytes: int  # of a multiprocessor (G)
    warps: int  # resident on a multiprocessor, at most (G)
    programs: int  # the same of CTAs (G)
    copy_bandwidth: float | None = None  # bytes a second that a copy was seen to reach (M)
    issued: int = 4  # warp instructions: four schedulers, one each (G)
    integers: int = 64  # G
    special: int = 16  # MUFU: exp2, log2, tanh, reciprocal, square root (G)
    # Packed conversions between float32 and bfloat16 run in the integer pipe; those that the guide gives 16 results are of other types.
    conversions: int = 64
    shared: int = 128  # bytes: 32 banks of 4 (G)
    registers: int = 65536  # 32 bits, of a multiprocessor (G)

    @property
    def tensor_peak(self) -> float:
        """FLOPs a second."""
        return self.tensor * self.multiprocessors * self.tensor_clock

    @property
    def memory_bandwidth(self) -> float:
        """Bytes a second: what a copy was seen to reach, else what is published."""
        return self.copy_bandwidth or self.dram_bandwidth


_H100 = GPU(
    "H100",
    architecture="sm_90",
    multiprocessors=132,
    clock=1.98e9,
    tensor_clock=1.83e9,
    floats=128,
    tensor=4096,
    l2_bandwidth=8.43e12,
    l2_bytes=50 * 2**20,
    l2_cycles=263.0,
    dram_bandwidth=3.35e12,
    dram_cycles=478.8,
    shared_bytes=228 * 1024,
    warps=64,
    programs=32,
)
_A100 = GPU(
    "A100",
    architecture="sm_80",
    multiprocessors=108,
    clock=1.41e9,
    tensor_clock=1.41e9,
    floats=64,
    tensor=2048,
    l2_bandwidth=5.41e12,
    l2_bytes=40 * 2**20,
    l2_cycles=261.5,
    dram_bandwidth=2.039e12,
    dram_cycles=466.3,
    shared_bytes=164 * 1024,
    warps=64,
    programs=32,
)
_RTX_4090 = GPU(
    "RTX 4090",
    architecture="sm_80",
    multiprocessors=128,
    clock=2.52e9,
    tensor_clock=2.52e9,
    floats=128,
    tensor=512,
    l2_bandwidth=4.90e12,
    l2_bytes=72 * 2**20,
    l2_cycles=273.0,
    dram_bandwidth=1.008e12,
    dram_cycles=541.5,
    shared_bytes=100 * 1024,
    warps=48,
    programs=24,
)
_H200 = replace(_H100, name="H200", dram_bandwidth=4.8e12, copy_bandwidth=4.27e12)
GPUS = {gpu.name: gpu for gpu in (_H200, _H100, _A100, _RTX_4090)}
