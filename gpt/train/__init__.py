"""Training: the loop, one step of it, its checkpoints and its records."""
