"""lk.backends(): what this machine and this build offer."""

from typing import Any

from lepton_kernels._runtime import C


def backends() -> dict[str, Any]:
    """The instruction-set level in use and the machine's best, threads, and which kernel serves which scheme."""
    isa = C.isa()
    kernels = {
        "w8a8": f"gemm_int8[{isa}]",
        "w4a8": f"gemm_int4[{isa}]",
        "w8a16": f"gemm_dequant[{isa}]",
        "w4a16": f"gemm_dequant[{isa}]",
    }
    return {
        "isa": isa,
        "isa_of_machine": C.isa_of_machine(),
        "threads": C.default_threads(),
        "cpu": kernels,
        "cuda": None,
    }
