"""llama.cpp's matrix product: one ggml_mul_mat, through the libraries that llama-cpp-python installs (llama_cpp/lib).

Weights are repacked where ggml has a layout for that, as llama.cpp's loader does. X is quantized to int8 in blocks of
32 inside the product; its copy into ggml is not timed. Not its AMX layout: it configures a thread's tile registers once
and for good, and every other library in this process configures them for itself.
"""

import ctypes
import functools
import importlib.util
import itertools
import weakref
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

F32, Q4_0, Q8_0 = 0, 2, 8  # enum ggml_type
CONTEXT_BYTES = 1 << 20  # for the descriptions of three tensors and a graph


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


FUNCTIONS = {  # name: (result, arguments), as in ggml's headers
    "ggml_init": (c_void_p, (InitParams,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_get_data": (c_void_p, (c_void_p,)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float))),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_free": (None, (c_void_p,)),
}


@functools.cache
def ggml() -> dict[str, Callable]:
    """The functions above, from whichever of the libraries has them."""
    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    libraries = [ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu")]
    functions = {}
    for name, (result, arguments) in FUNCTIONS.items():
        function = next(getattr(library, name) for library in libraries if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return functions


@functools.cache
def backend() -> int:
    """ggml's CPU backend, with torch's number of threads."""
    g = ggml()
    cpu = g["ggml_backend_cpu_init"]()
    g["ggml_backend_cpu_set_n_threads"](cpu, torch.get_num_threads())
    return cpu


def layouts() -> list[int]:
    """The buffer types of weights, best first."""
    g = ggml()
    registry = g["ggml_backend_cpu_reg"]()
    address = g["ggml_backend_reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(g["ggml_backend_reg_dev_get"](registry, 0))
    own = itertools.takewhile(bool, (extra[i] for i in itertools.count()))
    return [*(kind for kind in own if g["ggml_backend_buft_name"](kind) != b"AMX"), g["ggml_backend_cpu_buffer_type"]()]


class Memory:
    """A ggml context, and the buffer of its tensors; both live as long as this object."""

    def __init__(self) -> None:
        g = ggml()
        self.context = g["ggml_init"](InitParams(CONTEXT_BYTES, None, True))
        weakref.finalize(self, g["ggml_free"], self.context)

    def tensor(self, kind: int, n: int, k: int) -> int:
        return ggml()["ggml_new_tensor_2d"](self.context, kind, k, n)

    def allocate(self, layout: int) -> bool:
        """Memory for the tensors that have none; False when this layout is not for them."""
        buffer = ggml()["ggml_backend_alloc_ctx_tensors_from_buft"](self.context, layout)
        if buffer:
            weakref.finalize(self, ggml()["ggml_backend_buffer_free"], buffer)
        return bool(buffer)


def weights(weight: Tensor, kind: int) -> tuple[Memory, int]:
    """W quantized, in the best layout that the product takes."""
    g = ggml()
    n, k = weight.shape
    device = g["ggml_backend_reg_dev_get"](g["ggml_backend_cpu_reg"](), 0)
    for layout in layouts():
        memory, trial = Memory(), Memory()
        tensor = memory.tensor(kind, n, k)
        if not memory.allocate(layout):
            continue
        product = g["ggml_mul_mat"](trial.context, tensor, trial.tensor(F32, 1, k))
        if g["ggml_backend_dev_supports_op"](device, product):
            break
    else:
        raise RuntimeError("ggml: no layout of weights that its CPU product supports")
    blocks = np.empty(g["ggml_nbytes"](tensor), np.uint8)
    floats = weight.contiguous()
    g["ggml_quantize_chunk"](kind, floats.data_ptr(), blocks.ctypes.data, 0, n, k, None)
    g["ggml_backend_tensor_set"](tensor, blocks.ctypes.data, 0, blocks.nbytes)
    return memory, tensor


def product(kind: int, weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Callable[[], object]]:
    g = ggml()
    n, k = weight.shape
    kept = weights(weight, kind)

    def bind(x: Tensor) -> Callable[[], object]:
        memory = Memory()
        rows = memory.tensor(F32, x.shape[0], k)
        y = g["ggml_mul_mat"](memory.context, kept[1], rows)
        memory.allocate(g["ggml_backend_cpu_buffer_type"]())
        g["ggml_backend_tensor_set"](rows, x.data_ptr(), 0, x.nbytes)
        graph = g["ggml_new_graph"](memory.context)
        g["ggml_build_forward_expand"](graph, y)
        values = np.ctypeslib.as_array((c_float * (x.shape[0] * n)).from_address(g["ggml_get_data"](y)))

        def run() -> np.ndarray:
            if g["ggml_backend_graph_compute"](backend(), graph) != 0:
                raise RuntimeError("ggml: ggml_backend_graph_compute failed")
            return values

        run.owners = kept[0], memory
        return run

    return bind
