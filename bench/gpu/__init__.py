"""What only a GPU can show (`make gpu`), and what a compiler can show without one (`make kernels-report`)."""
