"""Implementations of the ops, one module or folder a backend; `g2rl_kernels.dispatch` chooses between them."""
