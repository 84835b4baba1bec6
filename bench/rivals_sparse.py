"""The peers of the sparse products: Y[m, n] = X[m, k] @ W[n, k]^T with most of W zero, by other libraries.

As rivals_gemm.py has it: make(weight) gives a binder, the binder a call without arguments. torch's and scipy's sparse
matrices stand on the left, so X comes turned already and Y goes out turned: they do less than a layer has to.

DeepSparse (its last wheel, 1.8.0 of 2024, wants an old onnx and has an evaluation license) is a peer where
LEPTON_DEEPSPARSE names the Python of an environment that has it. It runs in a process of its own, asked through a pipe:
some 50 us a call are the pipe's. Left out: OpenVINO's sparse weight decompression, which needs AMX and int8 weights.
"""

import importlib.util
import os
import subprocess
import tempfile
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
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


class DeepSparse:
    """A call of an engine for one weight and X. The process goes with it."""

    def __init__(self, weight: Tensor, x: Tensor) -> None:
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        self._folder = tempfile.TemporaryDirectory()
        model, x_path, self._y = (str(Path(self._folder.name, name)) for name in ("w.onnx", "x.npy", "y.npy"))
        (m, k), n = x.shape, weight.shape[0]
        sizes = {"x": [m, k], "y": [m, n]}
        tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
        w = numpy_helper.from_array(weight.T.contiguous().numpy(), "w")
        graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", tensors[:1], tensors[1:], [w])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), model)
        np.save(x_path, x.numpy())
        worker = Path(__file__).with_name("deepsparse_worker.py")
        command = [os.environ["LEPTON_DEEPSPARSE"], str(worker), model, x_path, self._y, str(torch.get_num_threads())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        weakref.finalize(self, self._process.kill)
        self._wait("ready")
        self._first = True

    def _wait(self, word: str) -> None:
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()).strip() != word:  # its banner comes first
            if not line:
                raise RuntimeError("DeepSparse's process ended")

    def __call__(self) -> object:
        assert self._process.stdin is not None
        self._process.stdin.write("save\n" if self._first else "run\n")
        self._process.stdin.flush()
        self._wait("done")
        if not self._first:
            return None
        self._first = False
        return np.load(self._y)


def deepsparse(weight: Tensor) -> Bind:
    return lambda x: DeepSparse(weight, x)


DENSE = ("torch fp32", "onnxruntime fp32", "OpenVINO fp32")
DENSE_INT4 = ("torch int4pack (bf16)",)


def installed(pattern: str) -> dict[str, Callable[[Tensor], Bind]]:
    """The dense peers of floats and of 4 bits, and the sparse ones that serve a pattern."""
    found = {name: dense(name) for name in DENSE + DENSE_INT4 if importlib.util.find_spec(PEERS[name].library)}
    found["torch CSR"] = torch_csr
    if importlib.util.find_spec("scipy"):
        found["scipy CSR"] = scipy_csr
    if os.environ.get("LEPTON_DEEPSPARSE"):
        found["DeepSparse"] = deepsparse
    if pattern == "32x32":  # of other blocks torch multiplies only square ones
        found["torch BSR"] = torch_bsr
    return found
