"""An image classifier: a small CNN is trained by worker processes, pruned and quantized, and trained on in that form.

    python examples/image_classifier.py [--samples 4000] [--epochs 4] [--workers 2]

The data is made here: 24 x 24 images of rings, crosses, bars and checks at random places, under noise.
"""

import argparse
import functools

import torch
from lepton_ai import LeptonDistributedModel, LeptonModel, ResourceManager
from lepton_ai.compression import Compression, Pruning, Quantization
from lepton_ai.distributed import DataPartitioner, SynchronousUpdate, TrainReport
from torch import nn
from torch.utils.data import TensorDataset

SIZE = 24


def images(samples: int, seed: int) -> TensorDataset:
    """Images f32 [samples, 1, 24, 24] and their class, 0 to 3."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 4, (samples,), generator=generator)
    centre = SIZE / 2 + 3 * torch.randn(samples, 2, 1, 1, generator=generator)
    axis = torch.arange(SIZE).float()
    y, x = axis[None, :, None] - centre[:, 0], axis[None, None, :] - centre[:, 1]
    radius = (x**2 + y**2).sqrt()
    near = radius < 8
    shapes = torch.stack([
        (radius - 6).abs() < 1.5,
        ((x.abs() < 1.5) | (y.abs() < 1.5)) & near,
        (y.remainder(4) < 2).expand_as(radius) & near,
        ((x.remainder(6) < 3) ^ (y.remainder(6) < 3)) & near,
    ])  # fmt: skip
    clean = shapes[classes, torch.arange(samples)].float()
    return TensorDataset((clean + 0.5 * torch.randn(clean.shape, generator=generator))[:, None], classes)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 6 * 6, 128), nn.ReLU(), nn.Linear(128, 4),
    )  # fmt: skip


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    inputs, classes = data.tensors
    return float((model(inputs).argmax(1) == classes).float().mean())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--samples", type=int, default=4000)
    options.add_argument("--epochs", type=int, default=4)
    options.add_argument("--workers", type=int, default=2)
    chosen = options.parse_args()
    torch.manual_seed(0)
    data, unseen = images(chosen.samples, 0), images(1000, 1)
    manager = ResourceManager(max_workers=chosen.workers)

    def trained(model: nn.Module, rate: float) -> tuple[LeptonDistributedModel, TrainReport]:
        job = LeptonDistributedModel(model, DataPartitioner(data, batch_size=32), SynchronousUpdate("int8"))
        adam = functools.partial(torch.optim.AdamW, lr=rate)
        evaluate = functools.partial(accuracy, data=unseen)
        report = job.configure(manager).train(
            nn.functional.cross_entropy, adam, epochs=chosen.epochs, evaluate=evaluate
        )
        print(report)
        return job, report

    job, of_dense = trained(network(), 1e-3)
    dense = job.model
    assert isinstance(dense, nn.Module)
    small = LeptonModel(dense).compress(Pruning(0.8, include=["7"]), Quantization("w8a8"), Compression("huffman"))
    job, of_small = trained(small, 3e-4)  # type: ignore[arg-type]
    small = job.model  # type: ignore[assignment]
    print(small.report())
    small.save("image_classifier.safetensors")
    print(f"accuracy: float32 {of_dense.metric_after:.3f}, compressed {of_small.metric_before:.3f}, trained on "
          f"{of_small.metric_after:.3f}; file {small.report().file_bytes} bytes")  # fmt: skip


if __name__ == "__main__":
    main()
