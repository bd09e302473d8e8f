"""The fused operators, a folder or a file each."""
