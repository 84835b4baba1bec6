"""Who computes an operator on which device: cpu (native), triton (CUDA tensors)."""
