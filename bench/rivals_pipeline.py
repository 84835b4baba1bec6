"""The peers of the whole model: MiniLM by other libraries, each as its documentation has it for int8 or int4 on a CPU.

A peer is called as the transformers model is, by keywords, and returns an object with `last_hidden_state`, so that one
function embeds sentences by all of them. All are made from the same float model and run with torch's number of threads.
"""

import contextlib
import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from minilm import FOLDER, sentences
from torch import Tensor, nn

Model = Callable[..., Any]  # model(input_ids=, attention_mask=).last_hidden_state
INPUTS = ("input_ids", "attention_mask")
CALIBRATION = 300  # sentences, NNCF's default


def _example(batch: int = 2, tokens: int = 16) -> dict[str, Tensor]:
    ids = torch.randint(0, 1000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _eager() -> nn.Module:
    """The float model with its attention in plain operators, which exporters see through."""
    return transformers.AutoModel.from_pretrained(FOLDER, attn_implementation="eager").eval()


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Without the exporters' and optimizers' own reports; their errors are exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def torch_bf16(model: nn.Module, folder: Path) -> Model:
    return copy.deepcopy(model).to(torch.bfloat16)


def torch_dynamic(model: nn.Module, folder: Path) -> Model:
    torch.backends.quantized.engine = "fbgemm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})


def onnxruntime_int8(model: nn.Module, folder: Path) -> Model:
    """Exported, fused by onnxruntime.transformers, weights int8 a channel, activations quantized in each call."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    with _quiet(), torch.no_grad():
        batch, tokens = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("tokens", min=1, max=512)
        torch.onnx.export(
            _eager(), kwargs=_example(), f=folder / "float.onnx", input_names=INPUTS, dynamo=True, opset_version=18,
            output_names=["last_hidden_state", "pooled"], external_data=False,
            dynamic_shapes={name: {0: batch, 1: tokens} for name in INPUTS},
        )  # fmt: skip
        fused = optimizer.optimize_model(str(folder / "float.onnx"), "bert", num_heads=12, hidden_size=384, opt_level=1)
        fused.save_model_to_file(str(folder / "fused.onnx"))
        quantize_dynamic(
            folder / "fused.onnx", folder / "int8.onnx", per_channel=True, weight_type=QuantType.QInt8
        )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "int8.onnx", options, providers=["CPUExecutionProvider"])

    def run(input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> SimpleNamespace:
        feed = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return SimpleNamespace(last_hidden_state=torch.from_numpy(session.run(["last_hidden_state"], feed)[0]))

    return run


def _openvino(compress: Callable[[Any], Any]) -> Model:
    """`compress`: from OpenVINO's float model to the one that is compiled."""
    import openvino

    with _quiet(), torch.no_grad():
        model = openvino.convert_model(_eager(), example_input=_example())
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
        }  # fmt: skip
        request = openvino.Core().compile_model(compress(model), "CPU", options).create_infer_request()

    def run(input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> SimpleNamespace:
        request.infer({"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}, share_inputs=True)
        return SimpleNamespace(last_hidden_state=torch.from_numpy(np.array(request.get_output_tensor(0).data)))

    return run


def openvino_int8_weights(model: nn.Module, folder: Path) -> Model:
    """int8 weights a channel, activations quantized in each call (OpenVINO's default for such weights)."""
    import nncf

    return _openvino(lambda graph: nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM))


def openvino_int4_weights(model: nn.Module, folder: Path) -> Model:
    """The same with 4 bit in groups of 64, the embeddings in 8."""
    import nncf

    return _openvino(
        lambda graph: nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=64, ratio=1.0)
    )


def openvino_calibrated(model: nn.Module, folder: Path) -> Model:
    """Post-training quantization: int8 weights, and activations by ranges that were seen on sentences."""
    import nncf

    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    rows = [
        {name: tokens[name].numpy() for name in INPUTS}
        for tokens in (tokenizer(text, truncation=True, return_tensors="pt") for text in sentences()[:CALIBRATION])
    ]

    return _openvino(lambda graph: nncf.quantize(
        graph, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows)
    ))  # fmt: skip


PEERS: dict[str, tuple[Callable[[nn.Module, Path], Model], tuple[str, ...]]] = {
    "torch bf16": (torch_bf16, ()),
    "torch dynamic int8": (torch_dynamic, ()),
    "onnxruntime dynamic int8": (onnxruntime_int8, ("onnxruntime", "onnxscript")),
    "OpenVINO int8 weights": (openvino_int8_weights, ("openvino", "nncf")),
    "OpenVINO int4 weights": (openvino_int4_weights, ("openvino", "nncf")),
    "OpenVINO int8 calibrated": (openvino_calibrated, ("openvino", "nncf")),
}


def made(model: nn.Module, folder: Path) -> dict[str, Model]:
    """The float model and all peers whose libraries are here; files of theirs go to `folder`."""
    found = {
        name: make(model, folder)
        for name, (make, libraries) in PEERS.items()
        if all(importlib.util.find_spec(library) for library in libraries)
    }
    return {"torch fp32": model, **found}
