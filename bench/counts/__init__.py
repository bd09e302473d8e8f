"""Performance counted instead of timed: what compiled kernels execute and move, beside the same of other implementations."""
