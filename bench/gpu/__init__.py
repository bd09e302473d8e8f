"""What needs a GPU (`make gpu`), and what compilers show without one (`make kernels-report`)."""
