"""The peers of the quantized GEMM: Y[m, n] = X[m, k] @ W[n, k]^T by other libraries, each as it is meant to be used.

A rival is a function of (W float32 [n, k], m) that returns a callable of X float32 [m, k], or raises ImportError when
its library is not installed. Dynamic: activations are quantized inside the timed call. Sources of each recipe: the
library's own documentation.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[[Tensor], object]


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def torch_fp32(weight: Tensor, m: int) -> Run:
    return _linear(weight)


def torch_bf16(weight: Tensor, m: int) -> Run:
    layer = _linear(weight.to(torch.bfloat16))
    return lambda x: layer(x.to(torch.bfloat16))


def torch_dynamic_int8(weight: Tensor, m: int) -> Run:
    """torch.ao's quantize_dynamic on its default engine for this CPU (fbgemm kernels)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "fbgemm"
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(_linear(weight)), {nn.Linear}, dtype=torch.qint8)


def torch_dynamic_int8_onednn(weight: Tensor, m: int) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "onednn"
        try:
            return torch.ao.quantization.quantize_dynamic(
                nn.Sequential(_linear(weight)), {nn.Linear}, dtype=torch.qint8
            )
        finally:
            torch.backends.quantized.engine = "fbgemm"


def torch_int4pack(weight: Tensor, m: int) -> Run:
    """torch's weight-only int4 product, groups of 128, bf16 activations."""
    n, k = weight.shape
    groups = weight.view(n, k // 128, 128)
    scale = groups.abs().amax(2, keepdim=True) / 7
    values = (torch.round(groups / scale).clamp(-8, 7) + 8).to(torch.int32).view(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    scales_zeros = torch.stack([scale[..., 0], torch.zeros_like(scale[..., 0])], 2).transpose(0, 1)
    scales_zeros = scales_zeros.contiguous().to(torch.bfloat16)

    def run(x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), packed, 128, scales_zeros)

    return run


def _onnx_session(nodes: list, weights: dict[str, np.ndarray], k: int, n: int, opset: int = 17) -> Run:
    import onnx
    import onnxruntime

    graph = onnx.helper.make_graph(
        nodes, "gemm",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, k])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, n])],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})[0]


def onnxruntime_dynamic_int8(weight: Tensor, m: int) -> Run:
    """DynamicQuantizeMatMul: uint8 activations per tensor, int8 weights per channel."""
    import onnx

    n, k = weight.shape
    scale = weight.abs().amax(1) / 127
    values = torch.round(weight / scale[:, None]).clamp(-127, 127).to(torch.int8)
    node = onnx.helper.make_node("DynamicQuantizeMatMul", ["x", "w", "scale", "zero"], ["y"], domain="com.microsoft")
    weights = {
        "w": values.T.contiguous().numpy(), "scale": scale.numpy(), "zero": np.zeros(n, np.int8),
    }  # fmt: skip
    return _onnx_session([node], weights, k, n)


def onnxruntime_int4(weight: Tensor, m: int) -> Run:
    """MatMulNBits, 4 bits in blocks of 128, int8 activations (accuracy level 4)."""
    import onnx

    n, k = weight.shape
    groups = weight.view(n, k // 128, 128)
    scale = groups.abs().amax(2, keepdim=True) / 7
    values = (torch.round(groups / scale).clamp(-8, 7) + 8).to(torch.uint8)
    packed = (values[..., 0::2] | values[..., 1::2] << 4).contiguous()
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "w", "scale"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=128,
        accuracy_level=4,
    )  # fmt: skip
    return _onnx_session([node], {"w": packed.numpy(), "scale": scale[..., 0].contiguous().numpy()}, k, n)


def _openvino(weight: np.ndarray, scale: np.ndarray, kind: str, shape: list[int], group: int) -> Run:
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([-1, shape[1]], np.float32, name="x")
    constant = ops.constant(weight, dtype=getattr(openvino.Type, kind))
    values = ops.convert(constant, np.float32)
    if kind == "u4":
        values = ops.subtract(values, ops.convert(ops.constant(np.full((1, 1, 1), 8, np.uint8)), np.float32))
    values = ops.multiply(values, ops.constant(scale))
    if values.get_output_size() and len(weight.shape) == 3:
        values = ops.reshape(values, ops.constant(np.array(shape)), special_zero=False)
    model = openvino.Model([ops.matmul(x, values, False, True)], [x], "gemm")
    compiled = openvino.Core().compile_model(
        model, "CPU",
        {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
         "DYNAMIC_QUANTIZATION_GROUP_SIZE": group},
    )  # fmt: skip
    request = compiled.create_infer_request()

    def run(x: Tensor) -> np.ndarray:
        request.infer({0: x.numpy()}, share_inputs=True)
        return request.get_output_tensor().data

    return run


def openvino_int8(weight: Tensor, m: int) -> Run:
    """Compressed int8 weights per channel, dynamic quantization of activations in groups of 128."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = torch.round(weight / scale).clamp(-127, 127).to(torch.int8)
    return _openvino(values.numpy(), scale.numpy(), "i8", list(weight.shape), 128)


def openvino_int4(weight: Tensor, m: int) -> Run:
    """u4 weights in groups of 128, dynamic quantization of activations in groups of 128."""
    n, k = weight.shape
    groups = weight.view(n, k // 128, 128)
    scale = groups.abs().amax(2, keepdim=True) / 7
    values = (torch.round(groups / scale).clamp(-8, 7) + 8).to(torch.uint8)
    return _openvino(values.numpy(), scale.numpy(), "u4", [n, k], 128)


FLOAT = {"torch fp32": torch_fp32, "torch bf16": torch_bf16}
INT8 = {
    "torch dynamic int8 (fbgemm)": torch_dynamic_int8,
    "torch dynamic int8 (oneDNN)": torch_dynamic_int8_onednn,
    "onnxruntime dynamic int8": onnxruntime_dynamic_int8,
    "OpenVINO int8": openvino_int8,
}
INT4 = {
    "torch int4pack (bf16)": torch_int4pack,
    "onnxruntime int4": onnxruntime_int4,
    "OpenVINO u4": openvino_int4,
}
