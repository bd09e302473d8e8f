"""Other packages' kernels, counted like ours: each optional, named with its version.

Their own launchers are called, as on a GPU (`gpu.py`), or PyTorch's compiler makes the kernels (`inductor.py`). Where one would time several
configurations of a kernel on the GPU, the one with the fewest instructions is taken.
"""
