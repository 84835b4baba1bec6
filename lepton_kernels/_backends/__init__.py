"""Who computes an operator on which device: cpu (native), cuda (native for few rows and on Hopper, else triton)."""

from lepton_kernels._runtime import C


def kernel_name(scheme: str, device: str) -> str:
    """What serves a scheme on a type of device ("cpu", "cuda"), as lk.backends() and the reports show it."""
    kernel = "gemm_int4" if scheme.startswith("w4") else "gemm_int8"
    if device == "cuda":
        if not C.cuda_most_rows() or scheme == "w4a8":
            return f"{kernel}[triton]"
        hopper = " and on sm_90" if scheme.endswith("a16") else ""
        return f"{kernel}[cuda up to {C.cuda_most_rows()} rows{hopper}, triton]"
    if scheme.endswith("a16") and not C.splits_activations():
        kernel = "gemm_int16"
    return f"{kernel}[{C.isa()}]"


def recurrent_kernel_name() -> str:
    """What serves recurrent layers, on the CPU alone, as the reports show it."""
    return f"recurrent[{C.isa()}]"
