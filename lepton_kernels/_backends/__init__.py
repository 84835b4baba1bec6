"""Who computes an operator on which device: cpu (native), triton (CUDA tensors)."""

from lepton_kernels._runtime import C


def kernel_name(scheme: str, device: str) -> str:
    """What serves a scheme on a type of device ("cpu", "cuda"), as lk.backends() and the reports show it."""
    kernel = {"w8a8": "gemm_int8", "w4a8": "gemm_int4"}.get(scheme, "gemm_dequant")
    if device == "cuda":
        return f"{'gemm_int8' if scheme.startswith('w8') else 'gemm_int4'}[triton]"
    return f"{kernel}[{C.isa()}]"
