"""MiniLM end to end, 128 tokens: ours beside the same model by torch, onnxruntime and OpenVINO; loading its file."""

import os

import pytest
import rivals_pipeline
import torch
import transformers
from lepton_ai import LeptonModel
from lepton_ai.compression import Compression, Quantization
from lepton_ai.fidelity import fidelity, output_vectors
from lepton_ai.measure import token_batch
from minilm import FOLDER, batches, sentences

import lepton_kernels as lk

transformers.utils.logging.set_verbosity_error()

Models = dict[str, rivals_pipeline.Model]


@pytest.fixture(scope="module")
def fp32() -> LeptonModel:
    return LeptonModel(FOLDER)


@pytest.fixture(scope="module")
def models(fp32: LeptonModel, tmp_path_factory) -> Models:
    ours = {f"lepton {scheme}": fp32.compress(Quantization(scheme)) for scheme in ("w8a8", "w4a8")}
    return {**ours, **rivals_pipeline.made(fp32.model, tmp_path_factory.mktemp("rivals"))}


@pytest.fixture(scope="module")
def close(models: Models) -> dict[str, dict]:
    """Cosines between the sentence embeddings of each model and those of the float model."""
    texts = sentences()[:40] if os.environ.get("LEPTON_BENCH_CASES") == "quick" else sentences()
    inputs = batches(transformers.AutoTokenizer.from_pretrained(FOLDER), texts)
    reference = output_vectors(models["torch fp32"], inputs)
    found = {name: fidelity(reference, output_vectors(model, inputs)) for name, model in models.items()}
    return {
        name: {"sentences": one.samples, "cosine_mean": one.cosine_mean, "cosine_min": one.cosine_min}
        for name, one in found.items()
    }


@pytest.mark.parametrize("batch", [1, 32])
def test_latency(race, fp32: LeptonModel, models: Models, close: dict[str, dict], batch: int) -> None:
    inputs = token_batch(fp32.model, batch, 128)
    calls = {name: lambda model=model: model(**inputs) for name, model in models.items()}
    with torch.inference_mode():
        race(f"pipeline batch {batch}", calls, close, table="pipeline", row=f"batch {batch}")


def test_load(race, fp32: LeptonModel, tmp_path) -> None:
    compressed = fp32.compress(Quantization("w8a8"), Compression("huffman"))
    compressed.save(tmp_path / "coded.safetensors")
    lk.save(compressed.model, tmp_path / "plain.safetensors", "none")
    race("pipeline load",
         {"lepton, Huffman": lambda: lk.load(tmp_path / "coded.safetensors"),
          "lepton, not coded": lambda: lk.load(tmp_path / "plain.safetensors")},
         table="pipeline load", row="the w8a8 file")  # fmt: skip
