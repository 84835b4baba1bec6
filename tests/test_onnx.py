"""ONNX export: a quantized or sparse model in standard operators gives the same answers in onnxruntime."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lepton_kernels as lk

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def answers(model: nn.Module, x: torch.Tensor, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What onnxruntime and the model give; `path` gets the exported model, beside it the one that onnxruntime makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lk.onnx.export(model, (x,), path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".loaded.onnx"))
    options.log_severity_level = 3  # it warns that such a file is for one machine
    # Left alone, onnxruntime quantizes the activations of weight-only layers, too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.inference_mode():
        return y, model(x)


def tolerance(scheme: str | lk.QuantScheme | None) -> float:
    """w8a8 is exact without VNNI, too (with signed weights onnxruntime saturates there: 0.2). a8: a value on a rounding
    boundary of the second layer's grid may fall to its other side. a16: 16-bit integers."""
    eight = scheme is not None and lk.QuantScheme.of(scheme).activation == "int8"
    return 2e-3 if eight else 1e-4


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8", "w4a16"])
def test_onnxruntime_gives_the_same_answers(scheme, tmp_path):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(200, 96), nn.GELU(), nn.Linear(96, 50, bias=False)).eval()
    lk.quantize_(model, scheme)
    y, want = answers(model, torch.randn(3, 5, 200), tmp_path / "model.onnx")
    weights = sum(layer.weight_packed.nbytes for layer in model if isinstance(layer, lk.nn.QuantLinear))
    assert (tmp_path / "model.onnx").stat().st_size < weights + 16000  # integers, not floats, and the graph
    assert (y - want).norm() / want.norm() < tolerance(scheme)


SPARSE_SCHEMES = [None, "w8a8", lk.QuantScheme(6, step=0.002), "w4a16", lk.QuantScheme(4, 16, True, "float")]


def pruned(*layers: nn.Module, sparsity: float = 0.8) -> nn.Sequential:
    torch.manual_seed(5)
    model = nn.Sequential(*layers).eval()
    lk.prune_(model, sparsity)
    return model


@pytest.mark.parametrize("scheme", SPARSE_SCHEMES, ids=str)
def test_sparse_layers_are_sparse_in_the_file_and_dense_once_loaded(scheme, tmp_path):
    onnx = pytest.importorskip("onnx")
    first, last = pruned(nn.Linear(301, 96), nn.Linear(96, 50, bias=False))
    make = lk.nn.SparseLinear.from_linear
    model = nn.Sequential(make(first, scheme=scheme, activation="gelu"), make(last, scheme=scheme)).eval()
    y, want = answers(model, torch.randn(3, 5, 301), tmp_path / "model.onnx")
    assert (y - want).norm() / want.norm() < tolerance(scheme)
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (tmp_path / "model.onnx").stat().st_size < stored + 20000
    loaded = {node.op_type for node in onnx.load(tmp_path / "model.loaded.onnx").graph.node}
    assert not loaded & {"BitShift", "CumSum", "Gather"}  # what expands the weights ran once


@pytest.mark.parametrize("scheme", SPARSE_SCHEMES, ids=str)
def test_what_was_pruned_is_zero_in_onnxruntime(scheme, tmp_path):
    for sparsity in (0.6, 1.0):
        layer = nn.Linear(45, 20, bias=False)
        with torch.no_grad():
            layer.weight.mul_(torch.rand(20, 45) >= sparsity)
        model = nn.Sequential(lk.nn.SparseLinear.from_linear(layer, scheme=scheme)).eval()
        y, want = answers(model, torch.eye(45), tmp_path / "model.onnx")
        assert (y.T[layer.weight == 0] == 0).all()
        torch.testing.assert_close(y, want)


@pytest.mark.parametrize("scheme", [None, "w8a8", "w4a16"])
def test_sparse_convolutions(scheme, tmp_path):
    (conv,) = pruned(nn.Conv2d(5, 19, 3, stride=2, padding=1, padding_mode="reflect"))
    model = nn.Sequential(lk.nn.SparseConv2d.from_conv(conv, scheme=scheme), nn.ReLU()).eval()
    y, want = answers(model, torch.randn(2, 5, 9, 8), tmp_path / "model.onnx")
    assert (y - want).norm() / want.norm() < tolerance(scheme)


def test_a_sparse_convolution_takes_any_batch(tmp_path):
    (conv,) = pruned(nn.Conv2d(5, 19, 3, padding=1))
    model = nn.Sequential(lk.nn.SparseConv2d.from_conv(conv)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = {0: torch.export.Dim("batch")}
        lk.onnx.export(model, (torch.randn(3, 5, 9, 8),), tmp_path / "model.onnx", dynamic_shapes=(batch,))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(7, 5, 9, 8)
    y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(y, model(x))


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
