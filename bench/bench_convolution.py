"""Pruned convolutions, and a small network of them, beside dense ones of torch and onnxruntime (fp32).

X is channels-first for all but "channels-last". The network: three convolutions and two linear layers, 80 % zeros but
in the first; ours is what sparsify_ makes of it, without a scheme and with w8a8.
"""

import copy
import importlib.util

import numpy as np
import pytest
import rivals_gemm
import torch
from bench_gemm import relative_error
from torch import Tensor, nn

import lepton_kernels as lk
from lepton_kernels.nn import SparseConv2d

LAYERS = [  # channels in and out, kernel, stride, batch, height = width
    (64, 64, 3, 1, 8, 32), (128, 256, 3, 1, 8, 16), (256, 256, 3, 1, 1, 14), (256, 512, 1, 1, 8, 14),
]  # fmt: skip
ERROR = 1e-5, 0.05  # fp32, w8a8


def onnxruntime_conv(conv: nn.Conv2d, x: Tensor):  # type: ignore[no-untyped-def]
    """A call of the convolution in onnxruntime."""
    import onnx

    padding = [*conv.padding, *conv.padding]
    node = onnx.helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=padding, strides=list(conv.stride))
    y = conv(x)
    shapes = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape))
        for name, shape in (("x", x.shape), ("y", y.shape))
    ]
    stored = [
        onnx.numpy_helper.from_array(np.asarray(t.detach()), n) for n, t in (("w", conv.weight), ("b", conv.bias))
    ]
    graph = onnx.helper.make_graph([node], "conv", shapes[:1], shapes[1:], stored)
    session = rivals_gemm.onnxruntime_session(graph)
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.8), ("unstructured", 0.9), ("16x4", 0.8)])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layer(race, layer, pattern, sparsity) -> None:
    into, out, kernel, stride, batch, size = layer
    torch.manual_seed(0)
    conv = nn.Conv2d(into, out, kernel, stride, padding=kernel // 2)
    lk.prune_(nn.Sequential(conv), sparsity, pattern=pattern)
    with torch.inference_mode():
        x = torch.randn(batch, into, size, size)
        last, x_last = (
            copy.deepcopy(conv).to(memory_format=torch.channels_last),
            x.to(memory_format=torch.channels_last),
        )
        ours, of_int8 = SparseConv2d.from_conv(conv), SparseConv2d.from_conv(conv, scheme="w8a8")
        calls = {
            "lepton sparse": lambda: ours(x), "lepton sparse w8a8": lambda: of_int8(x), "torch": lambda: conv(x),
            "torch, channels-last": lambda: last(x_last),
        }  # fmt: skip
        if importlib.util.find_spec("onnxruntime"):
            calls["onnxruntime"] = onnxruntime_conv(conv, x)
        want = conv(x)
        for name, call in calls.items():
            assert relative_error(torch.as_tensor(call()), want, True) < ERROR["w8a8" in name], name
        zeros = f"{sparsity:.0%}" if pattern == "unstructured" else f"{pattern} {sparsity:.0%}"
        row = f"{into} to {out}, {kernel}x{kernel}, {batch} x {size} x {size}, {zeros}"
        race(row, calls, table="convolution", row=row)


@pytest.mark.parametrize("batch", [1, 64])
def test_network(race, batch) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 4),
    )  # fmt: skip
    lk.prune_(dense, 0.8, exclude=["0"])
    ours, of_int8 = copy.deepcopy(dense), copy.deepcopy(dense)
    x = torch.randn(batch, 1, 12, 12)
    lk.sparsify_(ours, rows=(batch,), example=x)
    lk.sparsify_(of_int8, rows=(batch,), example=x, scheme="w8a8")
    with torch.inference_mode():
        calls = {"lepton sparse": lambda: ours(x), "lepton sparse w8a8": lambda: of_int8(x), "torch": lambda: dense(x)}
        for name, call in calls.items():
            assert relative_error(call(), dense(x), True) < ERROR["w8a8" in name], name
        race(f"network {batch}", calls, table="convolution", row=f"network, batch {batch}, 80%")
