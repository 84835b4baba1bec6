"""MiniLM end to end, 128 tokens: ours beside torch fp32, bf16 and dynamic int8, and OpenVINO where it is installed."""

import copy

import pytest
import torch
import transformers
from lepton_ai import LeptonModel
from lepton_ai.compression import Compression, Quantization
from lepton_ai.measure import token_batch
from minilm import FOLDER
from torch import nn

import lepton_kernels as lk

transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def fp32() -> LeptonModel:
    return LeptonModel(FOLDER)


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_latency(race, fp32: LeptonModel, scheme: str, batch: int) -> None:
    torch.backends.quantized.engine = "fbgemm"
    inputs = token_batch(fp32.model, batch, 128)
    models: dict[str, nn.Module] = {
        "torch fp32": fp32.model,
        "torch bf16": copy.deepcopy(fp32.model).to(torch.bfloat16),
        "torch dynamic int8": torch.ao.quantization.quantize_dynamic(copy.deepcopy(fp32.model), {nn.Linear}),
    }
    ours = fp32.compress(Quantization(scheme))
    with torch.inference_mode():
        race(f"pipeline {scheme} batch {batch}",
             {name: lambda model=model: model(**inputs) for name, model in
              {f"lepton {scheme}": ours, **models}.items()},
             table=f"pipeline {scheme}", row=f"batch {batch}")  # fmt: skip


def test_load(race, fp32: LeptonModel, tmp_path) -> None:
    compressed = fp32.compress(Quantization("w8a8"), Compression("huffman"))
    compressed.save(tmp_path / "coded.safetensors")
    lk.save(compressed.model, tmp_path / "plain.safetensors", "none")
    race("pipeline load",
         {"lepton, Huffman": lambda: lk.load(tmp_path / "coded.safetensors"),
          "lepton, not coded": lambda: lk.load(tmp_path / "plain.safetensors")},
         table="pipeline load", row="the w8a8 file")  # fmt: skip
