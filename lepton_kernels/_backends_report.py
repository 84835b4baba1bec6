"""lk.backends(): what this machine and this build offer."""

import importlib.util
from typing import Any

from lepton_kernels._backends import kernel_name, recurrent_kernel_name
from lepton_kernels._runtime import C

SCHEMES = ("w8a8", "w8a16", "w4a8", "w4a16")


def backends() -> dict[str, Any]:
    """The instruction-set level in use and the machine's best, threads, and which kernel serves which scheme where.

    "recurrent" is what serves QuantLSTM and its like, "sparse" what serves SparseLinear, both on the CPU alone; with a
    scheme the zeros and the number of rows decide.

    "cuda" is what would serve CUDA tensors, whether or not there is a GPU; None without triton. "cuda_architectures"
    are those that native code was compiled for.
    """
    triton = importlib.util.find_spec("triton") is not None
    return {
        "isa": C.isa(),
        "isa_of_machine": C.isa_of_machine(),
        "threads": C.default_threads(),
        "cpu": {scheme: kernel_name(scheme, "cpu") for scheme in SCHEMES},
        "recurrent": recurrent_kernel_name(),
        "sparse": {
            "float": f"sparse_rows[{C.isa()}]",
            "w8a8": f"gemm_int8_blocks, sparse_rows or gemm_int8[{C.isa()}]",
            "w4a16": f"sparse_rows or {kernel_name('w4a16', 'cpu')}",
        },
        "cuda": {scheme: kernel_name(scheme, "cuda") for scheme in SCHEMES} if triton else None,
        "cuda_architectures": C.cuda_architectures(),
    }
