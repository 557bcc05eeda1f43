"""Pallas TPU kernels and their XLA references, one folder per operation."""
