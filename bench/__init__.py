"""What is faster, by how much, on which hardware: paired comparisons with what one would pick instead."""
