"""Triton kernels for CUDA tensors, one operator a file. Imported only by _backends/triton.py, on first use."""
