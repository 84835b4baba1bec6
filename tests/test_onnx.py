"""ONNX export: a quantized model in standard operators gives the same answers in onnxruntime."""

import warnings

import pytest
import torch
from torch import nn

import lepton_kernels as lk

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8", "w4a16"])
def test_onnxruntime_gives_the_same_answers(scheme, tmp_path):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(200, 96), nn.GELU(), nn.Linear(96, 50, bias=False)).eval()
    lk.quantize_(model, scheme)
    x = torch.randn(3, 5, 200)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lk.onnx.export(model, (x,), path)
    weights = sum(layer.weight_packed.nbytes for layer in model if isinstance(layer, lk.nn.QuantLinear))
    assert path.stat().st_size < weights + 16000  # integers, not floats, and the graph
    options = onnxruntime.SessionOptions()
    # Left alone, onnxruntime quantizes the activations of weight-only layers, too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.inference_mode():
        want = model(x)
    # w8a8 is exact without VNNI, too (with signed weights onnxruntime saturates there: 0.2).
    # a8: a value on a rounding boundary of the second layer's grid may fall to its other side. a16: 16-bit integers.
    assert (y - want).norm() / want.norm() < (2e-3 if scheme.endswith("a8") else 1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_exact_decides_whether_weights_are_multiplied_unsigned(exact, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = nn.Sequential(nn.Linear(32, 16)).eval()
    lk.quantize_(model, "w8a8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lk.onnx.export(model, (torch.randn(2, 32),), tmp_path / "model.onnx", exact=exact)
    product = next(n for n in onnx.load(tmp_path / "model.onnx").graph.node if n.op_type == "MatMulInteger")
    assert (len(product.input) == 4 and product.input[3] != "") == exact  # the zero point of the weights
