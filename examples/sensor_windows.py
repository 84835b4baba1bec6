"""A model for a small device: windows of three vibration sensors, is the bearing worn? Memory and latency at the end.

    python examples/sensor_windows.py [--samples 6000] [--epochs 4]

The data is made here: two machine frequencies and noise; a worn bearing adds short bursts at a third one.
"""

import argparse
import functools
import time
from statistics import median

import torch
from lepton_ai import LeptonDistributedModel, LeptonModel
from lepton_ai.compression import Compression, Pruning, Quantization
from lepton_ai.distributed import DataPartitioner
from torch import Tensor, nn
from torch.utils.data import TensorDataset

WINDOW, SENSORS, FRAME = 128, 3, 16


def windows(samples: int, seed: int) -> TensorDataset:
    """Windows f32 [samples, 3 * 128], and 1 where the bearing is worn."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(samples, SENSORS, 1, generator=generator)

    t = torch.arange(WINDOW) / WINDOW
    worn = torch.rand(samples, generator=generator) < 0.5
    signal = (6.28 * (uniform(4, 6) * t + uniform(0, 1))).sin() + 0.5 * (6.28 * (uniform(9, 11) * t)).sin()
    burst = (-((t - uniform(0.2, 0.8)) * 20).square()).exp() * (6.28 * 40 * t).sin()
    noise = 0.4 * torch.randn(samples, SENSORS, WINDOW, generator=generator)
    return TensorDataset((signal + noise + 0.9 * burst * worn[:, None, None]).flatten(1), worn.long())


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(SENSORS * WINDOW, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 2)
    )  # fmt: skip


class Recurrent(nn.Module):
    """A GRU over frames of 16 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(SENSORS * FRAME, 64, batch_first=True)
        self.head = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.view(-1, SENSORS, WINDOW // FRAME, FRAME).transpose(1, 2).flatten(2)
        return self.head(self.gru(frames)[0].amax(1))


def size_of(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


@torch.inference_mode()
def measured(model: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Accuracy, and the median microseconds of a call with one window."""
    model.eval()
    inputs, worn = data.tensors
    times = []
    for _ in range(300):
        start = time.perf_counter()
        model(inputs[:1])
        times.append(time.perf_counter() - start)
    return float((model(inputs).argmax(1) == worn).float().mean()), 1e6 * median(times)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--samples", type=int, default=6000)
    options.add_argument("--epochs", type=int, default=4)
    chosen = options.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as on the device
    data, unseen = windows(chosen.samples, 0), windows(2000, 1)
    adam = functools.partial(torch.optim.AdamW, lr=1e-3)

    def trained(model: nn.Module) -> LeptonDistributedModel:
        job = LeptonDistributedModel(model, DataPartitioner(data, batch_size=64))
        job.train(nn.functional.cross_entropy, adam, epochs=chosen.epochs)
        return job

    dense = trained(network()).model
    assert isinstance(dense, nn.Module)
    rows = {"float32": (dense, size_of(dense))}
    for scheme in ("w8a8", "w4a8"):
        small = LeptonModel(dense).compress(Pruning(0.5, pattern="2:4"), Quantization(scheme), Compression("huffman"))
        small = trained(small).model  # type: ignore[arg-type, assignment]
        small.save(f"sensor_windows_{scheme}.safetensors")
        rows[f"2:4, {scheme}"] = small.model, small.report().file_bytes or 0
    recurrent = trained(Recurrent()).model
    assert isinstance(recurrent, nn.Module)
    rows["GRU, float32"] = recurrent, size_of(recurrent)
    int8 = LeptonModel(recurrent).compress(Quantization("w8a8", include=[nn.GRU, nn.Linear]), Compression("huffman"))
    again = trained(int8).model  # type: ignore[arg-type]
    for name, small in (("GRU, w8a8", int8), ("GRU, w8a8, trained", again)):  # type: ignore[assignment]
        small.save("sensor_windows_gru.safetensors")
        rows[name] = small.model, small.report().file_bytes or 0
    print(f"{'':18}  accuracy  us a window  memory, bytes   file, bytes")
    for name, (model, file) in rows.items():
        right, micros = measured(model, unseen)
        print(f"{name:18}  {right:8.3f}  {micros:11.1f}  {size_of(model):13}  {file:12}")


if __name__ == "__main__":
    main()
