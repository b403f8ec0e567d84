"""A folded module → the same function on fast kernels: those of torch, or another engine."""
