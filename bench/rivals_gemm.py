"""The peers of the quantized GEMM: Y[m, n] = X[m, k] @ W[n, k]^T by other libraries, each as it is meant to be used.

`make(weight, dtype)` builds a peer from W float32 [n, k] for X and Y of `dtype`; bound to X it is a call without
arguments, the one that is timed. Dynamic: activations are quantized inside that call. A kernel of another dtype has its
casts inside the call too. Recipes are from the libraries' own documentation. Left out: bitsandbytes, whose int8 layer
on a CPU is torch._int_mm and whose other layers multiply floats.
"""

import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import rivals_ggml
import torch
from torch import Tensor, nn

import lepton_kernels as lk

GROUP = 128  # weights along k that share a scale, where a recipe has groups
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16

Bind = Callable[[Tensor], Callable[[], object]]


@dataclass(frozen=True)
class Peer:
    """make, and what the peer is.

    bits: of a weight. group: weights along k that share a scale; -1: all. activations: "float" or "int8". dtypes: of X
    and Y. full: False for the integer product alone, of activations that are integers already.
    """

    make: Callable[[Tensor, torch.dtype], Bind]
    bits: int
    activations: str = "float"
    dtypes: tuple[torch.dtype, ...] = (FLOAT32,)
    full: bool = True
    library: str = "torch"
    group: int = -1

    @property
    def scheme(self) -> str:
        """In our words: "w8a8", "w4a16", ...; "dense" is floats by floats."""
        if self.bits > 8:
            return "dense"
        return f"w{self.bits}a{8 if self.activations == 'int8' else 16}"


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _bind(layer: Callable[[Tensor], object]) -> Bind:
    return lambda x: functools.partial(layer, x)


def _in_bfloat16(layer: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Bind:
    """A bfloat16 layer for X and Y of dtype: both casts are timed."""
    if dtype is BFLOAT16:
        return _bind(layer)
    return lambda x: lambda: layer(x.to(BFLOAT16)).to(dtype)


def _int8_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [n, k] and scales [n, 1]."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return torch.round(weight / scale).to(torch.int8), scale


def _unsigned_groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """uint8 [n, k / 128, 128], zero at 2^(bits - 1), and scales [n, k / 128]."""
    n, k = weight.shape
    zero = 1 << (bits - 1)
    groups = weight.view(n, k // GROUP, GROUP)
    scale = groups.abs().amax(2, keepdim=True) / (zero - 1)
    values = torch.round(groups / torch.where(scale == 0, 1.0, scale)) + zero
    return values.to(torch.uint8), scale[..., 0].contiguous()


def torch_float(weight: Tensor, dtype: torch.dtype) -> Bind:
    return _bind(_linear(weight.to(dtype, copy=True)))


def torch_bf16(weight: Tensor, dtype: torch.dtype) -> Bind:
    return _in_bfloat16(_linear(weight.to(BFLOAT16)), dtype)


def torch_dynamic(engine: str, weight: Tensor, dtype: torch.dtype) -> Bind:
    """torch.ao's quantize_dynamic; the engine's kernels are chosen when the weights are packed."""
    before = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = engine
        try:
            model = nn.Sequential(_linear(weight))
            return _bind(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)[0])
        finally:
            torch.backends.quantized.engine = before


def torch_int_mm(weight: Tensor, dtype: torch.dtype) -> Bind:
    """int8 [m, k] by int8 [k, n] to int32: neither the quantization of X nor the scales of Y."""
    values = torch.round(weight * (127 / weight.abs().max())).to(torch.int8).T

    def bind(x: Tensor) -> Callable[[], object]:
        rows = torch.round(x.float() * (127 / x.abs().max().item())).to(torch.int8)
        return functools.partial(torch._int_mm, rows, values)

    return bind


def torch_int8pack(weight: Tensor, dtype: torch.dtype) -> Bind:
    values, scale = _int8_channels(weight)
    scale = scale[:, 0].to(BFLOAT16)
    return _in_bfloat16(lambda x: torch.ops.aten._weight_int8pack_mm(x, values, scale), dtype)


def torch_int4pack(weight: Tensor, dtype: torch.dtype) -> Bind:
    values, scale = _unsigned_groups(weight, 4)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.flatten(1).to(torch.int32), 1)
    scales_zeros = torch.stack([scale, torch.zeros_like(scale)], 2).transpose(0, 1).contiguous().to(BFLOAT16)
    return _in_bfloat16(lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales_zeros), dtype)


def torchao(config: str, compiled: bool, weight: Tensor, dtype: torch.dtype) -> Bind:
    logging.getLogger("torchao").setLevel(logging.CRITICAL)  # at import it names the GPU libraries that it does without
    from torchao import quantization

    torch._dynamo.config.recompile_limit = 64  # all layers and their copies share one function
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Its tensors are a subclass that inference mode can not make.
    with torch.inference_mode(False), torch.no_grad():
        model = nn.Sequential(_linear(weight.to(dtype, copy=True)))
        quantization.quantize_(model, getattr(quantization, config)())
    return _bind(torch.compile(model) if compiled else model)


@functools.cache
def _onnxruntime_threads() -> None:
    """One pool for all sessions: the copies of a weight, each a session, would otherwise each wake up a pool."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)


def onnxruntime_session(graph):  # type: ignore[no-untyped-def]
    """A session of an ONNX graph on the common pool."""
    import onnx
    import onnxruntime

    _onnxruntime_threads()
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _onnxruntime(node: dict, weights: dict[str, np.ndarray], n: int, k: int) -> Bind:
    import onnx

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(inputs=["x", *weights], outputs=["y"], **node)], "gemm",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, k])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, n])],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    session = onnxruntime_session(graph)

    def bind(x: Tensor) -> Callable[[], object]:
        feed = {"x": x.numpy()}
        return lambda: session.run(None, feed)[0]

    return bind


def onnxruntime_fp32(weight: Tensor, dtype: torch.dtype) -> Bind:
    return _onnxruntime({"op_type": "MatMul"}, {"w": weight.T.contiguous().numpy()}, *weight.shape)


def onnxruntime_dynamic(weight: Tensor, dtype: torch.dtype) -> Bind:
    """DynamicQuantizeMatMul: uint8 activations with one scale a tensor, int8 weights with one a channel."""
    values, scale = _int8_channels(weight)
    weights = {
        "w": values.T.contiguous().numpy(), "scale": scale[:, 0].numpy(), "zero": np.zeros(len(weight), np.int8),
    }  # fmt: skip
    node = {"op_type": "DynamicQuantizeMatMul", "domain": "com.microsoft"}
    return _onnxruntime(node, weights, *weight.shape)


def onnxruntime_nbits(bits: int, weight: Tensor, dtype: torch.dtype) -> Bind:
    """MatMulNBits, blocks of 128, int8 activations (accuracy level 4)."""
    n, k = weight.shape
    values, scale = _unsigned_groups(weight, bits)
    if bits == 4:
        values = values[..., 0::2] | values[..., 1::2] << 4
    node = {
        "op_type": "MatMulNBits", "domain": "com.microsoft", "K": k, "N": n, "bits": bits, "block_size": GROUP,
        "accuracy_level": 4,
    }  # fmt: skip
    return _onnxruntime(node, {"w": values.contiguous().numpy(), "scale": scale.numpy()}, n, k)


def _openvino(weight: Callable, k: int, precision: str) -> Bind:
    """weight(opset) is the graph of W. `precision`: what floats are computed in."""
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([-1, k], np.float32, name="x")
    model = openvino.Model([ops.matmul(x, weight(ops), False, True)], [x], "gemm")
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
    }  # fmt: skip
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def bind(x: Tensor) -> Callable[[], object]:
        rows = x.numpy()

        def run() -> np.ndarray:
            request.infer({0: rows}, share_inputs=True)
            return request.get_output_tensor().data

        return run

    return bind


def openvino_float(precision: str, weight: Tensor, dtype: torch.dtype) -> Bind:
    return _openvino(lambda ops: ops.constant(weight.numpy()), weight.shape[1], precision)


def openvino_int8(precision: str, weight: Tensor, dtype: torch.dtype) -> Bind:
    """int8 weights with one scale a channel; activations quantized in groups of 128, or left in bf16."""
    values, scale = _int8_channels(weight)

    def graph(ops) -> object:  # type: ignore[no-untyped-def]
        return ops.multiply(ops.convert(ops.constant(values.numpy()), np.float32), ops.constant(scale.numpy()))

    return _openvino(graph, weight.shape[1], precision)


def openvino_int4(precision: str, weight: Tensor, dtype: torch.dtype) -> Bind:
    """u4 weights in groups of 128; activations quantized in groups of 128, or left in bf16."""
    import openvino

    values, scale = _unsigned_groups(weight, 4)

    def graph(ops) -> object:  # type: ignore[no-untyped-def]
        integers = ops.convert(ops.constant(values.numpy(), dtype=openvino.Type.u4), np.float32)
        zero = ops.convert(ops.constant(np.full((1, 1, 1), 8, np.uint8)), np.float32)
        floats = ops.multiply(ops.subtract(integers, zero), ops.constant(scale[..., None].numpy()))
        return ops.reshape(floats, ops.constant(np.array(weight.shape)), special_zero=False)

    return _openvino(graph, weight.shape[1], precision)


EITHER = (FLOAT32, BFLOAT16)
_part = functools.partial
PEERS = {
    "torch fp32": Peer(torch_float, 32),
    "torch bf16": Peer(torch_bf16, 16, dtypes=EITHER),
    "onnxruntime fp32": Peer(onnxruntime_fp32, 32, library="onnxruntime"),
    "OpenVINO fp32": Peer(_part(openvino_float, "f32"), 32, library="openvino"),
    "OpenVINO bf16": Peer(_part(openvino_float, "bf16"), 16, library="openvino"),
    "torch dynamic int8 (fbgemm)": Peer(_part(torch_dynamic, "fbgemm"), 8, "int8"),
    "torch dynamic int8 (oneDNN)": Peer(_part(torch_dynamic, "onednn"), 8, "int8"),
    "torch _int_mm (product alone)": Peer(torch_int_mm, 8, "int8", full=False),
    "torchao int8 dynamic": Peer(
        _part(torchao, "Int8DynamicActivationInt8WeightConfig", False), 8, "int8", EITHER, library="torchao"
    ),
    "torchao int8 dynamic, compiled": Peer(
        _part(torchao, "Int8DynamicActivationInt8WeightConfig", True), 8, "int8", EITHER, library="torchao"
    ),
    "onnxruntime dynamic int8": Peer(onnxruntime_dynamic, 8, "int8", library="onnxruntime"),
    "onnxruntime 8 bit": Peer(_part(onnxruntime_nbits, 8), 8, "int8", library="onnxruntime", group=GROUP),
    "OpenVINO int8": Peer(_part(openvino_int8, "f32"), 8, "int8", library="openvino"),
    "OpenVINO int8 (bf16)": Peer(_part(openvino_int8, "bf16"), 8, library="openvino"),
    "llama.cpp Q8_0": Peer(_part(rivals_ggml.product, rivals_ggml.Q8_0), 8, "int8", library="llama_cpp", group=32),
    "torch int8pack (bf16)": Peer(torch_int8pack, 8, dtypes=EITHER),
    "torchao int8 weights": Peer(_part(torchao, "Int8WeightOnlyConfig", True), 8, "float", EITHER, library="torchao"),
    "onnxruntime 4 bit": Peer(_part(onnxruntime_nbits, 4), 4, "int8", library="onnxruntime", group=GROUP),
    "OpenVINO u4": Peer(_part(openvino_int4, "f32"), 4, "int8", library="openvino", group=GROUP),
    "OpenVINO u4 (bf16)": Peer(_part(openvino_int4, "bf16"), 4, library="openvino", group=GROUP),
    "llama.cpp Q4_0": Peer(_part(rivals_ggml.product, rivals_ggml.Q4_0), 4, "int8", library="llama_cpp", group=32),
    "torch int4pack (bf16)": Peer(torch_int4pack, 4, dtypes=EITHER, group=GROUP),
}


# Loops over scalars where the processor has no VNNI: 40 to 100 times as slow as the fastest, seconds a call.
NEED_VNNI = "torch _int_mm", "torchao int8 dynamic"


def installed() -> dict[str, Peer]:
    """The peers whose library is here and that this processor does not make hopeless; no table has the others.

    Beside an older level of ours: torch's float layers alone, which bench/run.py holds to the same level.
    """
    found = {name: peer for name, peer in PEERS.items() if importlib.util.find_spec(peer.library)}
    if os.environ.get("LEPTON_MAX_ISA"):
        return {name: peer for name, peer in found.items() if (peer.library, peer.scheme) == ("torch", "dense")}
    if lk.backends()["isa_of_machine"] in ("generic", "ssse3", "avx2"):
        return {name: peer for name, peer in found.items() if not name.startswith(NEED_VNNI)}
    return found
