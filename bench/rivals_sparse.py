"""The peers of the sparse products: Y[m, n] = X[m, k] @ W[n, k]^T with most of W zero, by other libraries.

As rivals_gemm.py has it: make(weight) gives a binder, the binder a call without arguments. torch's and scipy's sparse
matrices stand on the left, so X comes turned already and Y goes out turned: they do less than a layer has to. Left out:
DeepSparse (its last wheel, 1.8.0 of 2024, has an evaluation license and wants numpy 1), and OpenVINO's sparse weight
decompression, which needs AMX and int8 weights.
"""

import importlib.util
import warnings
from collections.abc import Callable

from rivals_gemm import FLOAT32, PEERS, Bind
from torch import Tensor


def torch_csr(weight: Tensor) -> Bind:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = weight.to_sparse_csr()

    def bind(x: Tensor) -> Callable[[], object]:
        turned = x.T.contiguous()
        return lambda: sparse @ turned

    return bind


def torch_bsr(weight: Tensor) -> Bind:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = weight.to_sparse_bsr((32, 32))

    def bind(x: Tensor) -> Callable[[], object]:
        turned = x.T.contiguous()
        return lambda: sparse @ turned

    return bind


def scipy_csr(weight: Tensor) -> Bind:
    """On one thread, whatever their number: scipy has no threads."""
    import scipy.sparse

    sparse = scipy.sparse.csr_matrix(weight.numpy())

    def bind(x: Tensor) -> Callable[[], object]:
        turned = x.T.contiguous().numpy()
        return lambda: sparse @ turned

    return bind


def dense(name: str) -> Callable[[Tensor], Bind]:
    return lambda weight: PEERS[name].make(weight, FLOAT32)


DENSE = ("torch fp32", "onnxruntime fp32", "OpenVINO fp32")


def installed(pattern: str) -> dict[str, Callable[[Tensor], Bind]]:
    """The dense float peers, and the sparse ones that serve a pattern."""
    found = {name: dense(name) for name in DENSE if importlib.util.find_spec(PEERS[name].library)}
    found["torch CSR"] = torch_csr
    if importlib.util.find_spec("scipy"):
        found["scipy CSR"] = scipy_csr
    if pattern == "32x32":  # of other blocks torch multiplies only square ones
        found["torch BSR"] = torch_bsr
    return found
